"""What happened inside: layers, their inputs, the answers that changed, and the training."""

from care_compress.quantize.plots import short_name
from care_compress.report.blocks import (
    Block,
    Figure,
    Gallery,
    Photo,
    Picture,
    Row,
    Table,
    Text,
    Tone,
    missing,
    number,
    table,
)
from care_compress.report.differences import differences
from care_compress.report.drawing import (
    SERIES,
    Labelled,
    bars,
    curve,
    dots,
    histogram,
    legend_mark,
)
from care_compress.report.sources import Json, Sources
from care_compress.shipped import quantize_command
from care_compress.tasks.task import Metric

KINDS = ("kept in float", "1x1 and dense", "attention", "depthwise")  # in the order of SERIES
SHOWN = 12  # of the most sensitive sites in the plot
LISTED = 40  # changes of answers
# By whether the answer was right before and is now.
OUTCOMES: dict[tuple[bool, bool], tuple[str, Tone]] = {
    (True, False): ("✗ lost", "bad"),
    (False, True): ("✓ gained", "good"),
    (False, False): ("wrong both times", "plain"),
}


def layers(sources: Sources) -> list[Block]:
    """Show how far each layer's output is from float, and what each costs by itself."""
    found, costs = sources.evidence.get("layers"), sources.sensitivity or {}
    alone = costs.get("sites") or {}
    shown: list[Block] = [_sensitivity(alone, costs["images"])] if alone else []
    if found is None:
        return [missing(sources.evidence["missing"]["layers"]), *shown]
    command = f"care-compress sensitivity {sources.results['recipe']}"
    unknown = (
        f"What each layer costs alone has not been measured: {command} "
        f"--name {sources.name}_sensitivity does that."
    )
    decisions = {site["name"]: site for site in sources.evidence["plan"]["sites"]}
    return [
        _profile(found, decisions),
        *(shown or [missing(unknown)]),
        *_layer_table(found, decisions, alone, sources.task.metric),
    ]


def _profile(found: Json, decisions: dict[str, Json]) -> Figure:
    rows = []
    for one in found["sites"]:
        decision, parts = decisions[one["site"]], one["site"].split(".")
        role, precision = decision["role"], decision["precision"]
        kind = 3 if "depthwise" in role else 2 if role.startswith("attention") else 1
        said = f"{one['site']} ({precision}): {one['sqnr_db']:.1f} dB"
        stage = parts[1] if parts[0] == "stages" else parts[0]
        series = 0 if precision == "float" else kind
        rows.append(Labelled(stage, one["sqnr_db"], said, series))
    worst = min(found["sites"], key=lambda one: float(one["sqnr_db"]))
    told = (
        f"SQNR of {len(rows)} layers from the stem to the head; the lowest is {worst['site']} with "
        f"{worst['sqnr_db']:.1f} dB"
    )
    shown = sorted({row.series for row in rows})
    return Figure(
        [Picture(dots(rows, "dB", told), told)],
        "Signal over quantization noise at the output of each layer",
        {KINDS[kind]: legend_mark(*SERIES[kind]) for kind in shown},
        f"In the order of the network, its stages numbered, on {found['images']} images; higher is "
        "nearer to float. The reference is the same network with its quantizers off; noise of "
        "earlier layers is included.",
    )


