"""How any predictor does on the images of a data set, by the metric of its task."""

import contextlib
import math
from collections.abc import Generator, Iterable, Mapping, Sequence

import torch
from rich.console import Console
from torch import nn

from care_compress.console import CheckResult, progress_bar
from care_compress.data.checks import Contents
from care_compress.data.loader import CPU, BadImages, Batch, images_at_once, prepared_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.errors import DataError
from care_compress.model.predictor import Predictor
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import DataSection
from care_compress.run.context import RunContext
from care_compress.run.processes import World
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.tasks.known import task_called
from care_compress.tasks.task import Predict, Score, Task
from care_compress.train.loop import Validate


def own_share(indices: Sequence[int], batch_size: int, world: World) -> Sequence[int]:
    """Return one process's images: whole batches, so that any number finds the same."""
    first, last = world.share(math.ceil(len(indices) / batch_size))
    return indices[first * batch_size : last * batch_size]


def measure_accuracy(
    task: Task,
    predict: Predictor,
    samples: Samples,
    data: DataSection,
    *,
    batch_size: int,
    indices: Sequence[int],
    bad: BadImages,
    console: Console,
    device: torch.device = CPU,
    contents: Contents | None = None,
) -> Score | None:
    """Measure `predict` on these images of a data set; none if not one can be decoded.

    `contents` takes digests of the images.
    """
    batches = shown_batches(
        samples,
        data,
        batch_size,
        indices=indices,
        bad=bad,
        console=console,
        device=device,
        contents=contents,
    )
    with contextlib.closing(batches):
        return count(task, predict, batches)


@torch.inference_mode()
def count(task: Task, predict: Predict, batches: Iterable[Batch]) -> Score | None:
    """Run `predict` over all prepared batches."""
    return total(task.count(predict(batch.images), batch) for batch in batches)


def total(parts: Iterable[Score | None]) -> Score | None:
    """Add the scores of several batches or processes, some of which may have none."""
    found = [part for part in parts if part is not None]
    return sum(found[1:], found[0]) if found else None


def whole(parts: Iterable[Score | None]) -> Score:
    """Add them where there has to be one."""
    found = total(parts)
    if found is None:
        raise DataError("there was no image to evaluate.", "check the source and its val split")
    return found


def shown_batches(
    samples: Samples,
    data: DataSection,
    batch_size: int,
    *,
    indices: Sequence[int],
    bad: BadImages,
    console: Console,
    device: torch.device,
    contents: Contents | None,
) -> Generator[Batch]:
    """Yield prepared batches of these images and show how many are through; close it."""
    batches = prepared_batches(
        samples, data, batch_size, bad=bad, indices=indices, device=device, contents=contents
    )
    with (
        contextlib.closing(batches),
        progress_bar(console, "evaluating", len(indices)) as advance,
    ):
        for batch in batches:
            yield batch
            advance(len(batch.labels))


def answers_check(scores: Mapping[str, Score]) -> CheckResult:
    """Check that every answer of these models is a number."""
    bad = {name: one for name, one in scores.items() if one.broken}
    if not bad:
        return CheckResult("answers", "fine", "every logit of every model measured is finite")
    items = tuple(f"{name}: {one.broken:,} of {one.images:,}" for name, one in bad.items())
    return CheckResult(
        "answers", "warning", "some logits are NaN or infinite; those images count as wrong", items
    )


def metrics_line(task: Task, score: Score) -> list[str]:
    """Every metric in words, the one that counts first."""
    return [f"{task.shown[key]} {value:.2f} %" for key, value in score.metrics().items()]


def validating(context: RunContext, recipe: Recipe, validation: Samples) -> Validate:
    """Return what a training calls to know how it is doing."""

    def validate(candidate: nn.Module) -> Score | None:
        chosen = spread_indices(len(validation), recipe.evaluate.images)
        share = chosen[slice(*context.world.share(len(chosen)))]
        return measure_module(context, recipe, candidate, validation, share)

    return validate


def measure_module(
    context: RunContext,
    recipe: Recipe,
    model: nn.Module,
    validation: Samples,
    indices: Sequence[int],
    contents: Contents | None = None,
) -> Score | None:
    """Measure a torch module on these validation images, all by this process."""
    return measure_accuracy(
        task_called(recipe.task),
        TorchPredictor(model, len(validation.classes), context.world.device),
        validation,
        recipe.data,
        batch_size=images_at_once(recipe.evaluate.batch_size, context.world.device),
        indices=indices,
        bad=context.bad,
        console=context.console,
        device=context.world.device,
        contents=contents,
    )
