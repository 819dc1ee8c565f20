"""What happened inside: layers, their inputs, the answers that changed, and the training."""

from typing import Any

from care_compress.quantize.plots import short_name
from care_compress.report.blocks import (
    Block,
    Cell,
    Figure,
    Gallery,
    Legend,
    PageSection,
    Photo,
    Picture,
    Table,
    Text,
    Tone,
    missing,
    number,
)
from care_compress.report.drawing import SERIES, Bar, Dot, bars, curve, dots, histogram, legend_mark
from care_compress.report.sources import Json, Sources

KINDS = ("kept in float", "1x1 and dense", "attention", "depthwise")  # in the order of SERIES
SHOWN = 12  # of the most sensitive sites in the plot
LISTED = 40  # changes of answers


def layers(sources: Sources) -> PageSection:
    """How far each layer's output is from float, and what each costs by itself."""
    section = PageSection("layers", "Layers")
    found = sources.evidence.get("layers")
    alone = (sources.sensitivity or {}).get("sites") or {}
    if found is None:
        section.blocks.append(missing(sources.evidence["missing"]["layers"]))
    else:
        decisions = {site["name"]: site for site in sources.evidence["plan"]["sites"]}
        section.blocks.append(_profile(found, decisions))
    section.blocks += _sensitivity(sources, alone)
    if found is not None:
        section.blocks.append(_layer_table(found, decisions, alone))
    return section


def _kind(decision: Json) -> int:
    if decision["precision"] == "float":
        return 0
    role = decision["role"]
    return 3 if "depthwise" in role else 2 if role.startswith("attention") else 1


def _profile(found: Json, decisions: dict[str, Json]) -> Figure:
    rows = []
    for one in found["sites"]:
        name, decision = one["site"], decisions[one["site"]]
        parts = name.split(".")
        stage = parts[1] if parts[0] == "stages" else parts[0]
        told = f"{name} ({decision['precision']}): {one['sqnr_db']:.1f} dB"
        rows.append(Dot(one["sqnr_db"], _kind(decision), told, stage))
    worst = min(found["sites"], key=lambda one: float(one["sqnr_db"]))
    told = (
        f"SQNR of {len(rows)} layers from the stem to the head; the lowest is {worst['site']} with "
        f"{worst['sqnr_db']:.1f} dB"
    )
    legend = tuple(
        Legend(legend_mark(*SERIES[kind]), KINDS[kind]) for kind in sorted({r.series for r in rows})
    )
    return Figure(
        (Picture(dots(rows, "dB", told), told),),
        "Signal over quantization noise at the output of each layer",
        legend,
        f"In the order of the network, its stages numbered, on {found['images']} images; higher is "
        "nearer to float. The "
        "reference is the same network with its quantizers off; noise of earlier layers is "
        "included.",
    )


def _layer_table(found: Json, decisions: dict[str, Json], alone: Json) -> Table:
    columns = ["layer", "role", "precision", "output dB", "own input dB"]
    if alone:
        columns += ["alone dB", "alone top-1 drop", "left out dB"]
    rows = []
    for one in found["sites"]:
        decision, by_itself = decisions[one["site"]], alone.get(one["site"])
        row = [
            Cell(one["site"]),
            Cell(decision["role"]),
            Cell(decision["precision"]),
            number(one["sqnr_db"], 1),
            number(one["input_db"], 1),
        ]
        if alone:
            row += [
                number(None if by_itself is None else by_itself["alone"]["sqnr_db"], 1),
                number(None if by_itself is None else by_itself["alone"]["top1"], 2),
                number(None if by_itself is None else by_itself["left_out"]["sqnr_db"], 1),
            ]
        rows.append(tuple(row))
    return Table("Every layer", tuple(columns), rows, tuple(columns[3:]), tall=True)


