"""What the slim stage did: widths before and after, and accuracy beside the whole network."""

from care_compress.evaluate.slim_accuracy import TRAINED
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
    titled,
)
from care_compress.report.drawing import Labelled, Point, bars, scatter
from care_compress.report.sources import Json, Sources
from care_compress.shipped import COMPARE
from care_compress.slim.plan import NAMES


def slim(sources: Sources) -> list[Block]:
    """Show what was cut; nothing for a run that cut nothing."""
    found = sources.results.get("slim")
    if found is None:
        return []
    budget = found["budget"]
    text = (
        f"{cut_by(found)}. The budget left {100 * budget['share']:.0f} % of the "
        f"{NAMES[budget['kind']]}."
    )
    if TRAINED in found["models"]:
        text += (
            " Drops of what was cut count from the whole network after the same training: one "
            "that has not converged gets better by any training, and that gain is not the cut's."
        )
    rows: list[Row] = []
    for name, one in found["models"].items():
        first = name == one["against"]
        rows.append(
            {
                "model": name,
                **{f"{title} %": number(one[key]) for key, title in sources.task.shown.items()},
                "drop": Cell("", numeric=True) if first else number(one["drop"]),
                "95 %": "" if first else interval(one["drop_ci95"]),
                "against": "" if first else one["against"],
            }
        )
    images = next(iter(found["models"].values()))["images"]
    return [
        Text(text),
        *table(f"On {images:,} validation images", rows),
        *_widths(sources.slim),
        *_pareto(sources),
    ]


def cut_by(found: Json) -> str:
    """Tell how much smaller: ``30.1 % fewer multiply-accumulates and 22 % fewer parameters``."""
    (macs, fewer), (parameters, less) = found["macs"], found["parameters"]
    return (
        f"{100 * (1 - fewer / macs):.1f} % fewer multiply-accumulates and "
        f"{100 * (1 - less / parameters):.1f} % fewer parameters"
    )


def _widths(plan: Json | None) -> list[Block]:
    if plan is None:
        return [missing("slim/plan.json, which tells the widths, is gone.")]
    rows, cells = [], []
    for one in plan["places"]:
        share = 100 * one["width"] / one["channels"]
        said = f"{one['width']} of {one['channels']}"
        rows.append(Labelled(one["name"], share, said, 1))
        cells.append(
            {
                "interaction": one["name"],
                "channels": number(one["channels"], 0),
                "stay": number(one["width"], 0),
                "share %": number(share, 0),
                "least": number(one["least"], 0),
                "rule": "" if one["rule"] is None else str(one["rule"]),
                "loss": Cell(f"{one['loss']:.3g}", one["loss"], numeric=True),
            }
        )
    told = "; ".join(f"{row.label} {row.text}" for row in rows)
    note = f"Chosen by {plan['importance'].replace('_', '-')}; the bar is the share that stays."
    hidden = plan.get("hidden")  # absent in runs older than slim.hidden
    if hidden and hidden["allowed"] is not None:
        note += (
            " Of the hidden numbers (channels times positions) "
            f"{100 * hidden['left']:.1f} % stay, and {100 * hidden['allowed']:.1f} % were allowed."
        )
    picture = Picture(bars(rows, told, 100), told)
    return [
        Figure([picture], "Hidden channels of each interaction", note=note),
        *table("Widths", cells, tall=True),
    ]


def _pareto(sources: Sources) -> list[Block]:
    """Draw accuracy over latency, of all that compare measured beside each other."""
    pictures, metric = [], sources.task.metric
    units = "ms", f"{metric.name} %"
    for target, models in sources.compared.items():
        points = [
            Point(name, one["latency_ms"]["p50"], one[metric.key], sources.series(name))
            for name, one in models.items()
            if one.get("latency_ms") and one.get(metric.key) is not None
        ]
        if len(points) > 1:
            told = "; ".join(f"{p.label}: {p.x:.3g} ms, {p.y:.2f} %" for p in points)
            pictures.append(Picture(scatter(points, units, told), told, target))
    if not pictures:
        said = f"{titled(metric.name)} over latency: {COMPARE} fp32 {sources.name} measures both."
        return [missing(said)]
    return [Figure(pictures, f"{titled(metric.name)} over the latency of one image, one thread")]
