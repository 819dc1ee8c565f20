"""Blocks as Markdown: the same words and tables; a drawing becomes the sentence that tells it."""

import re
from collections.abc import Sequence

from care_compress.report.blocks import (
    Block,
    Figure,
    Gallery,
    Section,
    Table,
    Text,
    Tiles,
)
from care_compress.report.sources import Sources

# What Markdown or the HTML inside it would read as more than letters.
_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def as_markdown(sources: Sources, sections: Sequence[Section]) -> str:
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
