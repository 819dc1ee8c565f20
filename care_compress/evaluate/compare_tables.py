"""A comparison on the console."""

from typing import Any

from rich.markup import escape
from rich.table import Table


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