def _sensitivity(alone: Json, images: int) -> Figure:
    hardest = sorted(alone.items(), key=lambda item: float(item[1]["alone"]["sqnr_db"]))[:SHOWN]
    rows = [
        Labelled(short_name(site), one["alone"]["sqnr_db"], f"{one['alone']['sqnr_db']:.1f} dB", 1)
        for site, one in hardest
    ]
    longest = max(row.value for row in rows)
    half = -(-len(rows) // 2)
    pictures = []
    for part in filter(None, (rows[:half], rows[half:])):
        told = "; ".join(f"{row.label} {row.text}" for row in part)
        pictures.append(Picture(bars(part, told, longest), told))
    return Figure(
        pictures,
        f"The {len(rows)} most sensitive of {len(alone)} sites",
        note="Signal over noise of the logits with only this site quantized, on "
        f"{images} images; shorter is harder.",
    )


def _layer_table(
    found: Json, decisions: dict[str, Json], alone: Json, metric: Metric
) -> list[Table]:
    rows: list[Row] = []
    for one in found["sites"]:
        decision = decisions[one["site"]]
        row: Row = {
            "layer": one["site"],
            "role": decision["role"],
            "precision": decision["precision"],
            "output dB": number(one["sqnr_db"], 1),
            "own input dB": number(one["input_db"], 1),
        }
        if alone:
            nothing = {"sqnr_db": None, metric.key: None}
            effects = alone.get(one["site"], {"alone": nothing, "left_out": nothing})
            row = {
                **row,
                "alone dB": number(effects["alone"]["sqnr_db"], 1),
                f"alone {metric.name} drop": number(effects["alone"][metric.key], 2),
                "left out dB": number(effects["left_out"]["sqnr_db"], 1),
            }
        rows.append(row)
    return table("Every layer", rows, tall=True)


def histograms(sources: Sources) -> list[Block]:
    """Show the inputs that lose most by their own rounding, and the ranges that were chosen."""
    found = (sources.evidence.get("layers") or {}).get("histograms")
    if found is None:
        return [missing(sources.evidence["missing"]["layers"])]
    if not found:
        return [missing("No activation becomes integers in this recipe.")]
    return [
        Figure(
            [_histogram(one) for one in found],
            "Values that enter a layer, before and after rounding to integers",
            {
                "before": legend_mark("square", "swatch-before"),
                "after rounding": legend_mark("square", "swatch-after"),
            },
            f"The {len(found)} inputs with the lowest SQNR of their own rounding. Counts are "
            "logarithmic, so that the few values a range cuts off can be seen.",
        )
    ]


def _histogram(one: Json) -> Picture:
    low, high = one["range"]
    share = 100 * one["clipped"] / one["values"]
    ranges = "one range" if one["ranges"] == 1 else f"{one['ranges']} ranges, the widest ends"
    told = (
        f"{one['spec']}: {ranges} {low:.3g} to {high:.3g}, values {one['observed'][0]:.3g} to "
        f"{one['observed'][1]:.3g}; {share:.3f} % cut off; {one['input_db']:.1f} dB"
    )
    ends = (one["bins"][0], one["bins"][1])
    whole = f"{one['site']}: {told}"
    drawing = histogram(one["before"], one["after"], ends, (low, high), whole)
    return Picture(drawing, told, short_name(one["site"]))


def changes(sources: Sources) -> list[Block]:
    """Show which class lost images to which, and the images."""
    if sources.pictures:
        return differences(sources.task, sources.compare or {}, sources.pictures)
    found = sources.evidence.get("answers")
    if found is None:
        return [missing(sources.evidence["missing"]["answers"])]
    changed = found["images"] - found["same"]
    text = Text(
        f"{changed} of {found['images']:,} answers differ from the float model's: "
        f"{found['lost']} lost (right before), {found['gained']} gained (right now), "
        f"{changed - found['lost'] - found['gained']} wrong both times."
    )
    if not changed:
        return [text]
    rows: list[Row] = [
        {
            "label": one["label"],
            "float said": one["before"],
            "quantized says": one["after"],
            "images": number(one["images"], 0),
        }
        for one in found["changes"][:LISTED]
    ]
    caption = "Confusion changes"
    if len(found["changes"]) > LISTED:
        caption += f", the {LISTED} most frequent of {len(found['changes'])}"
    photos = []
    for one in found["flipped"]:
        label, before, after = one["label"], one["before"], one["after"]
        verdict, tone = OUTCOMES[before == label, after == label]
        photos.append(
            Photo(
                picture=one["picture"],
                name=one["name"],
                label=label,
                before=f"{before} ({100 * one['sure_before']:.0f}\u00a0%)",
                after=f"{after} ({100 * one['sure_after']:.0f}\u00a0%)",
                verdict=verdict,
                tone=tone,
            )
        )
    return [
        text,
        *table(caption, rows, tall=True),
        Gallery(f"Images whose answer changed, {len(photos)} of {changed}", photos),
    ]


def training(sources: Sources) -> list[Block]:
    """Show validations on the way: of the float model where it was trained, and of QAT."""
    blocks: list[Block] = []
    metric = sources.task.metric
    if sources.trained:
        blocks += _curve("Float training", metric, sources.trained["validations"], None)
    if sources.qat:
        validations = sources.qat["validations"]
        if sources.results.get("backend") == "torchao":
            # QAT started from the PTQ model of our own backend; NNCF calibrates another one.
            start = sources.results["candidates"]["ptq"][metric.key]
            validations = [{"epoch": 0.0, metric.key: start}, *validations]
        baseline = (sources.results.get("float") or {}).get(metric.key)
        blocks += _curve("Quantization-aware training", metric, validations, baseline)
    elif not sources.is_float:
        command = quantize_command(f"{sources.task.recipes}int8_qat")
        blocks.append(
            missing(f"This recipe has no quantization-aware training: {command} is one that has.")
        )
    nothing = "Nothing was trained in this run: it loaded a checkpoint."
    return blocks or [missing(nothing)]


def _curve(
    title: str, metric: Metric, validations: list[Json], baseline: float | None
) -> list[Block]:
    if not validations:
        return [missing(f"{title} ended before its first validation.")]
    points = [(one["epoch"], one[metric.key]) for one in validations]
    told = f"{title}: {metric.name} from {points[0][1]:.2f} % to {points[-1][1]:.2f} %"
    rows: list[Row] = [
        {
            "epoch": number(one["epoch"], 2),
            f"{metric.name} %": number(one[metric.key]),
            "loss": number(one.get("loss"), 4),
        }
        for one in validations
    ]
    return [
        Figure(
            [Picture(curve(points, baseline, told), told)],
            f"{title}: validation {metric.name} by epoch",
            note="" if baseline is None else f"Dashed: the float model's {baseline:.2f} %.",
        ),
        *table(f"{title}, every validation", rows, tall=True),
    ]
