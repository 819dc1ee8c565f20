"""Results as tables on the console."""

from collections.abc import Sequence

from rich.table import Table

from care_compress.evaluate.paired import Paired
from care_compress.model.rewrite import RewriteStep


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
