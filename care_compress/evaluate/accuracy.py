"""Top-1 and top-5 of any predictor, streaming: memory does not grow with the number of images."""

import contextlib
import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor, nn

from care_compress.console import CheckResult, progress_bar
from care_compress.data.checks import Contents
from care_compress.data.loader import CPU, BadImages, Batch, images_at_once, prepared_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.errors import DataError, EvaluationError
from care_compress.model.predictor import Predictor
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import DataSection
from care_compress.run.context import RunContext
from care_compress.run.processes import World
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.train.loop import Validate


@dataclass(frozen=True)
class Accuracy:
    """Counts over a set of images."""

    images: int
    correct: int
    correct_in_top5: int
    broken: int = 0  # answers that are NaN or infinite somewhere; they count as wrong

    def __add__(self, other: "Accuracy") -> "Accuracy":
        """Counts over both sets."""
        return Accuracy(
            self.images + other.images,
            self.correct + other.correct,
            self.correct_in_top5 + other.correct_in_top5,
            self.broken + other.broken,
        )

    @property
    def top1(self) -> float:
        """Percent of images whose highest logit is right."""
        return 100 * self.correct / self.counted()

    @property
    def top5(self) -> float:
        """Percent of images whose label is among the five highest logits."""
        return 100 * self.correct_in_top5 / self.counted()

    def counted(self) -> int:
        """Return how many images; none is an error, and so is a model that answers none of them."""
        if self.images == 0:
            raise DataError("there was no image to evaluate.", "check the source and its val split")
        if self.broken == self.images:
            raise EvaluationError(
                f"the model answers NaN or infinity to all {self.images:,} images.",
                "check the checkpoint, data.mean and data.std; a file in float16 may overflow",
            )
        return self.images


NOTHING = Accuracy(0, 0, 0)


def own_share(indices: Sequence[int], batch_size: int, world: World) -> Sequence[int]:
    """Return one process's images: whole batches, so that any number finds the same."""
    first, last = world.share(math.ceil(len(indices) / batch_size))
    return indices[first * batch_size : last * batch_size]


def measure_accuracy(
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
) -> Accuracy:
    """Measure `predict` on these images of a data set; `contents` takes their digests."""
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
        return count_correct(predict, batches)


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


def count_correct(predict: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Accuracy:
    """Run `predict` over all prepared batches."""
    return sum((count_batch(predict, batch) for batch in batches), NOTHING)


@torch.inference_mode()
def count_batch(predict: Callable[[Tensor], Tensor], batch: Batch) -> Accuracy:
    """Run `predict` over one prepared batch."""
    return hits_of(predict(batch.images), batch.labels).counted()


class Hits(NamedTuple):
    """What became of each image of a batch (B,)."""

    first: Tensor
    in_top5: Tensor
    broken: Tensor

    def counted(self) -> Accuracy:
        """Count each of them."""
        return Accuracy(len(self.first), *(int(each.sum()) for each in self))


def hits_of(logits: Tensor, labels: Tensor) -> Hits:
    """Tell right, right among the first five, or no answer; NaN would otherwise rank first."""
    broken = ~torch.isfinite(logits).all(dim=1).cpu()
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu() == labels[:, None]
    return Hits(ranked[:, 0] & ~broken, ranked.any(dim=1) & ~broken, broken)


def answers_check(accuracies: Mapping[str, Accuracy]) -> CheckResult:
    """Check that every answer of these models is a number."""
    bad = {name: one for name, one in accuracies.items() if one.broken}
    if not bad:
        return CheckResult("answers", "fine", "every logit of every model measured is finite")
    items = tuple(f"{name}: {one.broken:,} of {one.images:,}" for name, one in bad.items())
    return CheckResult(
        "answers", "warning", "some logits are NaN or infinite; those images count as wrong", items
    )


def validating(context: RunContext, recipe: Recipe, validation: Samples) -> Validate:
    """Return what a training calls to know how it is doing."""

    def validate(candidate: nn.Module) -> tuple[int, int]:
        chosen = spread_indices(len(validation), recipe.evaluate.images)
        share = chosen[slice(*context.world.share(len(chosen)))]
        accuracy = measure_module(context, recipe, candidate, validation, share)
        return accuracy.images, accuracy.correct

    return validate


def measure_module(
    context: RunContext,
    recipe: Recipe,
    model: nn.Module,
    validation: Samples,
    indices: Sequence[int],
    contents: Contents | None = None,
) -> Accuracy:
    """Measure a torch module on these validation images, all by this process."""
    return measure_accuracy(
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
