"""Results as tables on the console."""

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from care_compress.evaluate.pairs import Paired
from care_compress.model.rewrite import RewriteStep
from care_compress.quantize.distance import EXACT_DB
from care_compress.quantize.plots import short_name


def rewrite_table(steps: list[RewriteStep]) -> Table:
    """Cost of one image after each exact rewrite."""
    table = Table(title="Exact rewrites", title_justify="left")
    table.add_column("after")
    for column in ("parameters", "MACs (M)", "operations"):
        table.add_column(column, justify="right")
    for step in steps:
        cost = step.cost
        table.add_row(
            step.name, f"{cost.parameters:,}", f"{cost.macs / 1e6:.2f}", str(cost.operations)
        )
    return table


def quantized_table(candidates: Sequence[tuple[str, Paired]], kept: str) -> Table:
    """Float and quantized side by side."""
    images = candidates[0][1].baseline.images
    table = Table(title=f"On {images:,} validation images", title_justify="left")
    table.add_column("model")
    for column in ("top-1", "top-5", "drop [95 %]", "same answer", "logit SQNR"):
        table.add_column(column, justify="right")
    before = candidates[0][1].baseline
    table.add_row("float", f"{before.top1:.2f} %", f"{before.top5:.2f} %", "", "", "")
    for name, paired in candidates:
        low, high = paired.drop_ci95
        table.add_row(
            f"{name} (kept)" if name == kept else name,
            f"{paired.candidate.top1:.2f} %",
            f"{paired.candidate.top5:.2f} %",
            f"{paired.drop:.2f} [{low:.2f}, {high:.2f}]",
            f"{paired.agreement:.2f} %",
            f"{paired.distance.sqnr_db:.1f} dB",
        )
    return table


