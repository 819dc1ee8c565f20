"""The report's drawings, which fit any width: positions across in percent, the rest in pixels.

A drawing scaled to a phone would have letters nobody can read. Here only the marks move; colours
are classes of the page's style, so that light and dark are one drawing. matplotlib draws the files
that stand alone (`quantize.plots`), not these: its size and colours are fixed, and the page's
content security policy refuses the style attributes that it writes on every mark.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

NAME = 0.66  # of the width, for the names of rows
LEFT, RIGHT = 0.085, 0.985  # of the width; values of an axis stand left of it
ROW = 46
FARTHEST = 2.0  # times the longest bar, where whiskers are cut
NAMED = 0.05  # part of the width, below which a name would run into the next
Anchor = Literal["start", "middle", "end"]
# A shape beside each colour: who cannot tell two colours can tell these.
MARKS = {
    "circle": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0z",
    "triangle": "M0 -5.5L5.2 4H-5.2z",
    "square": "M-4 -4h8v8h-8z",
    "right": "M-9 -5L0 0L-9 5z",
    "diamond": "M0 -5.6L5.6 0L0 5.6L-5.6 0z",
}
SERIES = (("circle", "s0"), ("square", "s1"), ("triangle", "s2"), ("diamond", "s3"))


class Drawing:
    """An inline SVG of some height; `across` values run from 0 to 1."""

    def __init__(self, height: int) -> None:
        self.height = height
        self.parts: list[str] = []

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        """Add a straight line."""
        self.parts.append(
            f'<line class="{kind}" x1="{_at(x1)}" y1="{y1:g}" x2="{_at(x2)}" y2="{y2:g}"/>'
        )

    def bar(self, x: float, y: float, width: float, height: float, kind: str) -> None:
        """Add a filled rectangle."""
        self.parts.append(
            f'<rect class="{kind}" x="{_at(x)}" y="{y:g}" width="{_at(max(0.0, width))}" '
            f'height="{height:g}"/>'
        )

    def text(
        self, x: float, y: float, text: str, anchor: Anchor = "start", kind: str = "label"
    ) -> None:
        """Add letters of the page's size."""
        self.parts.append(
            f'<text class="{kind}" x="{_at(x)}" y="{y:g}" text-anchor="{anchor}">'
            f"{escape(text)}</text>"
        )

    def name(self, y: float, text: str) -> None:
        """Add letters at the left that end where a value at the right begins, however long."""
        self.parts.append(
            f'<svg y="{y - 14:g}" width="{_at(NAME)}" height="19"><title>{escape(text)}</title>'
            f'<text class="label" y="14">{escape(text)}</text></svg>'
        )

    def mark(self, shape: str, x: float, y: float, kind: str, told: str = "") -> None:
        """Add a small shape; `told` appears when it is pointed at."""
        title = f"<title>{escape(told)}</title>" if told else ""
        self.parts.append(
            f'<svg x="{_at(x)}" y="{y:g}" overflow="visible">'
            f'<path class="{kind}" d="{MARKS[shape]}">{title}</path></svg>'
        )

    def markup(self, told: str) -> Markup:
        """Return the drawing; `told` is its text alternative."""
        return Markup(  # nosec B704 # every text in it went through escape
            f'<svg class="plot" role="img" width="100%" height="{self.height}" '
            f'aria-label="{escape(told)}">{"".join(self.parts)}</svg>'
        )


def legend_mark(shape: str, kind: str) -> Markup:
    """Draw a mark as it stands in a legend."""
    return Markup(  # nosec B704 # as above
        '<svg class="key" width="14" height="14" viewBox="-7 -7 14 14" aria-hidden="true">'
        f'<path class="{escape(kind)}" d="{MARKS[shape]}"/></svg>'
    )


def ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Choose round values from `low` to `high`, about `wanted` of them."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10.0 ** int(f"{span / wanted:e}".partition("e")[2])
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= wanted + 0.5)
    first = -int(-low // step)
    return [step * index for index in range(first, first + wanted + 2) if step * index <= high]


def _at(part: float) -> str:
    return f"{100 * part:.2f}%"


@dataclass(frozen=True)
class Labelled:
    """A value under its label; `marks` are percentiles above it, or the ends of its interval."""

    label: str
    value: float
    text: str
    series: int
    marks: tuple[float, ...] = ()


def bars(rows: Sequence[Labelled], told: str, longest: float = 0.0) -> Markup:
    """Draw horizontal bars from zero to `longest` or further, each under its own label."""
    drawing = Drawing(ROW * len(rows))
    farthest = max([longest, 1e-12, *(max(row.value, *row.marks, 0) for row in rows)])
    # On a busy machine p99 is many times p50, and would leave no bar to be seen.
    longest = min(farthest, FARTHEST * max([longest, 1e-12, *(row.value for row in rows)]))
    for index, row in enumerate(rows):
        top, reach = ROW * index, 0.985 / longest
        drawing.name(top + 14, row.label)
        drawing.text(1, top + 14, row.text, "end", "figure")
        drawing.bar(0, top + 21, 1, 14, "track")
        drawing.bar(0, top + 21, row.value * reach, 14, f"s{row.series % len(SERIES)}")
        if row.marks:
            end = min(1.0, max(row.marks) * reach)
            drawing.line(row.value * reach, top + 28, end, top + 28, "whisker")
            if max(row.marks) > longest:
                drawing.mark("right", 1, top + 28, "arrow", f"goes on to {max(row.marks):.3g}")
        for mark in row.marks:
            if mark <= longest:
                drawing.line(mark * reach, top + 23, mark * reach, top + 33, "whisker")
    return drawing.markup(told)


def spans(rows: Sequence[Labelled], told: str) -> Markup:
    """Draw estimates with their intervals on one axis, each under its own label."""
    drawing = Drawing(ROW * len(rows) + 22)
    low, high = min(min(row.marks) for row in rows), max(max(row.marks) for row in rows)
    room = max(high - low, 1e-9) * 0.06
    low, high = low - room, high + room

    def at(value: float) -> float:
        return (value - low) / (high - low)

    bottom = ROW * len(rows)
    for tick in ticks(low, high):
        if 0.05 < at(tick) < 0.95:  # its value would stick out
            drawing.line(at(tick), 0, at(tick), bottom, "grid")
            drawing.text(at(tick), bottom + 16, f"{tick:g} %", "middle", "axis")
    for index, row in enumerate(rows):
        top = ROW * index
        shape, kind = SERIES[row.series % len(SERIES)]
        drawing.name(top + 14, row.label)
        drawing.text(1, top + 14, row.text, "end", "figure")
        drawing.line(at(min(row.marks)), top + 30, at(max(row.marks)), top + 30, "whisker")
        for end in row.marks:
            drawing.line(at(end), top + 25, at(end), top + 35, "whisker")
        drawing.mark(shape, at(row.value), top + 30, kind, f"{row.label}: {row.text}")
    return drawing.markup(told)


def dots(rows: Sequence[Labelled], unit: str, told: str) -> Markup:
    """Draw one mark for each row from left to right; a line where the next label begins."""
    height, top, bottom = 270, 34, 262
    low, high = min(row.value for row in rows), max(row.value for row in rows)
    room = max(high - low, 1.0) * 0.08
    drawing = Drawing(height)
    up = _axis(drawing, low - room, high + room, top, bottom, unit)
    labels = [row.label for row in rows]
    places = [LEFT + (RIGHT - LEFT) * (index + 0.5) / len(rows) for index in range(len(rows))]
    for index, label in enumerate(labels):
        if index and labels[index - 1] == label:
            continue
        edge = places[index] - 0.5 * (RIGHT - LEFT) / len(rows)
        drawing.line(edge, top - 12, edge, bottom, "edge")
        if labels.count(label) / len(labels) > NAMED:
            drawing.text(edge + 0.008, top - 4, label, "start", "axis")
    for place, row in zip(places, rows, strict=True):
        shape, kind = SERIES[row.series % len(SERIES)]
        drawing.mark(shape, place, up(row.value), kind, row.text)
    return drawing.markup(told)


def curve(points: Sequence[tuple[float, float]], baseline: float | None, told: str) -> Markup:
    """Draw a rising or falling line; `baseline` is a dashed one across."""
    height, top, bottom = 220, 26, 194
    values = [y for _, y in points] + ([] if baseline is None else [baseline])
    low, high = min(values), max(values)
    room = max(high - low, 0.2) * 0.12
    drawing = Drawing(height)
    up = _axis(drawing, low - room, high + room, top, bottom, "%")
    last = max(x for x, _ in points)

    def across(epoch: float) -> float:
        return LEFT + 0.02 + (RIGHT - LEFT - 0.04) * (epoch / last if last else 0.0)

    if baseline is not None:
        drawing.line(LEFT, up(baseline), RIGHT, up(baseline), "dashed")
    placed = [(across(epoch), up(value)) for epoch, value in points]
    for first, second in itertools.pairwise(placed):
        drawing.line(*first, *second, "curve")
    for (x, y), (epoch, value) in zip(placed, points, strict=True):
        drawing.mark("circle", x, y, "s0", f"epoch {epoch:g}: {value:.2f} %")
    for tick in ticks(0, last):
        drawing.text(across(tick), height - 8, f"{tick:g}", "middle", "axis")
    return drawing.markup(told)


@dataclass(frozen=True)
class Point:
    """A value over another, with its name beside it."""

    label: str
    x: float
    y: float
    series: int


def scatter(points: Sequence[Point], units: tuple[str, str], told: str) -> Markup:
    """Draw points over two axes, each with its name."""
    height, top, bottom = 300, 30, 252
    values = [point.y for point in points]
    room = max(max(values) - min(values), 0.5) * 0.15
    drawing = Drawing(height)
    up = _axis(drawing, min(values) - room, max(values) + room, top, bottom, units[1])
    farthest = max(point.x for point in points) * 1.1

    def across(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * x / farthest

    for tick in ticks(0, farthest):
        drawing.text(across(tick), bottom + 18, f"{tick:g}", "middle", "axis")
    drawing.text(RIGHT, bottom + 38, units[0], "end", "axis")
    for point in points:
        shape, kind = SERIES[point.series % len(SERIES)]
        x, y = across(point.x), up(point.y)
        said = f"{point.label}: {point.x:.3g} {units[0]}, {point.y:.2f} {units[1]}"
        drawing.mark(shape, x, y, kind, said)
        # Letters at the right end would leave the drawing.
        if x > (LEFT + RIGHT) / 2:
            drawing.text(x - 0.015, y - 8, point.label, "end")
        else:
            drawing.text(x + 0.015, y - 8, point.label)
    return drawing.markup(told)


def front(
    points: Sequence[Point], best: Sequence[Point], units: tuple[str, str], told: str
) -> Markup:
    """Draw points over two axes as they lie; those of the front are joined by steps.

    Names appear when a point is pointed at: a thousand of them beside the marks would be a blot.
    """
    height, top, bottom = 320, 30, 272
    drawing = Drawing(height)
    values, costs = [point.y for point in points], [point.x for point in points]
    room = max(max(values) - min(values), 0.5) * 0.1
    up = _axis(drawing, min(values) - room, max(values) + room, top, bottom, units[1])
    margin = max((max(costs) - min(costs)) * 0.05, abs(max(costs)) * 0.02, 1e-9)
    low, high = min(costs) - margin, max(costs) + margin

    def across(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * (x - low) / (high - low)

    for tick in ticks(low, high):
        if tick >= low:
            drawing.text(across(tick), bottom + 18, f"{tick:g}", "middle", "axis")
    drawing.text(RIGHT, bottom + 38, units[0], "end", "axis")
    for first, second in itertools.pairwise(best):
        drawing.line(across(first.x), up(first.y), across(second.x), up(first.y), "curve")
        drawing.line(across(second.x), up(first.y), across(second.x), up(second.y), "curve")
    for point in points:
        shape, kind = SERIES[point.series % len(SERIES)]
        said = f"{point.label}: {point.x:.3g} {units[0]}, {point.y:.2f} {units[1]}"
        drawing.mark(shape, across(point.x), up(point.y), kind, said)
    return drawing.markup(told)


def _axis(
    drawing: Drawing, low: float, high: float, top: int, bottom: int, unit: str
) -> Callable[[float], float]:
    """Draw horizontal lines with their values, the unit above them; return a value's height."""

    def up(value: float) -> float:
        return round(bottom - (bottom - top) * (value - low) / (high - low), 2)

    drawing.text(0, 14, unit, "start", "axis")
    for tick in ticks(low, high):
        drawing.line(LEFT, up(tick), RIGHT, up(tick), "grid")
        drawing.text(LEFT - 0.012, up(tick) + 4, f"{tick:g}", "end", "axis")
    return up


def histogram(
    before: Sequence[int],
    after: Sequence[int],
    ends: tuple[float, float],
    chosen: tuple[float, float],
    told: str,
) -> Markup:
    """Draw bars before rounding, a line of steps after it, the chosen range as a bracket."""
    height, top, bottom = 190, 30, 160
    drawing = Drawing(height)
    # Logarithmic: what a range cuts off are the few values far out.
    highest = math.log10(1 + max([*before, *after, 1]))

    def at(value: float) -> float:
        return 0.01 + 0.98 * (value - ends[0]) / max(ends[1] - ends[0], 1e-12)

    def up(count: int) -> float:
        return bottom - (bottom - top) * math.log10(1 + count) / highest

    width = 0.98 / len(before)
    level = float(bottom)
    for index, (first, second) in enumerate(zip(before, after, strict=True)):
        x = 0.01 + width * index
        drawing.bar(x, up(first), width * 0.94, bottom - up(first), "before")
        drawing.line(x, level, x, up(second), "after")
        level = up(second)
        drawing.line(x, level, x + width, level, "after")
    drawing.line(0.01, bottom, 0.99, bottom, "axisline")
    low, high = at(chosen[0]), at(chosen[1])
    drawing.line(low, 20, high, 20, "range")
    for x in (low, high):
        drawing.line(x, 15, x, bottom, "range")
    drawing.text((low + high) / 2, 12, "chosen range", "middle", "axis")
    drawing.text(0.01, height - 12, f"{ends[0]:.3g}", "start", "axis")
    drawing.text(0.99, height - 12, f"{ends[1]:.3g}", "end", "axis")
    return drawing.markup(told)
