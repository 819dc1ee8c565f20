"""How right the models are: top-1 with its interval, and each version's distance from float."""

from collections.abc import Sequence

from care_compress.evaluate.pairs import wilson
from care_compress.evaluate.tables import ABSENT, decibels, hardest_sites, parting_text
from care_compress.quantize.plots import short_name
from care_compress.report.blocks import (
    Block,
    Cell,
    Figure,
    Picture,
    Row,
    Table,
    Text,
    interval,
    missing,
    number,
    table,
)
from care_compress.report.drawing import Labelled, spans
from care_compress.report.sources import Json, Sources

Model = tuple[str, str, Json]  # its name, the target where it is a file for one, its scores
ALL = "all targets"


def accuracy(sources: Sources) -> list[Block]:
    """Top-1 and top-5 with intervals: in simulation, and of the exported files."""
    results = sources.results
    images = results["accuracy"]["images"]
    found: list[Model]
    if sources.is_float:
        found = [("float", "", results["accuracy"])]
    else:
        found = [("float", "", results["float"])]
        for name, candidate in results["candidates"].items():
            found.append((f"{name} (kept)" if name == results["kept"] else name, "", candidate))
    return [
        _accuracy_plot(sources, "In this run", {"": found}, images),
        *_accuracy_table(f"On {images:,} validation images", found, images),
        *_exported(sources),
        Text(
            "The interval of a top-1 is Wilson's; that of a drop is of paired images, and so far "
            "narrower: only images whose answer changed sides count."
        ),
    ]


def _exported(sources: Sources) -> list[Block]:
    """Show the files themselves, as compare measured them: by target where it says so."""
    compare = sources.compare or {}
    measured = sources.compared.items()
    scored = {target: _scored(compare, target, models) for target, models in measured}
    by_target = {target: found for target, found in scored.items() if found}
    if not by_target:  # nothing ran here; compare may have measured the models elsewhere
        by_target = {ALL: _scored(compare, ALL, compare.get("models") or {})}
    rows = [row for found in by_target.values() for row in found]
    if not rows:
        return []
    images = compare["images"]
    return [
        _accuracy_plot(sources, "Exported files", by_target, images),
        *_accuracy_table(f"Exported files on {images:,} images", rows, images),
    ]


def _scored(compare: Json, target: str, models: Json) -> list[Model]:
    """List the scored models, each with what sets it apart from its baseline there or anywhere."""
    found = []
    for name, one in models.items():
        pairs = (
            pair
            for pair in compare.get("pairs") or []
            if pair.get("candidate") == name and pair.get("target", target) == target
        )
        if one.get("top1") is not None:
            found.append((name, target, {**next(pairs, {}), **one}))
    return found


def _accuracy_plot(
    sources: Sources, title: str, groups: dict[str, list[Model]], images: int
) -> Figure:
    pictures = []
    for group, found in groups.items():
        rows = []
        for name, _, one in found:
            text, ends = f"{one['top1']:.2f} %", wilson(one["top1"], images)
            rows.append(Labelled(name, one["top1"], text, sources.series(name), ends))
        told = "; ".join(f"{row.label} {row.text}" for row in rows)
        pictures.append(Picture(spans(rows, f"Top-1 with 95 % intervals: {told}"), told, group))
    return Figure(pictures, f"{title}: top-1 with its 95 % interval")


def _accuracy_table(caption: str, found: Sequence[Model], images: int) -> list[Table]:
    exported = any(target for _, target, _ in found)
    rows: list[Row] = []
    for name, target, one in found:
        row: Row = {
            "model": name,
            "top-1 %": number(one["top1"]),
            "95 %": interval(wilson(one["top1"], images)),
            "top-5 %": number(one.get("top5")),
            "drop": number(one.get("drop")),
            "drop 95 %": interval(one.get("drop_ci95")),
            "same answer %": number(one.get("agreement")),
        }
        if exported:
            row = {"target": target, **row, "McNemar p": number(one.get("mcnemar_p"), 3)}
        rows.append(row)
    return table(caption, rows)


def fidelity(sources: Sources) -> list[Block]:
    """Every version beside the one before it: what each step to a file cost, and where."""
    found = sources.fidelity
    if found is None:
        return [missing(f"Not measured: care-compress fidelity {sources.name}.")]
    if found.get("results_sha256") != sources.results_sha256:
        return [
            missing(
                "fidelity.json is of an earlier run of this name: care-compress fidelity "
                f"{sources.name} measures this one."
            )
        ]
    versions: list[Row] = []
    for row in found["rungs"]:
        absent = "missing" in row
        versions.append(
            {
                "version": row["rung"],
                "logits dB": _decibels(None if absent else row["sqnr_db"]),
                "to float dB": _decibels(None if absent else row["to_float_db"]),
                "same answers %": number(None if absent else row["same_percent"], 1),
                "first parts at": ABSENT if absent else parting_text(row),
                "made from": "" if absent else row["before"] or "",
            }
        )
    blocks: list[Block] = [
        Text(
            "Each version is compared with the one it was made from: a step answers for its "
            "own loss alone; 80 dB and more is the order of float sums. With its quantizers off "
            "a quantized model still has the biases that PTQ corrected and the weights that QAT "
            "trained: that is the version called rescaled."
        ),
        *table(f"On {found['images']:,} images", versions),
    ]
    names, sites = hardest_sites(found)
    rows: list[Row] = [
        {"site": short_name(site), **dict(zip(names, map(_decibels, distances), strict=True))}
        for site, distances in sites
    ]
    caption = f"The {len(rows)} hardest sites, dB of each step; empty where a site's meaning moved"
    unmade = [row for row in found["rungs"] if "missing" in row]
    return [
        *blocks,
        *table(caption, rows),
        *(missing(f"{row['rung']}: {row['missing']}") for row in unmade),
    ]


def _decibels(value: float | None) -> Cell:
    return Cell(decibels(value).removesuffix(" dB"), value, numeric=True)