def accuracy_table(value: dict[str, Any]) -> Table:
    """Every file's accuracy beside the baseline's on the same target."""
    table = Table(title=f"Accuracy of the files on {value['images']:,} images")
    table.title_justify = "left"
    table.add_column("target", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for column in (
        "top-1",
        "top-5",
        "drop [95 %]",
        "McNemar p",
        "same answer",
        "SQNR",
        "size",
        "memory",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    pairs = {(pair["target"], pair["candidate"]): pair for pair in value["pairs"]}
    for target, models in value["targets"].items():
        for name, found in models.items():
            if found["available"] and found["top1"] is not None and "measured_on" not in found:
                pair = pairs.get((target, name))
                table.add_row(target, escape(name), *_scores(found), *_beside(pair), *_bytes(found))
    return table


def _scores(found: dict[str, Any]) -> tuple[str, str]:
    return f"{found['top1']:.2f} %", f"{found['top5']:.2f} %"


def _beside(pair: dict[str, Any] | None) -> tuple[str, str, str, str]:
    if pair is None:
        return "", "", "", ""
    low, high = pair["drop_ci95"]
    near = "exact" if pair["sqnr_db"] is None else f"{pair['sqnr_db']:.1f} dB"
    return (
        f"{pair['drop']:.2f} [{low:.2f}, {high:.2f}]",
        f"{pair['mcnemar_p']:.2g}",
        f"{pair['agreement']:.2f} %",
        near,
    )


def _bytes(found: dict[str, Any]) -> tuple[str, str]:
    """On disk, and in memory at its peak where that was measured."""
    memory = found.get("peak_memory_bytes")
    return (
        f"{found['size_bytes'] / 1e6:.2f} MB",
        "" if memory is None else f"{memory / 1e6:.1f} MB",
    )


def latency_table(setting: dict[str, Any]) -> Table:
    """Latency at one batch size and number of threads."""
    threads = setting["threads"]
    title = f"Batch {setting['batch']}, {threads} thread{'s' if threads > 1 else ''}"
    table = Table(title=title, title_justify="left")
    table.add_column("target", no_wrap=True)
    table.add_column("model", no_wrap=True)
    for column in ("p50 ms", "p90 ms", "p99 ms", "images/s", "times as fast [95 %]"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in setting["rows"]:
        times = row["latency_ms"]
        faster = ""
        if row["speedup"] is not None:
            low, high = row["speedup_ci95"]
            faster = f"{row['speedup']:.2f} [{low:.2f}, {high:.2f}]"
        noisy = " noisy" if row["noisy"] else ""
        table.add_row(
            row["target"],
            escape(row["name"]),
            *(f"{times[p]:.2f}" for p in ("p50", "p90", "p99")),
            f"{row['throughput']:.0f}",
            faster + noisy,
        )
    return table


def device_table(value: dict[str, Any]) -> Table:
    """What other devices measured by the script of a bundle, each on its own."""
    table = Table(title="Measured on devices, by the script of a bundle", title_justify="left")
    for column in ("target", "model", "device", "with"):
        table.add_column(column, overflow="fold")
    for column in (
        "batch",
        "p50 ms",
        "p90 ms",
        "p99 ms",
        "images/s",
        "top-1 of samples",
        "verified",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for target, models in value["targets"].items():
        for one in models.values():
            if where := one.get("measured_on"):
                times = one["latency_ms"] or {}
                speed = "" if one["throughput"] is None else f"{one['throughput']:.0f}"
                checked = {True: "passed", False: "FAILED", None: "no"}[where["verified"]]
                table.add_row(
                    target,
                    escape(where["model"]),
                    escape(where["board"]),
                    escape(_setting(where)),
                    str(where["batch"] or ""),
                    *(f"{times[p]:.2f}" if times else "" for p in ("p50", "p90", "p99")),
                    speed,
                    "" if one["top1"] is None else f"{one['top1']:.2f} %",
                    checked,
                )
    return table


def _setting(where: dict[str, Any]) -> str:
    """The library, and the power mode or the number of threads."""
    threads = where["threads"]
    counted = None if threads is None else f"{threads} thread{'s' if threads > 1 else ''}"
    return ", ".join(filter(None, (where["library"], where["power_mode"], counted)))


HARDEST = 15
ABSENT = "not here, see below"


def version_table(value: dict[str, Any]) -> Table:
    """One row for each version, beside the one before it."""
    table = Table(title=f"Version by version, {value['images']:,} images", title_justify="left")
    table.add_column("version", no_wrap=True)
    table.add_column("made from", no_wrap=True)
    for column in ("logits", "to float", "same answers"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("first parts at", no_wrap=True)
    for row in value["rungs"]:
        if "missing" in row:
            cells = [row["rung"], "", "", "", "", ABSENT]
        else:
            cells = [row["rung"], row["before"] or "", *_figures(row), parting_text(row)]
        table.add_row(*(escape(cell) for cell in cells))
    return table


def _figures(row: dict[str, Any]) -> tuple[str, str, str]:
    return decibels(row["sqnr_db"]), decibels(row["to_float_db"]), f"{row['same_percent']:.1f} %"


def decibels(value: float | None) -> str:
    """``31.0 dB``; nothing for the first version, words for no difference."""
    return "" if value is None else "exact" if value >= EXACT_DB else f"{value:.1f} dB"


def parting_text(row: dict[str, Any]) -> str:
    """Where a version parts from the one before it, or why that is not known."""
    parting = row["parts_at"]
    if parting is not None:
        return f"{short_name(parting['site'])}, {decibels(parting['sqnr_db'])}"
    if row["sites"]:
        return "nowhere"
    return "" if row["before"] is None else str(row["note"]).partition(":")[0]


def hardest_sites(value: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """Versions that show sites, and the worst sites with a distance for each of those versions."""
    shown = [row for row in value["rungs"] if row.get("sites")]
    worst: dict[str, float] = {}
    for row in shown:
        for site, found in row["sites"].items():
            worst[site] = min(found, worst.get(site, found))
    sites = sorted(worst, key=lambda site: worst[site])[:HARDEST]
    cells = [(site, [row["sites"].get(site) for row in shown]) for site in sites]
    return [row["rung"] for row in shown], cells


def site_table(value: dict[str, Any]) -> Table:
    """The hardest sites from version to version, each step beside the version it was made from."""
    versions, cells = hardest_sites(value)
    title = "Hardest sites, dB of each step (left out where a site's meaning moved)"
    table = Table(title=title, title_justify="left")
    table.add_column("site", no_wrap=True)
    for version in versions:
        table.add_column(escape(version), justify="right")
    for site, found in cells:
        table.add_row(short_name(site), *(decibels(one).removesuffix(" dB") for one in found))
    return table
