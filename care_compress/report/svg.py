"""Drawings that fit any width: positions across in percent, heights and letters in pixels.

A drawing scaled to a phone would have letters nobody can read. Here only the marks move; colours
are classes of the page's style, so that light and dark are one drawing.
"""

from typing import Literal

from markupsafe import Markup, escape

NAME = 0.66  # of the width, for the names of rows
Anchor = Literal["start", "middle", "end"]
# A shape beside each colour: who cannot tell two colours can tell these.
MARKS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "triangle": "M0 -5.5L5.2 4H-5.2z",
    "square": "M-4 -4h8v8h-8z",
    "right": "M-9 -5L0 0L-9 5z",
    "diamond": "M0 -5.6L5.6 0L0 5.6L-5.6 0z",
}


class Drawing:
    """An inline SVG of some height; `across` values run from 0 to 1."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """A straight line."""
        self.parts.append(
            f'<line class="{kind}" x1="{_at(x1)}" y1="{y1:g}" x2="{_at(x2)}" y2="{y2:g}"/>'
        )

    def bar(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """A filled rectangle."""
        self.parts.append(
            f'<rect class="{kind}" x="{_at(x)}" y="{y:g}" width="{_at(max(0.0, width))}" '
            f'height="{height:g}"/>'
        )

    def text(
        self, x: float, y: float, text: str, anchor: Anchor = "start", kind: str = "label"
    ) -> None:
        """Letters of the page's size."""
        self.parts.append(
            f'<text class="{kind}" x="{_at(x)}" y="{y:g}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )

    def name(self, y: float, text: str) -> None:
        """Letters at the left that end where a figure at the right begins, however long."""
        self.parts.append(
            f'<svg y="{y - 14:g}" width="{_at(NAME)}" height="19"><title>{escape(text)}</title>'
            f'<text class="label" y="14">{escape(text)}</text></svg>'
        )

    def mark(self, shape: str, x: float, y: float, kind: str, told: str = "") -> None:
        """A small shape; `told` appears when it is pointed at."""
        title = f"<title>{escape(told)}</title>" if told else ""
        self.parts.append(
            f'<svg x="{_at(x)}" y="{y:g}" overflow="visible">'
            f'<path class="{kind}" d="{MARKS[shape]}">{title}</path></svg>'
        )

    def markup(self, told: str) -> Markup:
        """The drawing; `told` is its text alternative."""
        return Markup(  # nosec B704 # every text in it went through escape
            f'<svg class="plot" role="img" width="100%" height="{self.height}" '
            f'aria-label="{escape(told)}">{"".join(self.parts)}</svg>'
        )


def legend_mark(shape: str, kind: str) -> Markup:
    """A mark as it stands in a legend."""
    return Markup(  # nosec B704 # as above
        '<svg class="key" width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true">'
        f'<path class="{escape(kind)}" d="{MARKS[shape]}"/></svg>'
    )


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round values from `low` to `high`, about `wanted` of them."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10.0 ** _floor_log10(span / wanted)
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= wanted + 0.5)
    first = -int(-low // step)
    return [step * index for index in range(first, first + wanted + 2) if step * index <= high]


def _floor_log10(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def _at(part: float) -> str:
    return f"{100 * part:.2f}%"
