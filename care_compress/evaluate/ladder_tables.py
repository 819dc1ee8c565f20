"""A ladder on the console, from what ``fidelity.json`` holds."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from care_compress.evaluate.plots import short_name
from care_compress.quantize.distance import EXACT_DB

HARDEST = 15
ABSENT = "not here, see below"


def rung_table(value: dict[str, Any]) -> Table:
    """One row for each rung, beside the one before it."""
    table = Table(title=f"Rung by rung, {value['images']:,} images", title_justify="left")
    table.add_column("rung", no_wrap=True)
    table.add_column("made from", no_wrap=True)
    for column in ("logits", "to float", "same answers"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("first parts at", no_wrap=True)
    for row in value["rungs"]:
        if "missing" in row:
            cells = [row["rung"], "", "", "", "", ABSENT]
        else:
            cells = [row["rung"], row["before"] or "", *_figures(row), parting_text(row)]
        table.add_row(*(escape(cell) for cell in cells))
    return table


def _figures(row: dict[str, Any]) -> tuple[str, str, str]:
    return decibels(row["sqnr_db"]), decibels(row["to_float_db"]), f"{row['same_percent']:.1f} %"


def decibels(value: float | None) -> str:
    """``31.0 dB``; nothing for the first rung, words for no difference."""
    return "" if value is None else "exact" if value >= EXACT_DB else f"{value:.1f} dB"


def parting_text(row: dict[str, Any]) -> str:
    """Where a rung parts from the one before it, or why that is not known."""
    parting = row["parts_at"]
    if parting is not None:
        return f"{short_name(parting['site'])}, {decibels(parting['sqnr_db'])}"
    if row["sites"]:
        return "nowhere"
    return "" if row["before"] is None else str(row["note"]).partition(":")[0]


def hardest_sites(value: dict[str, Any]) -> tuple[list[str], list[tuple[str, list[float | None]]]]:
    """Rungs that show sites, and the worst sites with a distance for each of those rungs."""
    shown = [row for row in value["rungs"] if row.get("sites")]
    worst: dict[str, float] = {}
    for row in shown:
        for site, found in row["sites"].items():
            worst[site] = min(found, worst.get(site, found))
    sites = sorted(worst, key=lambda site: worst[site])[:HARDEST]
    cells = [(site, [row["sites"].get(site) for row in shown]) for site in sites]
    return [row["rung"] for row in shown], cells


def site_table(value: dict[str, Any]) -> Table:
    """The hardest sites along the ladder, each step beside the rung it was made from."""
    rungs, cells = hardest_sites(value)
    title = "Hardest sites, dB of each step (left out where a site's meaning moved)"
    table = Table(title=title, title_justify="left")
    table.add_column("site", no_wrap=True)
    for rung in rungs:
        table.add_column(escape(rung), justify="right")
    for site, found in cells:
        table.add_row(short_name(site), *(decibels(one).removesuffix(" dB") for one in found))
    return table
