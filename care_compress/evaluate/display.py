"""How evaluation shows itself on the console."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


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
