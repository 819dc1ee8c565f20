"""The report of a run: ``report.html`` and ``report.md`` in its directory.

Everything comes from files that the run, compare and the devices left; what is not there becomes a
sentence that says which command makes it. The page loads nothing: everything from files goes
through the template's escaping, and beside it a content security policy names the page's own script
and style by their digests, so that nothing else could run.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape

from care_compress.evaluate.evidence import gather
from care_compress.files import write_text
from care_compress.report import accuracy, latency, layers, plan, size, slim, summary
from care_compress.report.blocks import (
    Block,
    Figure,
    PageSection,
    SideBySide,
    Table,
    Text,
    Tiles,
)
from care_compress.report.sources import Sources, read_results, read_sources
from care_compress.run.finished import as_written

HERE = Path(__file__).resolve().parent
LONG = 48  # letters, above which a cell may break its line
# What Markdown or the HTML inside it would read as more than letters.
SPECIAL = re.compile(r"([\\`*_{}\[\]#|~])")
HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
SECTIONS = (
    ("verdict", "Verdict", summary.verdict),
    ("checks", "What to know about these numbers", summary.checks),
    ("slim", "What was cut, and what it cost", slim.slim),
    ("accuracy", "Accuracy", accuracy.accuracy),
    ("latency", "Latency", latency.latency),
    ("size", "Size and energy", size.size),
    ("fidelity", "From float to file, version by version", accuracy.fidelity),
    ("layers", "Layers", layers.layers),
    ("activations", "Activations of the hardest layers", layers.histograms),
    ("answers", "Answers that changed", layers.changes),
    ("training", "Training curves", layers.training),
    ("plan", "Plan", plan.plan),
    ("exports", "Exports", plan.exports),
    ("manifest", "Manifest", plan.manifest),
)


def write_report(run_dir: Path, console: Console) -> tuple[Path, Path]:
    """Write both files and say where; equal sources make equal bytes."""
    results = read_results(run_dir)
    page, text = run_dir / "report.html", run_dir / "report.md"
    with as_written(run_dir):
        sources = read_sources(run_dir, results, gather(run_dir, results, console))
        made = [PageSection(anchor, title, of(sources)) for anchor, title, of in SECTIONS]
        sections = [section for section in made if section.blocks]
        html, markdown = as_html(sources, sections), as_markdown(sources, sections)
    write_text(page, html)
    write_text(text, markdown)
    console.print(f"report: {escape(str(page))}", soft_wrap=True)
    return page, text


def as_html(sources: Sources, sections: Sequence[PageSection]) -> str:
    """Write the page of a run."""
    precision, recipe = sources.results["precision"].upper(), sources.results["recipe"]
    return page_html(
        sources.name,
        f"care-compress report, {precision}, recipe {recipe}",
        sources.recipe.get("claim", ""),
        sections,
        f"the run {sources.name}",
    )


def page_html(
    title: str, kicker: str, claim: str, sections: Sequence[PageSection], written_from: str
) -> str:
    """Write a whole page of sections; it loads nothing, and nothing but its own script runs."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return environment.get_template("page.html.j2").render(
        title=title,
        kicker=kicker,
        claim=claim,
        sections=sections,
        written_from=written_from,
        style=Markup(style),  # nosec B704 # our own
        style_hash=_digest(style),
        script=Markup(script),  # nosec B704 # our own
        script_hash=_digest(script),
        kind_of=lambda block: type(block).__name__,
        long=LONG,
    )


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def as_markdown(sources: Sources, sections: Sequence[PageSection]) -> str:
    """Write the whole document."""
    lines = [f"# {plain(sources.name)}", ""]
    if claim := sources.recipe.get("claim"):
        lines += [plain(claim), ""]
    for section in sections:
        lines += [f"## {plain(section.title)}", ""]
        for block in section.blocks:
            lines += [*_lines(block), ""]
    return "\n".join(lines).rstrip() + "\n"


def plain(text: str) -> str:
    """Escape text so that Markdown shows it as it is, on one line."""
    one_line = " ".join(text.split())
    safe = "".join(HTML.get(letter, letter) for letter in one_line)
    return SPECIAL.sub(r"\\\1", safe)


def _lines(block: Block) -> list[str]:
    if isinstance(block, Text):
        return [f"> {plain(block.text)}" if block.tone == "missing" else plain(block.text)]
    if isinstance(block, Tiles):
        tiles = [(tile.label, tile.value, tile.note) for tile in block.tiles]
        return _table(("figure", "value", "note"), tiles)
    if isinstance(block, Figure):
        told = [
            f"- {plain(f'{picture.title}: ' if picture.title else '')}{plain(picture.told)}"
            for picture in block.pictures
        ]
        return [f"{plain(block.caption)}:", "", *told]
    columns: Sequence[str]
    if isinstance(block, SideBySide):
        return [
            f"{plain(block.caption)}:",
            "",
            *(f"- {plain(one.name)}: {plain(one.note)}" for one in block.images),
        ]
    if isinstance(block, Table):
        columns, rows = block.columns, [[cell.text for cell in row] for row in block.rows]
    else:
        columns = ("image", "label", "float", "quantized", "result")
        rows = [[one.name, one.label, one.before, one.after, one.verdict] for one in block.photos]
    return [f"**{plain(block.caption)}**", "", *_table(columns, rows)]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(map(plain, cells)) + " |"

    return [line(columns), "|" + " --- |" * len(columns), *map(line, rows)]