def _sensitivity(sources: Sources, alone: Json) -> list[Block]:
    if not alone:
        if sources.evidence.get("layers") is None:
            return []
        recipe = sources.results["recipe"]
        return [
            missing(
                "What each layer costs alone has not been measured: care-compress sensitivity "
                f"{recipe} --name {sources.name}_sensitivity does that."
            )
        ]
    assert sources.sensitivity is not None
    hardest = sorted(alone.items(), key=lambda item: float(item[1]["alone"]["sqnr_db"]))[:SHOWN]
    rows = [
        Bar(short_name(site), one["alone"]["sqnr_db"], f"{one['alone']['sqnr_db']:.1f} dB", 1)
        for site, one in hardest
    ]
    half = -(-len(rows) // 2)
    pictures = []
    for part in filter(None, (rows[:half], rows[half:])):
        told = "; ".join(f"{row.label} {row.text}" for row in part)
        longest = max(row.value for row in rows)
        pictures.append(Picture(bars(part, told, longest), told))
    return [
        Figure(
            tuple(pictures),
            f"The {len(rows)} most sensitive of {len(alone)} sites",
            note="Signal over noise of the logits with only this site quantized, on "
            f"{sources.sensitivity['images']} images; shorter is harder.",
        )
    ]


def histograms(sources: Sources) -> PageSection:
    """The inputs that lose most by their own rounding, and the ranges that were chosen."""
    section = PageSection("activations", "Activations of the hardest layers")
    found = (sources.evidence.get("layers") or {}).get("histograms")
    if found is None:
        section.blocks.append(missing(sources.evidence["missing"]["layers"]))
        return section
    if not found:
        section.blocks.append(missing("No activation becomes integers in this recipe."))
        return section
    legend = (Legend(_swatch("before"), "before"), Legend(_swatch("after"), "after rounding"))
    section.blocks.append(
        Figure(
            tuple(_histogram(one) for one in found),
            "Values that enter a layer, before and after rounding to integers",
            legend,
            f"The {len(found)} inputs with the lowest SQNR of their own rounding. Counts are "
            "logarithmic, so that the few values a range cuts off can be seen.",
        )
    )
    return section


def _swatch(kind: str) -> Any:
    return legend_mark("square", f"swatch-{kind}")


def _histogram(one: Json) -> Picture:
    low, high = one["range"]
    share = 100 * one["clipped"] / one["values"]
    ranges = "one range" if one["ranges"] == 1 else f"{one['ranges']} ranges, the widest ends"
    told = (
        f"{one['spec']}: {ranges} {low:.3g} to {high:.3g}, values {one['observed'][0]:.3g} to "
        f"{one['observed'][1]:.3g}; {share:.3f} % cut off; {one['input_db']:.1f} dB"
    )
    drawing = histogram(
        one["before"],
        one["after"],
        (one["bins"][0], one["bins"][1]),
        (low, high),
        f"{one['site']}: {told}",
    )
    return Picture(drawing, told, short_name(one["site"]))


def changes(sources: Sources) -> PageSection:
    """Which class lost images to which, and the images."""
    section = PageSection("answers", "Answers that changed")
    found = sources.evidence.get("answers")
    if found is None:
        section.blocks.append(missing(sources.evidence["missing"]["answers"]))
        return section
    changed = found["images"] - found["same"]
    section.blocks.append(
        Text(
            f"{changed} of {found['images']:,} answers differ from the float model's: "
            f"{found['lost']} lost (right before), {found['gained']} gained (right now), "
            f"{changed - found['lost'] - found['gained']} wrong both times."
        )
    )
    if not changed:
        return section
    columns = ("label", "float said", "quantized says", "images")
    rows = [
        (Cell(one["label"]), Cell(one["before"]), Cell(one["after"]), number(one["images"], 0))
        for one in found["changes"][:LISTED]
    ]
    caption = "Confusion changes"
    if len(found["changes"]) > LISTED:
        caption += f", the {LISTED} most frequent of {len(found['changes'])}"
    photos = tuple(_photo(one) for one in found["flipped"])
    section.blocks += [
        Table(caption, columns, rows, ("images",), tall=True),
        Gallery(f"Images whose answer changed, {len(photos)} of {changed}", photos),
    ]
    return section


def _photo(one: Json) -> Photo:
    right = (one["before"] == one["label"], one["after"] == one["label"])
    kinds: dict[tuple[bool, bool], tuple[str, Tone]] = {
        (True, False): ("✗ lost", "bad"),
        (False, True): ("✓ gained", "good"),
        (False, False): ("wrong both times", "plain"),
    }
    verdict, tone = kinds[right]
    return Photo(
        picture=one["picture"],
        name=one["name"],
        label=one["label"],
        before=f"{one['before']} ({100 * one['sure_before']:.0f}\u00a0%)",
        after=f"{one['after']} ({100 * one['sure_after']:.0f}\u00a0%)",
        verdict=verdict,
        tone=tone,
    )


def training(sources: Sources) -> PageSection:
    """Validations on the way: of the float model where it was trained, and of QAT."""
    section = PageSection("training", "Training curves")
    if sources.trained:
        section.blocks += _curve("Float training", sources.trained, None)
    if sources.qat:
        baseline = (sources.results.get("float") or {}).get("top1")
        begin = _begin(sources)
        history = {"validations": begin + sources.qat["validations"]}
        section.blocks += _curve("Quantization-aware training", history, baseline)
    elif not sources.is_float:
        section.blocks.append(
            missing(
                "This recipe has no quantization-aware training: make quantize RECIPE=int8_qat "
                "is one that has."
            )
        )
    if not section.blocks:
        section.blocks.append(missing("Nothing was trained in this run: it loaded a checkpoint."))
    return section


def _begin(sources: Sources) -> list[Json]:
    """What QAT started from: the PTQ model, of our own backend; NNCF calibrates another one."""
    if sources.results.get("backend") != "torchao":
        return []
    return [{"epoch": 0.0, "top1": sources.results["candidates"]["ptq"]["top1"]}]


def _curve(title: str, history: Json, baseline: float | None) -> list[Block]:
    points = [(one["epoch"], one["top1"]) for one in history["validations"]]
    if not points:
        return [missing(f"{title} ended before its first validation.")]
    told = f"{title}: top-1 from {points[0][1]:.2f} % to {points[-1][1]:.2f} %"
    note = "" if baseline is None else f"Dashed: the float model's {baseline:.2f} %."
    columns = ("epoch", "top-1 %", "loss")
    rows = [
        (number(one["epoch"], 2), number(one["top1"]), number(one.get("loss"), 4))
        for one in history["validations"]
    ]
    return [
        Figure(
            (Picture(curve(points, baseline, told), told),),
            f"{title}: validation top-1 by epoch",
            note=note,
        ),
        Table(f"{title}, every validation", columns, rows, columns, tall=True),
    ]
