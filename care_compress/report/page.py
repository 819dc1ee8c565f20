"""Blocks as one HTML page that loads nothing.

Everything from files goes through the template's escaping. Beside it a content security policy
names the page's own script and style by their digests, so that nothing else could run.
"""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from care_compress.report.blocks import Block, Cell, Section
from care_compress.report.sources import Sources

HERE = Path(__file__).resolve().parent
LONG = 48  # letters, above which a cell may break its line


def as_html(sources: Sources, sections: Sequence[Section]) -> str:
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
