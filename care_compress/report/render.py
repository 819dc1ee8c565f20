"""Blocks as one HTML page that loads nothing.

Everything from files goes through the template's escaping. Beside it a content security policy
names the page's own script and style by their digests, so that nothing else could run.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from care_compress.report.blocks import (
    Block,
    Cell,
    Figure,
    Gallery,
    PageSection,
    Table,
    Text,
    Tiles,
)
from care_compress.report.sources import Sources

HERE = Path(__file__).resolve().parent
LONG = 48  # letters, above which a cell may break its line


def as_html(sources: Sources, sections: Sequence[PageSection]) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (_own(name) for name in ("page.css", "page.js"))
    return environment.get_template("page.html.j2").render(
        title=sources.name,
        recipe=sources.results["recipe"],
        precision=sources.results["precision"].upper(),
        claim=sources.recipe.get("claim", ""),
        sections=sections,
        style=style,
        style_hash=_digest(style),
        script=script,
        script_hash=_digest(script),
        kind_of=_kind_of,
        cell_class=_cell_class,
    )


def _own(name: str) -> Markup:
    text = (HERE / name).read_text(encoding="utf-8")
    return Markup(text)  # nosec B704 # our own


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _kind_of(block: Block) -> str:
    return type(block).__name__


def _cell_class(cell: Cell, numeric: bool) -> Markup:
    if numeric:
        return Markup(' class="number"')
    return Markup(' class="long"') if len(cell.text) > LONG else Markup("")


# What Markdown or the HTML inside it would read as more than letters.
_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def as_markdown(sources: Sources, sections: Sequence[PageSection]) -> str:
    """The whole document."""
    lines = [f"# {plain(sources.name)}", ""]
    if claim := sources.recipe.get("claim"):
        lines += [plain(claim), ""]
    for section in sections:
        lines += [f"## {plain(section.title)}", ""]
        for block in section.blocks:
            lines += [*_lines(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    one_line = " ".join(text.split())
    safe = "".join(_HTML.get(letter, letter) for letter in one_line)
    return _SPECIAL.sub(r"\\\1", safe)


def _lines(block: Block) -> list[str]:
    if isinstance(block, Text):
        return [f"> {plain(block.text)}" if block.tone == "missing" else plain(block.text)]
    if isinstance(block, Tiles):
        tiles = [(tile.label, tile.value, tile.note) for tile in block.tiles]
        return _table(("figure", "value", "note"), tiles)
    if isinstance(block, Table):
        rows = [tuple(cell.text for cell in row) for row in block.rows]
        return [f"**{plain(block.caption)}**", "", *_table(block.columns, rows)]
    if isinstance(block, Figure):
        told = [
            f"- {plain(f'{picture.title}: ' if picture.title else '')}{plain(picture.told)}"
            for picture in block.pictures
        ]
        return [f"{plain(block.caption)}:", "", *told]
    return _gallery(block)


def _gallery(block: Gallery) -> list[str]:
    rows = [
        (photo.name, photo.label, photo.before, photo.after, photo.verdict)
        for photo in block.photos
    ]
    columns = ("image", "label", "float", "quantized", "result")
    return [f"**{plain(block.caption)}**", "", *_table(columns, rows)]


def _table(columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> list[str]:
    head = [_row(columns), "|" + " --- |" * len(columns)]
    return head + [_row(row) for row in rows]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(plain(cell) for cell in cells) + " |"
