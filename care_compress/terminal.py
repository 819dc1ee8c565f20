r"""What may be shown: names and messages come from files, and a terminal obeys control characters.

A class called ``\x1b[2J`` is shown by these letters and clears nothing; ``[bold]`` is made no
markup where it is printed (`rich.markup.escape`, ``markup=False``).
"""

import unicodedata
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.measure import Measurement
from rich.segment import Segment

LONGEST = 200  # letters of something foreign inside a message
_CONTROLS = frozenset({"Cc", "Cs", "Zl", "Zp"})  # with halves of characters and line separators
# What turns the direction of writing: a name could end in .png and show another ending.
_TURNING = frozenset({"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"})


def visible(text: str) -> str:
    """The text with an escape for everything that a terminal would obey; lines stay lines."""
    if text.isprintable():
        return text
    return "".join(letter if _is_shown(letter) else _escape(letter) for letter in text)


def one_line(text: str) -> str:
    """The text as it is shown, without its line breaks."""
    return visible(" ".join(text.split()))


def shortened(text: str, most: int = LONGEST) -> str:
    """The beginning of a text that may be a whole file."""
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} letters)"


def _is_shown(letter: str) -> bool:
    if letter == "\n":
        return True
    controls = unicodedata.category(letter) in _CONTROLS
    return not controls and unicodedata.bidirectional(letter) not in _TURNING


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


class Terminal(Console):
    """The console of every verb: whatever is printed, only its own control characters are sent."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(emoji=False, **settings)  # a class may be called :bomb:
        self.push_render_hook(_Visible())


class _Visible(RenderHook):
    """Rich asks this about everything before it is drawn."""

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(one) for one in renderables]


class _Shown:
    """Something to print, drawn by its own rules and then made visible."""

    def __init__(self, inner: ConsoleRenderable) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._segments(console, options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self.inner)

    def _segments(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.inner, options):
            if segment.control:  # rich's own: moving the cursor of a progress bar
                yield segment
            else:
                yield Segment(visible(segment.text), segment.style)
