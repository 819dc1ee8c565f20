r"""What may be shown: names and messages come from files, and a terminal obeys control characters.

A class called ``\x1b[2J`` is shown by these letters and clears nothing; ``[bold]`` is made no
markup where it is printed (`rich.markup.escape`, ``markup=False``).
"""

import contextlib
import time
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape as escape_html
from typing import Any, Literal

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment

LONGEST = 200  # letters of something foreign inside a message
SHOWN = 3  # items on the console
LISTED = 100  # items in results.json; their count is always there
PLAIN_LINE_SECONDS = 15.0  # between lines where there is no terminal
_CONTROLS = frozenset({"Cc", "Cs", "Zl", "Zp"})  # with halves of characters and line separators
# What turns the direction of writing: a name could end in .png and show another ending.
_TURNING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def visible(text: str) -> str:
    """The text with an escape for everything that a terminal would obey; lines stay lines."""
    if text.isprintable():
        return text
    shown = []
    for letter in text:
        turning = unicodedata.bidirectional(letter) in _TURNING
        if letter != "\n" and (turning or unicodedata.category(letter) in _CONTROLS):
            letter = letter.encode("unicode_escape", "surrogatepass").decode("ascii")
        shown.append(letter)
    return "".join(shown)


def one_line(text: str) -> str:
    """The text as it is shown, without its line breaks."""
    return visible(" ".join(text.split()))


def shortened(text: str, most: int = LONGEST) -> str:
    """The beginning of a text that may be a whole file."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} letters)"


class Terminal(Console):
    """The console of every verb: whatever is printed, only its own control characters are sent."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(emoji=False, **settings)  # a class may be called :bomb:
        self.push_render_hook(_Visible())


def say(text: str, console: Console) -> None:
    """Print one line as it is: names in it come from files and are no markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def widened(console: Console, width: int) -> Terminal:
    """The same console, at least so wide: names in a table must be whole in a narrow terminal."""
    return Terminal(file=console.file, width=max(console.width, width), quiet=console.quiet)


class _Visible(RenderHook):
    """Rich asks this about everything before it is drawn."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(one) for one in renderables]


class _Shown:
    """Something to print, drawn by its own rules and then made visible."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self.inner, options):
            # A control is rich's own: moving the cursor of a progress bar.
            yield segment if segment.control else Segment(visible(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self.inner)


@dataclass(frozen=True)
class CheckResult:
    """What one check of a run's numbers found.

    A check that found nothing is told, too, and so is one that could not be made, with its reason:
    silence would pass for "fine".
    """

    check: str  # saturated ranges
    status: Literal["fine", "warning", "not measured"]
    text: str  # one sentence
    items: tuple[str, ...] = ()  # what it is about, worst first

    def __str__(self) -> str:
        """One line for a console."""
        more = len(self.items) - SHOWN
        shown = [*self.items[:SHOWN], *([f"and {more:,} more"] if more > 0 else [])]
        return f"{self.check}: {self.text}" + (f" ({listed(shown)})" if shown else "")

    def as_json(self) -> dict[str, Any]:
        """Return the result as ``results.json`` holds it."""
        items = list(self.items[:LISTED])
        return {**asdict(self), "items": items, "count": len(self.items)}


def html_table(rows: Sequence[tuple[str, str]]) -> str:
    """Name and text of each row as a notebook shows them; nothing in them is read as HTML."""
    cells = "".join(f"<tr><th>{escape_html(a)}</th><td>{escape_html(b)}</td></tr>" for a, b in rows)
    return f"<table>{cells}</table>"


def listed(items: Sequence[str]) -> str:
    """Items in one line; those that are sentences have commas of their own."""
    return ("; " if any("," in item for item in items) else ", ").join(items)


def show_checks(checks: Sequence[CheckResult], console: Console) -> None:
    """Print the warnings; what is fine stands in the results."""
    for check in checks:
        if check.status == "warning":
            console.print("[yellow]take note[/]: ", end="")
            say(str(check), console)


@contextlib.contextmanager
def progress_bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar in a terminal and nothing elsewhere; yield what advances it."""
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
    """Yield what names the step under way: beside a spinner, or now and then in a plain line."""
    last = time.monotonic()

    def show(step: str) -> None:
        nonlocal last
        status.update(escape(visible(step)))  # a step names files
        if not console.is_terminal and time.monotonic() - last >= PLAIN_LINE_SECONDS:
            last = time.monotonic()
            say(step, console)

    with console.status("") as status:
        yield show
