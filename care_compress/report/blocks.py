"""What a report is made of; HTML and Markdown are both written from these blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from markupsafe import Markup

Tone = Literal["plain", "good", "bad", "missing"]


@dataclass(frozen=True)
class Text:
    """A sentence or more; ``missing`` says what was not measured, and which command does it."""

    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Tile:
    """One value that should be seen first."""

    label: str
    value: str
    note: str = ""
    tone: Tone = "plain"


@dataclass(frozen=True)
class Tiles:
    """Values side by side."""

    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Cell:
    """What a table shows, and what its column is sorted by."""

    text: str
    key: float | None = None
    numeric: bool = False  # its column is set and sorted as numbers


Row = Mapping[str, Cell | str]  # by the names of the columns


@dataclass(frozen=True)
class Table:
    """Rows under a caption, as `table` makes them."""

    caption: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    numeric: frozenset[str]
    tall: bool = False  # scrolls in a box of its own


@dataclass(frozen=True)
class Picture:
    """One drawing; ``told`` says in words what it shows, for who does not see it."""

    drawing: Markup
    told: str
    title: str = ""


@dataclass(frozen=True)
class Figure:
    """Drawings of one kind under one caption."""

    pictures: Sequence[Picture]
    caption: str
    legend: Mapping[str, Markup] = field(default_factory=dict)  # what a mark means -> the mark
    note: str = ""


@dataclass(frozen=True)
class Photo:
    """An image whose answer changed, with both answers."""

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
    photos: Sequence[Photo]


@dataclass(frozen=True)
class Panel:
    """One of the pictures of an image."""

    label: str
    picture: str  # data URI
    told: str


@dataclass(frozen=True)
class Panels:
    """Pictures of one image, to be compared."""

    name: str
    note: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class SideBySide:
    """Images, each with its answers drawn on it."""

    caption: str
    images: Sequence[Panels]
    legend: Mapping[str, Markup]
    note: str = ""


Block = Text | Tiles | Table | Figure | Gallery | SideBySide


@dataclass(frozen=True)
class PageSection:
    """A heading and what stands under it."""

    anchor: str
    title: str
    blocks: Sequence[Block]


def table(caption: str, rows: Sequence[Row], tall: bool = False) -> list[Table]:
    """Make a table of rows that all have the same columns; without rows there is none."""
    if not rows:
        return []
    columns = tuple(rows[0])
    cells = [
        tuple(one if isinstance(one := row[column], Cell) else Cell(one) for column in columns)
        for row in rows
    ]
    numeric = {
        column for row in cells for column, one in zip(columns, row, strict=True) if one.numeric
    }
    return [Table(caption, columns, cells, frozenset(numeric), tall)]


def missing(text: str) -> Text:
    """Say what was not measured."""
    return Text(text, "missing")


def number(value: float | None, digits: int = 2) -> Cell:
    """Make a cell of a number; empty where there is none."""
    if value is None:
        return Cell("", numeric=True)
    return Cell(f"{value:,.{digits}f}", float(value), numeric=True)


def percent(share: float | None, digits: int = 1) -> Cell:
    """Make a cell of a share from 0 to 1, in percent."""
    return number(None if share is None else 100 * share, digits)


def megabytes(size: float) -> Cell:
    """Make a cell of a size in bytes."""
    return Cell(f"{size / 1e6:.2f} MB", float(size), numeric=True)


def titled(name: str) -> str:
    """Begin a label with a capital letter, where a name has none of its own."""
    return name[:1].upper() + name[1:] if name.islower() else name


def interval(ends: Sequence[float] | None) -> str:
    """Write both ends as ``[0.02, 0.22]``; nothing where there is no interval."""
    return f"[{ends[0]:.2f}, {ends[1]:.2f}]" if ends else ""
