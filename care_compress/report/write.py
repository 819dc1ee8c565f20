"""The report of a run: ``report.html`` and ``report.md`` in its directory.

Everything comes from files that the run, compare and the boards left; what is not there becomes a
sentence that says which command makes it.
"""

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from care_compress.evaluate.evidence import gather
from care_compress.files import write_text
from care_compress.report import accuracy, fidelity, latency, layers, plan, size, summary
from care_compress.report.render import as_html, as_markdown
from care_compress.report.sources import read_results, read_sources
from care_compress.run.finished import as_written

SECTIONS = (
    summary.verdict,
    summary.checks,
    accuracy.accuracy,
    latency.latency,
    size.size,
    fidelity.fidelity,
    layers.layers,
    layers.histograms,
    layers.changes,
    layers.training,
    plan.plan,
    plan.exports,
    plan.manifest,
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
