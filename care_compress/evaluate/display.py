"""How evaluation shows itself on the console."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from care_compress.model.rewrite import RewriteStep


@contextlib.contextmanager
def evaluation_progress(console: Console, images: int) -> Iterator[Callable[[int], None]]:
    """A bar over images in a terminal, nothing elsewhere; yields what advances it."""
    bar = Progress(
        TextColumn("evaluating"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=images)
        yield lambda done: bar.advance(task, done)


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
