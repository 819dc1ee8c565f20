"""What `tune` tried on a device, and which layers make one engine faster than another there."""

from collections.abc import Iterator
from typing import Any

from rich.markup import escape
from rich.table import Table

from care_compress.evaluate.device_measurements import is_of_cpu
from care_compress.evaluate.layers import kind_table
from care_compress.runtime.profile import profile_of_rows

SHOWN_LAYERS = 8


def device_field(name: str, found: dict[str, Any]) -> dict[str, Any] | None:
    """Return the candidates and layers that a board's results hold, as ``compare.json`` does."""
    if is_of_cpu(found):
        return None
    layers = {
        model: profile_of_rows(one["layer_times"]["layers"]).as_json()
        for model, one in found["models"].items()
        if one["layer_times"] is not None
    }
    candidates = [
        _candidate(key, row) for key, row in sorted(found["candidates"].items(), key=_order)
    ]
    if not layers and not candidates:
        return None
    return {
        "target": found["target"],
        "model": name,
        "board": found["board"]["name"],
        "winner": found["winner"],
        "candidates": candidates,
        "layers": layers,
    }


def _order(item: tuple[str, dict[str, Any]]) -> tuple[int, float]:
    speed = item[1]["speed"]
    return item[1]["batch"], float("inf") if speed is None else speed["latency_ms"]["p50"]


def _candidate(key: str, row: dict[str, Any]) -> dict[str, Any]:
    speed, accuracy = row["speed"], row["accuracy"]
    energy = None if speed is None else speed["energy"]
    return {
        "name": key,
        "model": row["model"],
        "optimization_level": row["optimization_level"],
        "batch": row["batch"],
        "passed": row["state"] == "passed",
        "reason": row["reason"],
        "sqnr_db": None if accuracy is None else accuracy["sqnr_db"],
        "latency_ms": None if speed is None else speed["latency_ms"],
        "throughput": None if speed is None else speed["throughput"],
        "millijoules_per_image": None if energy is None else energy["millijoules_per_image"],
        "size_bytes": row["size_bytes"],
    }


def field_tables(field: dict[str, Any]) -> Iterator[Table]:
    """Show the candidates of one board, and what explains the fastest of them."""
    where = f"{field['target']}, {field['model']} on {field['board']}"
    if field["candidates"]:
        yield field_table(f"Candidates for {where}", field)
    if field["layers"]:
        yield kind_table(f"Where the GPU's time goes for {where}", field["layers"])
    for model, profile in field["layers"].items():
        yield _slowest(f"The slowest layers of {model} for {where}", profile)


def field_table(title: str, field: dict[str, Any]) -> Table:
    """Show every candidate with its figures, or with the reason why it has none."""
    table = Table(title=escape(title), title_justify="left")
    table.add_column("model", no_wrap=True)
    figures = ("level", "batch", "p50 ms", "p99 ms", "images/s", "mJ/image", "SQNR", "size")
    for column in figures:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for one in field["candidates"]:
        times = one["latency_ms"]
        energy, size = one["millijoules_per_image"], one["size_bytes"]
        table.add_row(
            escape(one["model"]),
            str(one["optimization_level"]),
            str(one["batch"]),
            *("" if times is None else f"{times[p]:.3f}" for p in ("p50", "p99")),
            "" if one["throughput"] is None else f"{one['throughput']:.0f}",
            "" if energy is None else f"{energy:.2f}",
            "" if one["sqnr_db"] is None else f"{one['sqnr_db']:.1f} dB",
            "" if size is None else f"{size / 1e6:.2f} MB",
            "kept: the fastest" if one["name"] == field["winner"] else escape(one["reason"]),
        )
    return table


def _slowest(title: str, profile: dict[str, Any]) -> Table:
    table = Table(title=escape(title), title_justify="left")
    for column in ("layer", "kind", "enters as"):
        table.add_column(column, overflow="fold")
    for column in ("ms", "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in sorted(profile["layers"], key=lambda one: -one["ms"])[:SHOWN_LAYERS]:
        name = layer["sites"][0] if layer["sites"] else layer["name"]
        cells = (name, layer["kind"], layer["precision"])
        table.add_row(*map(escape, cells), f"{layer['ms']:.3f}", f"{100 * layer['share']:.1f} %")
    return table
