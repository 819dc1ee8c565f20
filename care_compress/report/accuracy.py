"""How right the models are: the metric with its interval, and each version's way from float."""

import math

from care_compress.evaluate.fidelity import ABSENT, decibels, hardest_sites, parting_text
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
    titled,
)
from care_compress.report.drawing import Labelled, bars, spans
from care_compress.report.sources import Json, Sources

Models = dict[str, Json]  # scores by name

ALL = "all targets"


def accuracy(sources: Sources) -> list[Block]:
    """Show every metric, with intervals: in simulation, and of the exported files."""
    results, compare, key = sources.results, sources.compare or {}, sources.task.metric.key
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
    scored = {target: _scored(compare, target, models, key) for target, models in measured}
    by_target = {target: models for target, models in scored.items() if models}
    if not by_target:  # nothing ran here; compare may have measured the models elsewhere
        by_target = {ALL: _scored(compare, ALL, compare.get("models") or {}, key)}
    if any(by_target.values()):
        caption = f"Exported files on {compare['images']:,} images"
        blocks += _scores(sources, "Exported files", caption, by_target, compare["images"])
    return [*blocks, *_by_class(sources), Text(sources.task.how_sure)]


def _by_class(sources: Sources) -> list[Table]:
    """List what each class lost, the worst first; nothing where the task tells no class apart."""
    pair, metric = sources.pair, sources.task.metric
    if pair is None or "per_class" not in pair:
        return []
    models = [pair["per_class"][pair[role]] for role in ("baseline", "candidate")]
    lost = {
        name: None if None in (before, now) else before - now
        for name, before, now in ((name, *(of[name] for of in models)) for name in models[0])
    }
    rows: list[Row] = [
        {
            "class": name,
            f"{pair['baseline']} %": number(models[0][name]),
            f"{pair['candidate']} %": number(models[1][name]),
            "drop": number(drop),
        }
        for name, drop in sorted(
            lost.items(), key=lambda one: -math.inf if one[1] is None else one[1], reverse=True
        )
    ]
    where = f" on {pair['target']}" if "target" in pair else ""
    return table(f"{metric.of_class} of each class{where}", rows, tall=True)


def _scored(compare: Json, target: str, models: Models, key: str) -> Models:
    """Pick the scored models and add how each differs from its baseline, on this target or all."""
    found = {}
    for name, one in models.items():
        pairs = (
            pair
            for pair in compare.get("pairs") or []
            if pair.get("candidate") == name and pair.get("target", target) == target
        )
        if one.get(key) is not None:
            found[name] = {**next(pairs, {}), **one}
    return found


def _scores(
    sources: Sources, title: str, caption: str, by_target: dict[str, Models], images: int
) -> list[Block]:
    """Draw and list models by target; the target is empty for those that are no files."""
    task = sources.task
    key, first = task.metric.key, task.metric.name
    others = {one: name for one, name in task.shown.items() if one != key}
    pictures: list[Picture] = []
    rows: list[Row] = []
    every = [one for models in by_target.values() for one in models.values()]
    surely = all(_ends(sources, one, images) for one in every)
    for target, models in by_target.items():
        shown = []
        for name, one in models.items():
            text, ends = f"{one[key]:.2f} %", _ends(sources, one, images)
            shown.append(Labelled(name, one[key], text, sources.series(name), ends or ()))
            row: Row = {
                "model": name,
                f"{first} %": number(one[key]),
                **({"95 %": interval(ends)} if surely else {}),
                **{f"{title} %": number(one.get(other)) for other, title in others.items()},
                "drop": number(one.get("drop")),
                "drop 95 %": interval(one.get("drop_ci95")),
                f"{task.same.name} %": number(one.get("agreement")),
            }
            if target:
                more = {title: number(one.get(what), 3) for what, title in task.paired.items()}
                row = {"target": target, **row, **more}
            rows.append(row)
        told = "; ".join(f"{one.label} {one.text}" for one in shown)
        if surely:
            drawing = spans(shown, f"{titled(first)} with 95 % intervals: {told}")
        else:
            drawing = bars(shown, f"{titled(first)}: {told}", 100)
        pictures.append(Picture(drawing, told, target))
    what = f"{title}: {first}" + (" with its 95 % interval" if surely else "")
    return [Figure(pictures, what), *table(caption, rows)]


def _ends(sources: Sources, one: Json, images: int) -> tuple[float, float] | None:
    """Return the interval of a model by itself, where it is known."""
    key = sources.task.metric.key
    stored = one.get(f"{key}_ci95")
    return sources.task.interval(one[key], images) if stored is None else tuple(stored)


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
