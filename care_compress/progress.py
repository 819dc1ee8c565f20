"""What is under way and how long it still takes, on the console."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_LINE_SECONDS = 15.0  # between lines where there is no terminal


@contextlib.contextmanager
def progress_bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar in a terminal, nothing elsewhere; yields what advances it."""
    bar = Progress(
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)


@contextlib.contextmanager
def step_line(console: Console) -> Iterator[Callable[[str], None]]:
    """Names the step under way: beside a spinner in a terminal, now and then a line elsewhere."""
    last = time.monotonic()

    def show(step: str) -> None:
        nonlocal last
        status.update(step)
        if not console.is_terminal and time.monotonic() - last >= PLAIN_LINE_SECONDS:
            last = time.monotonic()
            console.print(step)

    with console.status("") as status:
        yield show
