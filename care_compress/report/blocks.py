"""What a report is made of; HTML and Markdown are both written from these blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup

Tone = Literal["plain", "good", "bad", "missing"]
Plain = str | int | float | bool | None


@dataclass(frozen=True)
class Text:
    """A sentence or more; ``missing`` says what was not measured, and which command does it."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Tile:
    """One figure that should be seen first."""

    label: str
    value: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Tiles:
    """Figures side by side."""

    tiles: tuple[Tile, ...]


@dataclass(frozen=True)
class Cell:
    """What a table shows, and what its column is sorted by."""

    text: str
    key: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows under a caption; ``numeric`` names the columns that are set and sorted as numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    numeric: tuple[str, ...] = ()
    tall: bool = False  # scrolls in a box of its own


@dataclass(frozen=True)
class Legend:
    """One kind of mark in a picture."""

    mark: Markup
    label: str


@dataclass(frozen=True)
class Picture:
    """One drawing; ``told`` says in words what it shows, for who does not see it."""

    drawing: Markup
    told: str
    title: str = ""


@dataclass(frozen=True)
class Figure:
    """Drawings of one kind under one caption."""

    pictures: tuple[Picture, ...]
    caption: str
    legend: tuple[Legend, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Photo:
    """A flipped image."""

    picture: str  # data URI
    name: str
    label: str
    before: str
    after: str
    verdict: str
    tone: Tone


@dataclass(frozen=True)
class Gallery:
    """Images under a caption."""

    caption: str
    photos: tuple[Photo, ...]


Block = Text | Tiles | Table | Figure | Gallery


@dataclass
class PageSection:
    """A heading and what stands under it."""

    anchor: str
    title: str
    blocks: list[Block] = field(default_factory=list)


def missing(text: str) -> Text:
    """What was not measured."""
    return Text(text, "missing")


def number(value: float | None, digits: int = 2, unit: str = "") -> Cell:
    """A figure as a cell; empty where there is none."""
    if value is None:
        return Cell("")
    return Cell(f"{value:,.{digits}f}{unit}", float(value))


def interval(ends: Sequence[float]) -> str:
    """``[0.02, 0.22]``."""
    return f"[{ends[0]:.2f}, {ends[1]:.2f}]"


def megabytes(size: float | None) -> Cell:
    """A size in bytes as a cell."""
    return Cell("") if size is None else Cell(f"{size / 1e6:.2f} MB", float(size))
