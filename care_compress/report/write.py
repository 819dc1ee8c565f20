"""The report of a run: ``report.html`` and ``report.md`` in its directory.

Everything comes from files that the run, compare and the boards left; what is not there becomes a
sentence that says which command makes it.
"""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from care_compress.finished import as_written
from care_compress.report import cost, inside, ladder, notes, record, scores, speed, verdict
from care_compress.report.document import as_markdown
from care_compress.report.evidence import gather
from care_compress.report.page import as_html
from care_compress.report.sources import read_results, read_sources
from care_compress.run import write_text

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
