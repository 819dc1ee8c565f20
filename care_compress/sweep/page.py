"""``sweep.html``: the best within the budgets, the fronts, and every trial in a table that sorts.

Made of the report's blocks and drawings, from the same plain data as ``sweep.json``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from care_compress.files import write_text
from care_compress.report.blocks import (
    Block,
    Cell,
    Figure,
    PageSection,
    Picture,
    Text,
    Tile,
    Tiles,
    interval,
    megabytes,
    missing,
    number,
    table,
)
from care_compress.report.blocks import Row as TableRow
from care_compress.report.drawing import SERIES, Point, legend_mark
from care_compress.report.drawing import front as front_drawing
from care_compress.report.write import page_html
from care_compress.sweep.results import (
    compare_command,
    front,
    milliseconds,
    same_processor,
    size_of_row,
)
from care_compress.sweep.sections import METRICS
from care_compress.sweep.trials import Row
from care_compress.tasks.known import task_of
from care_compress.tasks.task import Metric

Json = Mapping[str, Any]
TALL = 14  # rows, from which the table scrolls in a box of its own
WITHIN, OVER, FLOAT = 3, 2, 0  # series: colour and shape of a mark


def write_page(sweep: Json, path: Path) -> None:
    """Write the page of what ``sweep.json`` holds."""
    rows: Sequence[Row] = sweep["trials"]
    sections = [
        PageSection("best", "Best within the budgets", best(sweep)),
        PageSection("fronts", "Accuracy against cost", fronts(sweep)),
        PageSection("trials", "Trials", trials(sweep)),
        PageSection("failed", "Trials without a result", failures(rows)),
        PageSection("commands", "Commands", commands(rows)),
    ]
    done = sum(row["status"] == "finished" for row in rows)
    claim = f"{done:,} of {sweep['total']:,} trials finished, search {sweep['asked']['search']}"
    shown = [section for section in sections if section.blocks]
    name = sweep["sweep"]
    write_text(path, page_html(name, "care-compress sweep", claim, shown, f"the sweep {name}"))


def best(sweep: Json) -> list[Block]:
    """Show the best trial, its figures and the commands that make and check it."""
    asked, rows = sweep["asked"], {row["name"]: row for row in sweep["trials"]}
    metric, more = METRICS[asked["objective"]["metric"]]
    target = asked["objective"]["target"]
    wanted = f"{'highest' if more else 'lowest'} {metric}{f' on {target}' if target else ''}"
    limits = [f"{key} {one}" for key, one in _flat(asked["budget"])]
    said = f"Asked for: the {wanted}; budgets: {'; '.join(limits) or 'none'}."
    if sweep["best"] is None:
        return [Text("No trial is within every budget.", "bad"), Text(said)]
    row, own = rows[sweep["best"]], task_of(sweep).metric
    tiles = [
        Tile("trial", row["name"]),
        Tile(own.name, f"{row[own.key]:.2f} %", f"on {row['images']:,} images"),
        Tile("drop", f"{row['drop']:.2f}", f"points, 95 % {interval(row['drop_ci95'])}"),
    ]
    size = size_of_row(row)
    if size is not None:
        tiles.append(Tile("largest file", megabytes(size).text))
    for where, found in row["latency"].items():
        if "ms" in found:
            note = f"{found['speedup']:.2f}x float, {found['processor']}"
            tiles.append(Tile(f"p50 on {where}", f"{found['ms']['p50']:.2f} ms", note))
    blocks: list[Block] = [Text(said), Tiles(tiles), Text(f"Made again by: {row['command']}")]
    if row["baseline"] is not None:
        check = compare_command(sweep["runs"], row["baseline"], row["name"])
        blocks.append(Text(f"Its files scored and timed beside the float model: {check}"))
    return blocks


def _flat(budget: Json) -> list[tuple[str, float]]:
    """Every limit that is set, those of a target under both names."""
    found = []
    for key, one in budget.items():
        if isinstance(one, dict):
            found += [(f"{key} {target}", value) for target, value in one.items()]
        elif one is not None:
            found.append((key, one))
    return found


def fronts(sweep: Json) -> list[Block]:
    """Draw accuracy against latency for every target and processor, and against size."""
    rows = [row for row in sweep["trials"] if row["status"] == "finished"]
    timing, own = sweep["asked"]["timing"] or {"targets": []}, task_of(sweep).metric
    figures: list[Block] = []
    for target in timing["targets"]:

        def latency(row: Row, target: str = target) -> float | None:
            return milliseconds(row, target)

        for alike in same_processor(rows, target).values():
            timed = alike[0]["latency"][target]
            title = f"Accuracy against latency on {target}, {timed['processor']}"
            figures += _figure(alike, own, latency, "ms", title)
        if not same_processor(rows, target):
            figures.append(missing(f"No trial was timed on {target}."))
    sized = [row for row in rows if size_of_row(row) is not None]
    if sized:

        def size(row: Row) -> float | None:
            found = size_of_row(row)
            return None if found is None else found / 1e6

        figures += _figure(sized, own, size, "MB", "Accuracy against the largest file")
    return figures


def _figure(rows: Sequence[Row], own: Metric, cost: Any, unit: str, title: str) -> list[Block]:
    """Draw trials over a cost, and list those on the front."""

    def point(row: Row) -> Point:
        series = WITHIN if row["within"] else OVER
        return Point(row["name"], cost(row), row[own.key], series)

    chosen = front(rows, cost, own.key)
    told = f"{len(chosen):,} of {len(rows):,} trials are on the front"
    legend = {
        "within every budget": legend_mark(*SERIES[WITHIN]),
        "not within": legend_mark(*SERIES[OVER]),
    }
    units = unit, f"% {own.name}"
    picture = front_drawing([*map(point, rows)], [*map(point, chosen)], units, told)
    note = "The line joins the trials that no other beats in both."
    listed: list[TableRow] = [
        {
            "run": row["name"],
            unit: number(cost(row)),
            f"{own.name} %": number(row[own.key]),
            "drop": number(row["drop"]),
            "within": "yes" if row["within"] else "no",
        }
        for row in chosen
    ]
    return [
        Figure([Picture(picture, told)], title, legend, note),
        *table("On the front, by cost", listed, tall=len(listed) > TALL),
    ]


def trials(sweep: Json) -> list[Block]:
    """List every finished trial with what was chosen for it and what came out."""
    rows = [row for row in sweep["trials"] if row["status"] == "finished"]
    varied, own = _varied(sweep["trials"]), task_of(sweep).metric
    timing = sweep["asked"]["timing"] or {"targets": []}
    shown: list[TableRow] = []
    for row in rows:
        cells: dict[str, Cell | str] = {"run": row["name"]}
        for key in varied:
            cells[key] = _cell(row["point"].get(key))
        cells |= {
            "within": "yes" if row["within"] else "no",
            f"{own.name} %": number(row[own.key]),
            "drop": number(row["drop"]),
            "drop 95 %": interval(row["drop_ci95"]),
        }
        for target in timing["targets"]:
            cells |= _latency_cells(row, target)
        size = size_of_row(row)
        cells["largest file"] = Cell("", numeric=True) if size is None else megabytes(size)
        cells["energy mJ"] = number(row["energy_mj"], 3)
        cells["seconds"] = number(row["seconds"], 1)
        cells["node"] = row["node"] or ""
        unsound = row["failed_exports"]
        cells["exports that failed"] = "; ".join(f"{t}: {why}" for t, why in unsound.items())
        shown.append(cells)
    return [*table("Finished trials", shown, tall=len(shown) > TALL)]


def _latency_cells(row: Row, target: str) -> dict[str, Cell | str]:
    timed = row["latency"].get(target, {})
    known = "ms" in timed
    noisy = " noisy" if known and timed["noisy"] else ""
    return {
        f"{target} ms": number(milliseconds(row, target)),
        f"{target} times as fast": number(timed["speedup"] if known else None),
        f"{target} timed by": f"{timed['processor']}{noisy}" if known else timed.get("missing", ""),
    }


def _varied(rows: Sequence[Row]) -> list[str]:
    """Keys that are not the same in every trial, in the order of the file; the recipe always."""
    seen: dict[str, set[str]] = {}
    for row in rows:
        for key, value in row["point"].items():
            seen.setdefault(key, set()).add(str(value))
    return [key for key, values in seen.items() if len(values) > 1 or key == "recipe"]


def _cell(value: Any) -> Cell | str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Cell(f"{value:g}", float(value), numeric=True)
    return "" if value is None else str(value)


def failures(rows: Sequence[Row]) -> list[Block]:
    """List the trials that failed or were stopped, with their reasons."""
    shown: list[TableRow] = [
        {"run": row["name"], "": row["status"], "why": row["reason"], "node": row["node"] or ""}
        for row in rows
        if row["status"] != "finished"
    ]
    return [*table("Why they have none", shown, tall=len(shown) > TALL)]


def commands(rows: Sequence[Row]) -> list[Block]:
    """List what makes each run alone; what is there already is taken over."""
    shown: list[TableRow] = [{"run": row["name"], "command": row["command"]} for row in rows]
    return [*table("To make one run alone", shown, tall=len(shown) > TALL)]
