"""What several models answer to the same images, in one pass: each image is decoded once.

Kept are a few bytes for each image and model, so memory is that of the batches.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from care_compress.data.loader import Batch
from care_compress.errors import DataError, EvaluationError
from care_compress.evaluate.accuracy import hits_of
from care_compress.predictor import Predictor
from care_compress.quantize.distance import Distance

NO_ANSWER = -1  # NaN or infinity among the logits


@dataclass(frozen=True)
class Answers:
    """One model's answers, in the order of the images."""

    first: NDArray[np.int32]  # the class answered, or NO_ANSWER
    right: NDArray[np.bool_]
    in_top5: NDArray[np.bool_]
    confidence: NDArray[np.float32]  # of the class answered
    distance: Distance  # of the logits to the baseline's
    broken: int = 0  # answers that are NaN or infinite somewhere; they count as wrong

    @property
    def top1(self) -> float:
        """Percent right."""
        return 100 * float(self.right.mean())

    @property
    def top5(self) -> float:
        """Percent with the label among the first five."""
        return 100 * float(self.in_top5.mean())

    @property
    def sqnr_db(self) -> float | None:
        """Distance of the logits to the baseline's; None for the baseline itself."""
        return self.distance.known_db


@dataclass(frozen=True)
class Collected:
    """All answers to one list of images."""

    labels: NDArray[np.int64]
    indices: NDArray[np.int64]  # positions in the data set
    answers: dict[str, Answers]


class _Growing:
    """One model's answers so far."""

    def __init__(self) -> None:
        self.parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.distance = Distance()
        self.broken = 0

    def add(self, logits: Tensor, labels: Tensor, baseline: Tensor) -> None:
        hits = hits_of(logits, labels)
        odds = logits.float().softmax(dim=1)
        first = logits.argmax(dim=1)
        # No answer is no confidence either; NaN would spoil the calibration error of all.
        confidence = odds.gather(1, first[:, None]).squeeze(1).masked_fill(hits.broken, 0.0)
        first = first.masked_fill(hits.broken, NO_ANSWER)
        self.parts.append((first.int(), hits.first, hits.in_top5, confidence))
        sound = ~hits.broken & torch.isfinite(baseline).all(dim=1)
        self.distance.add(baseline[sound], logits[sound])
        self.broken += int(hits.broken.sum())

    def done(self) -> Answers:
        first, right, top5, confidence = (
            torch.cat(column).numpy() for column in zip(*self.parts, strict=True)
        )
        return Answers(first, right, top5, confidence, self.distance, self.broken)


@torch.inference_mode()
def collect_answers(
    models: Mapping[str, Predictor],
    baseline_of: Mapping[str, str],
    batches: Iterable[Batch],
    progress: Callable[[int], None],
) -> Collected:
    """Run every model over all prepared batches; `baseline_of` says whom each is compared with."""
    growing = {name: _Growing() for name in models}
    labels, indices = [], []
    for batch in batches:
        logits = {name: predict(batch.images).cpu() for name, predict in models.items()}
        for name, value in logits.items():
            growing[name].add(value, batch.labels, logits[baseline_of[name]])
        labels.append(batch.labels)
        indices.append(batch.indices)
        progress(len(batch.labels))
    if not labels:
        raise DataError("there was no image to evaluate.", "check the source and its val split")
    found = {name: one.done() for name, one in growing.items()}
    for name, one in found.items():
        if one.broken == len(one.right):
            raise EvaluationError(
                f"{name} answers NaN or infinity to all {one.broken:,} images.",
                "leave it out by --targets, and check the run that made it",
            )
    return Collected(torch.cat(labels).numpy(), torch.cat(indices).numpy(), found)
