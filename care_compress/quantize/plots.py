"""Pictures of a measurement, as SVG files that stand alone; the report draws its own."""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from care_compress.files import write_text
from care_compress.quantize.search import Trial
from care_compress.quantize.sensitivity import Sensitivity
from care_compress.tasks.distance import EXACT_DB

if TYPE_CHECKING:  # half a second, for two of the verbs
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_IN_BLOCK = re.compile(r"stages\.(\d+)\.blocks\.(\d+)(\..+)?$")
_DOWNSAMPLE = re.compile(r"stages\.(\d+)\.downsample\b")
SHOWN = 40  # sites in a plot; the table and the JSON have all


def plot_sensitivity(found: Sequence[Sensitivity], path: Path) -> None:
    """Draw the hardest sites as bars: the logit SQNR with only that site quantized."""
    shown = [one for one in found if one.alone.sqnr_db < EXACT_DB][:SHOWN]
    title = f"The {len(shown)} hardest of {len(found)} sites"
    figure, axes = _drawing(9, 1.2 + 0.24 * len(shown), title)
    names = [short_name(one.site) for one in shown]
    axes.barh(names, [one.alone.sqnr_db for one in shown], color="#3b6ea5", height=0.7)
    if shown:
        axes.set_xlim(left=max(0.0, shown[0].alone.sqnr_db - 10))
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.set_xlabel("logit SQNR with only this site quantized (dB); shorter is harder")
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def plot_trials(
    trials: Sequence[Trial], max_drop: float, metric: str, unit: str, path: Path
) -> None:
    """Draw the drop over the cost of every trial; the staircase is the Pareto front."""
    figure, axes = _drawing(7, 4.5, f"{len(trials)} trials")
    for within, colour, label in ((False, "#c0392b", "over"), (True, "#2a7f4f", "within")):
        dots = [trial for trial in trials if trial.within == within]
        axes.scatter([t.cost for t in dots], [t.drop for t in dots], c=colour, label=label)
    front = pareto(trials)
    axes.step([t.cost for t in front], [t.drop for t in front], where="post", c="#555", lw=1)
    axes.axhline(max_drop, color="#999", ls="--", lw=1)
    axes.text(axes.get_xlim()[0], max_drop, " budget", va="bottom", color="#666")
    axes.set_xlabel(unit)
    axes.set_ylabel(f"{metric} drop (points)")
    axes.legend(frameon=False)
    save_figure(figure, path)


def _drawing(width: float, height: float, title: str) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """Trials that no other one beats in both cost and drop, by rising cost."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda t: (t.cost, t.drop)):
        if not front or trial.drop < front[-1].drop:
            front.append(trial)
    return front


def short_name(site: str) -> str:
    """``stages.2.blocks.0.inter_layer.inter1_fc1`` as ``2.0 inter1_fc1``."""
    if found := _DOWNSAMPLE.match(site):
        return f"{found[1]} downsample"
    if found := _IN_BLOCK.match(site):
        rest = (found[3] or ".block").removeprefix(".")
        return f"{found[1]}.{found[2]} {rest.partition('.')[2] or rest}"
    return site


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure: equal data give an equal file, and letters stay letters, small and found."""
    from matplotlib import rc_context

    content = io.StringIO()
    with rc_context({"svg.hashsalt": "care-compress", "svg.fonttype": "none"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    write_text(path, content.getvalue())
