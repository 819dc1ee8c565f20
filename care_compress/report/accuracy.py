"""How right the models are: top-1 with its interval, and each version's distance from float."""

from care_compress.evaluate.fidelity import ABSENT, decibels, hardest_sites, parting_text
from care_compress.quantize.plots import short_name
from care_compress.report.blocks import (
    Block,
    Cell,
    Figure,
    Picture,
    Row,
    Text,
    interval,
    missing,
    number,
    table,
)
from care_compress.report.drawing import Labelled, spans
from care_compress.report.sources import Json, Sources
from care_compress.tasks.intervals import wilson

Models = dict[str, Json]  # scores by name

ALL = "all targets"


def accuracy(sources: Sources) -> list[Block]:
    """Show top-1 and top-5 with intervals: in simulation, and of the exported files."""
    results, compare = sources.results, sources.compare or {}
    images = results["accuracy"]["images"]
    first = "float, slimmed" if "slim" in results else "float"
    found: Models = {first: results["accuracy" if sources.is_float else "float"]}
    for name, candidate in results.get("candidates", {}).items():
        found[f"{name} (kept)" if name == results["kept"] else name] = candidate
    blocks = _scores(
        sources, "In this run", f"On {images:,} validation images", {"": found}, images
    )
    # The files themselves, as compare measured them: by target where it says so.
    measured = sources.compared.items()
    scored = {target: _scored(compare, target, models) for target, models in measured}
    by_target = {target: models for target, models in scored.items() if models}
    if not by_target:  # nothing ran here; compare may have measured the models elsewhere
        by_target = {ALL: _scored(compare, ALL, compare.get("models") or {})}
    if any(by_target.values()):
        caption = f"Exported files on {compare['images']:,} images"
        blocks += _scores(sources, "Exported files", caption, by_target, compare["images"])
    text = (
        "The interval of a top-1 is Wilson's; that of a drop is of paired images, and so far "
        "narrower: only images whose answer changed sides count."
    )
    return [*blocks, Text(text)]


def _scored(compare: Json, target: str, models: Models) -> Models:
    """Pick the scored models and add how each differs from its baseline, on this target or all."""
    found = {}
    for name, one in models.items():
        pairs = (
            pair
            for pair in compare.get("pairs") or []
            if pair.get("candidate") == name and pair.get("target", target) == target
        )
        if one.get("top1") is not None:
            found[name] = {**next(pairs, {}), **one}
    return found


def _scores(
    sources: Sources, title: str, caption: str, by_target: dict[str, Models], images: int
) -> list[Block]:
    """Draw and list models by target; the target is empty for those that are no files."""
    pictures: list[Picture] = []
    rows: list[Row] = []
    for target, models in by_target.items():
        shown = []
        for name, one in models.items():
            text, ends = f"{one['top1']:.2f} %", wilson(one["top1"], images)
            shown.append(Labelled(name, one["top1"], text, sources.series(name), ends))
            row: Row = {
                "model": name,
                "top-1 %": number(one["top1"]),
                "95 %": interval(ends),
                "top-5 %": number(one.get("top5")),
                "drop": number(one.get("drop")),
                "drop 95 %": interval(one.get("drop_ci95")),
                "same answer %": number(one.get("agreement")),
            }
            if target:
                row = {"target": target, **row, "McNemar p": number(one.get("mcnemar_p"), 3)}
            rows.append(row)
        told = "; ".join(f"{one.label} {one.text}" for one in shown)
        drawing = spans(shown, f"Top-1 with 95 % intervals: {told}")
        pictures.append(Picture(drawing, told, target))
    return [Figure(pictures, f"{title}: top-1 with its 95 % interval"), *table(caption, rows)]


def fidelity(sources: Sources) -> list[Block]:
    """Show every version beside the one before it: what each step to a file cost, and where."""
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
