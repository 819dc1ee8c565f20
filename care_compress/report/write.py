"""The report of a run: ``report.html`` and ``report.md`` in its directory.

Everything comes from files that the run, compare and the boards left; what is not there becomes a
sentence that says which command makes it.
"""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from care_compress.files import write_text
from care_compress.report import accuracy as scores
from care_compress.report import fidelity as ladder
from care_compress.report import latency as speed
from care_compress.report import layers as inside
from care_compress.report import plan as record
from care_compress.report import size as cost
from care_compress.report import summary as notes
from care_compress.report import summary as verdict
from care_compress.report.evidence import gather
from care_compress.report.render import as_html, as_markdown
from care_compress.report.sources import read_results, read_sources
from care_compress.run.finished import as_written

SECTIONS = (
    verdict.verdict,
    notes.checks,
    scores.accuracy,
    speed.latency,
    cost.size,
    ladder.fidelity,
    inside.layers,
    inside.histograms,
    inside.changes,
    inside.training,
    record.plan,
    record.exports,
    record.manifest,
)


def write_report(run_dir: Path, console: Console) -> tuple[Path, Path]:
    """Write both files and say where; equal files, equal bytes."""
    results = read_results(run_dir)
    page, text = run_dir / "report.html", run_dir / "report.md"
    with as_written(run_dir):
        sources = read_sources(run_dir, results, gather(run_dir, results, console))
        sections = [section(sources) for section in SECTIONS]
        html, markdown = as_html(sources, sections), as_markdown(sources, sections)
    write_text(page, html)
    write_text(text, markdown)
    console.print(f"report: {escape(str(page))}", soft_wrap=True)
    return page, text
