"""What is under way and how long it still takes, on the console."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from care_compress.terminal import visible

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
        status.update(escape(visible(step)))  # a step names files
        if not console.is_terminal and time.monotonic() - last >= PLAIN_LINE_SECONDS:
            last = time.monotonic()
            console.print(step, markup=False, highlight=False)

    with console.status("") as status:
        yield show
