"""Top-1 and top-5 of any predictor, streaming: memory does not grow with the number of images."""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor

from care_compress.data.loader import CPU, BadImages, Batch, prepared_batches
from care_compress.data.samples import Samples
from care_compress.errors import DataError
from care_compress.predictor import Predictor
from care_compress.progress import progress_bar
from care_compress.sections import DataSection
from care_compress.train.distributed import World


@dataclass(frozen=True)
class Accuracy:
    """Counts over a set of images."""

    images: int
    correct: int
    correct_in_top5: int

    def __add__(self, other: "Accuracy") -> "Accuracy":
        """Counts over both sets."""
        return Accuracy(
            self.images + other.images,
            self.correct + other.correct,
            self.correct_in_top5 + other.correct_in_top5,
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
        """How many images; none is an error."""
        if self.images == 0:
            raise DataError("there was no image to evaluate.", "check the source and its val split")
        return self.images


NOTHING = Accuracy(0, 0, 0)


def spread_indices(count: int, wanted: int | None) -> list[int]:
    """`wanted` of `count` images, evenly spaced: the first of a folder are all of one class."""
    chosen = min(wanted or count, count)
    return [i * count // chosen for i in range(chosen)]


def own_share(indices: Sequence[int], batch_size: int, world: World) -> Sequence[int]:
    """One process's part of these images: whole batches, so that any number finds the same."""
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
) -> Accuracy:
    """Accuracy of `predict` on these images of a data set."""
    batches = prepared_batches(samples, data, batch_size, bad=bad, indices=indices, device=device)
    with (
        contextlib.closing(batches),
        progress_bar(console, "evaluating", len(indices)) as advance,
    ):
        return count_correct(predict, batches, advance)


def count_correct(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    progress: Callable[[int], None] = lambda images: None,
) -> Accuracy:
    """Run `predict` over all prepared batches."""
    found = NOTHING
    for batch in batches:
        found += count_batch(predict, batch)
        progress(len(batch.labels))
    return found


@torch.inference_mode()
def count_batch(predict: Callable[[Tensor], Tensor], batch: Batch) -> Accuracy:
    """Run `predict` over one prepared batch."""
    logits = predict(batch.images)
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = ranked.cpu() == batch.labels[:, None]
    return Accuracy(len(batch.labels), int(hits[:, 0].sum()), int(hits.sum()))
