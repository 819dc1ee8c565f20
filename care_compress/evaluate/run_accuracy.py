"""Accuracy of a run's models: while they are made, and at the end, beside the float one.

Each process counts its share of the images, so all of a run's processes must come here.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from care_compress.data.checks import Contents
from care_compress.data.loader import images_at_once
from care_compress.data.samples import Samples, spread_indices
from care_compress.evaluate.accuracy import (
    measure_module,
    own_share,
    shown_batches,
    whole,
)
from care_compress.files import digest_of, write_text
from care_compress.model.checkpoint import state_digest
from care_compress.model.compact import CompactCare
from care_compress.model.predictor import Predictor
from care_compress.quantize.artifact import load_quantized
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.spec import Plan
from care_compress.quantize.stages import Judge, made_from_network
from care_compress.recipe.recipe import Recipe
from care_compress.run.context import RunContext
from care_compress.run.processes import World
from care_compress.run.stages import Json, once, recipe_parts
from care_compress.runtime.artifact import open_predictor
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.tasks.known import task_called
from care_compress.tasks.task import Pair, Score

SEEN_FILE = "validation.digests"


@dataclass(frozen=True)
class Candidate:
    """A quantized model and how it did beside the float one."""

    name: str  # ptq, qat
    path: Path
    paired: Pair
    plan: Plan | None  # of a backend that leaves its placement to the recipe's rules


@dataclass(frozen=True)
class Scores:
    """How the models of a run did, and which of them is kept."""

    accuracy: Score  # of the kept one, or of the float model where nothing was quantized
    candidates: tuple[Candidate, ...] = ()
    best: Candidate | None = None


def score(
    context: RunContext,
    recipe: Recipe,
    compact: CompactCare,
    tried: Sequence[Candidate],
    validation: Samples,
) -> Scores:
    """Choose the quantized model to keep; without any, measure the float one."""
    if not tried:
        return Scores(_float_accuracy(context, recipe, compact, validation))
    # The last one, whatever its number: chosen by that, it would be too good. Only where it is
    # beyond doubt worse than the one it started from is that one kept.
    best = tried[-1]
    for one in tried[:-1]:
        if best.paired.is_below(one.paired):
            best = one
    before, console = tried[0].paired.baseline, context.console
    shown = task_called(recipe.task).shown
    table = Table(title=f"On {before.images:,} validation images", title_justify="left")
    table.add_column("model")
    for column in (*shown.values(), "drop [95 %]", "same answer", "logit SQNR"):
        table.add_column(column, justify="right")
    table.add_row("float", *(f"{before.metrics()[key]:.2f} %" for key in shown), "", "", "")
    for one in tried:
        paired, (low, high) = one.paired, one.paired.drop_ci95
        table.add_row(
            f"{one.name} (kept)" if one is best else one.name,
            *(f"{paired.candidate.metrics()[key]:.2f} %" for key in shown),
            f"{paired.drop:.2f} [{low:.2f}, {high:.2f}]",
            f"{paired.agreement:.2f} %",
            f"{paired.distance.sqnr_db:.1f} dB",
        )
    console.print(table)
    if best is not tried[-1]:
        console.print(
            f"[yellow]{tried[-1].name} ended below {best.name}[/], so the {best.name} weights "
            "are kept; try a lower quantize.qat.learning_rate"
        )
    console.print(f"quantized model: {escape(str(best.path))}", soft_wrap=True)
    return Scores(best.paired.candidate, tuple(tried), best)


def _float_accuracy(
    context: RunContext, recipe: Recipe, compact: CompactCare, validation: Samples
) -> Score:
    """Measure the model of a recipe that quantizes nothing."""
    task = task_called(recipe.task)

    def measure() -> Json:
        chosen = spread_indices(len(validation), recipe.evaluate.images)
        with context.stage("evaluate"):
            share = own_share(chosen, _batch_size(context, recipe), context.world)
            mine = measure_module(context, recipe, compact, validation, share, context.seen)
            _keep_seen(context, validation)
            return task.record_of_score(whole(context.world.gathered(mine)))

    made_from = {
        **recipe_parts(recipe)["evaluate"],
        "float model": state_digest(compact.state_dict()),
        "validation images": validation.content_digest(),
    }
    return task.score_of(once(context, "evaluate", made_from, measure, together=True))


def evaluated(
    context: RunContext,
    recipe: Recipe,
    name: str,
    path: Path,
    compact: CompactCare,
    validation: Samples,
) -> Candidate:
    """Read a quantized model that was written, and measure it beside the float one."""
    section, device = recipe.quantize, context.world.device
    assert section is not None
    task = task_called(recipe.task)
    simulated = None if section.backend == "nncf" else load_quantized(path)

    def measure() -> Json:
        if simulated is None:
            predict = open_predictor(str(path), device)
        else:
            predict = TorchPredictor(simulated, simulated.num_classes, device)
        return task.record_of(_compared(context, recipe, compact, predict, validation))

    made_from = {
        **recipe_parts(recipe)["evaluate"],
        **made_from_network(section, compact),
        "model": digest_of(path),
        "validation images": validation.content_digest(),
    }
    record = once(context, f"evaluate {name}", made_from, measure, together=True)
    plan = None if simulated is None else simulated.plan
    return Candidate(name, path, task.pair_of(record), plan)


def judging(context: RunContext, recipe: Recipe, compact: CompactCare) -> Judge:
    """Return what the search for bits calls, in the main process alone; the others wait for it."""

    def judge(model: QuantizedCare, samples: Samples, indices: Sequence[int]) -> float:
        # Made anew each time: the context counts seconds for the stage that is under way.
        alone = replace(context, world=World(device=context.world.device))
        predict = TorchPredictor(model, model.num_classes, alone.world.device)
        return _compared(alone, recipe, compact, predict, samples, indices).drop

    return judge


def _compared(
    context: RunContext,
    recipe: Recipe,
    compact: CompactCare,
    model: Predictor,
    samples: Samples,
    indices: Sequence[int] | None = None,
) -> Pair:
    """Compare a quantized model with the float one; on those validation images the recipe says.

    `indices` are of other images, on which something is chosen.
    """
    world, size = context.world, _batch_size(context, recipe)
    chosen = indices or spread_indices(len(samples), recipe.evaluate.images)
    with context.stage("evaluate"):
        batches = shown_batches(
            samples,
            recipe.data,
            size,
            indices=own_share(chosen, size, world),
            bad=context.bad,
            console=context.console,
            device=world.device,
            contents=None if indices or len(context.seen) else context.seen,
        )
        baseline = TorchPredictor(compact, len(samples.classes), world.device)
        with contextlib.closing(batches):  # both models see each image, decoded once
            mine = task_called(recipe.task).count_pairs(baseline, model, batches)
        if indices is None:
            _keep_seen(context, samples)
        first, *others = world.gathered(mine)
        return sum(others, first).settled()


def _batch_size(context: RunContext, recipe: Recipe) -> int:
    return images_at_once(recipe.evaluate.batch_size, context.world.device)


def _keep_seen(context: RunContext, validation: Samples) -> None:
    """Tell every process what all have seen; the main one keeps it, as a part of the scores."""
    context.seen.take(context.world.gathered(context.seen))
    if context.world.is_main and len(context.seen):
        # With the images' own digest: a run that takes these scores over takes this over, too.
        text = f"{validation.content_digest()}\n{context.seen.as_text()}\n"
        write_text(context.run.path / SEEN_FILE, text)
        context.run.record_output(context.run.path / SEEN_FILE)


def seen_images(context: RunContext, validation: Samples) -> Contents:
    """Return digests of the validation images, of this run or the one whose scores it took over."""
    path = context.run.path / SEEN_FILE
    if not len(context.seen) and path.is_file():
        known, _, text = path.read_text(encoding="utf-8").strip().partition("\n")
        if known == validation.content_digest():
            return Contents.of_text(text)
    return context.seen
