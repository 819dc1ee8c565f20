"""A model beside its baseline on the same images: drop with its interval, agreement, distance."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from care_compress.data.loader import Batch
from care_compress.errors import DataError, EvaluationError
from care_compress.evaluate.accuracy import NOTHING, Accuracy, hits_of
from care_compress.evaluate.intervals import drop_interval
from care_compress.model.predictor import Predictor
from care_compress.quantize.distance import Distance

BINS = 15
NO_ANSWER = -1  # NaN or infinity among the logits


def changes(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[int, int]:
    """Count images that were right and are wrong now, and the other way round."""
    return int((before & ~after).sum()), int((~before & after).sum())


def calibration_error(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> float:
    """ECE in points: |accuracy - confidence| in 15 bins of confidence, weighted by their images."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(place, weights=right - confidence.astype(float), minlength=BINS)
    return float(100 * np.abs(gap).sum() / len(confidence))


@dataclass(frozen=True)
class Drop:
    """Top-1 lost against the baseline, in points, with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def between(cls, before: NDArray[np.bool_], after: NDArray[np.bool_]) -> "Drop":
        """Compare answers to the same images: whether each was right."""
        lost, gained = changes(before, after)
        images = len(before)
        return cls(100 * (lost - gained) / images, *drop_interval(lost, gained, images))

    def __str__(self) -> str:
        return f"drop {self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Paired:
    """Counts over images that both models answered."""

    baseline: Accuracy
    candidate: Accuracy
    lost: int  # right before, wrong now
    gained: int  # wrong before, right now
    agreeing: int  # same answer, right or wrong
    distance: Distance  # of the logits

    def __add__(self, other: "Paired") -> "Paired":
        """Counts over both sets of images."""
        return Paired(
            self.baseline + other.baseline,
            self.candidate + other.candidate,
            self.lost + other.lost,
            self.gained + other.gained,
            self.agreeing + other.agreeing,
            self.distance + other.distance,
        )

    @property
    def images(self) -> int:
        """How many, if any: a share of few images may be empty, the whole may not."""
        return self.baseline.counted()

    @property
    def drop(self) -> float:
        """Baseline top-1 minus candidate top-1, in points."""
        return 100 * (self.lost - self.gained) / self.images

    @property
    def drop_ci95(self) -> tuple[float, float]:
        """95 % interval of the drop, in points; far narrower than those of the two accuracies."""
        return drop_interval(self.lost, self.gained, self.images)

    @property
    def agreement(self) -> float:
        """Percent of images with the same answer."""
        return 100 * self.agreeing / self.images

    def as_json(self) -> dict[str, Any]:
        """The numbers as ``results.json`` holds them; points in percent."""
        return {
            "images": self.candidate.images,
            "top1": self.candidate.top1,
            "top5": self.candidate.top5,
            "drop": self.drop,
            "drop_ci95": list(self.drop_ci95),
            "agreement": self.agreement,
            "sqnr_db": self.distance.known_db,
        }


@torch.inference_mode()
def count_pairs(
    baseline: Callable[[Tensor], Tensor],
    candidate: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
) -> Paired:
    """Run both over all prepared batches and count."""
    lost = gained = agreeing = 0
    scores = [NOTHING, NOTHING]
    distance = Distance()
    for batch in batches:
        logits = [model(batch.images).cpu() for model in (baseline, candidate)]
        hits = [hits_of(one, batch.labels) for one in logits]
        scores = [so_far + one.counted() for so_far, one in zip(scores, hits, strict=True)]
        lost += int((hits[0].first & ~hits[1].first).sum())
        gained += int((~hits[0].first & hits[1].first).sum())
        # What is no number agrees with nothing, and has no distance.
        sound = ~(hits[0].broken | hits[1].broken)
        before, after = (one[sound] for one in logits)
        agreeing += int((before.argmax(dim=1) == after.argmax(dim=1)).sum())
        distance.add(before, after)
    return Paired(scores[0], scores[1], lost, gained, agreeing, distance)


@dataclass(frozen=True)
class Answers:
    """One model's answers, in the order of the images."""

    first: NDArray[np.int32]  # the class answered, or NO_ANSWER
    right: NDArray[np.bool_]
    in_top5: NDArray[np.bool_]
    confidence: NDArray[np.float32]  # of the class answered
    distance: Distance  # of the logits to the baseline's

    @property
    def broken(self) -> int:
        """Answers that are NaN or infinite somewhere; they count as wrong."""
        return int((self.first == NO_ANSWER).sum())

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


def alike(before: Answers, after: Answers) -> NDArray[np.bool_]:
    """Which images both answered the same; what is no number agrees with nothing."""
    same: NDArray[np.bool_] = (before.first == after.first) & (before.first != NO_ANSWER)
    return same


def same_answers(before: Answers, after: Answers) -> float:
    """Return the percent of images that both answered the same."""
    return 100 * float(alike(before, after).mean())


@dataclass(frozen=True)
class Collected:
    """All answers to one list of images."""

    labels: NDArray[np.int64]
    indices: NDArray[np.int64]  # positions in the data set
    answers: dict[str, Answers]


@torch.inference_mode()
def collect_answers(
    models: Mapping[str, Predictor],
    baseline_of: Mapping[str, str],
    batches: Iterable[Batch],
    progress: Callable[[int], None],
) -> Collected:
    """Run every model over all prepared batches; `baseline_of` says whom each is compared with.

    Each image is decoded once for all of them. A few bytes are held for each image and model, so
    memory is that of the batches.
    """
    parts: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in models}
    distances = {name: Distance() for name in models}
    labels, indices = [], []
    for batch in batches:
        logits = {name: predict(batch.images).cpu() for name, predict in models.items()}
        for name, value in logits.items():
            hits, top = hits_of(value, batch.labels), value.argmax(dim=1, keepdim=True)
            odds = value.float().softmax(dim=1).gather(1, top).squeeze(1)
            answer = top.squeeze(1).masked_fill(hits.broken, NO_ANSWER).int()
            # No answer is no confidence either; NaN would spoil the calibration error of all.
            sure = odds.masked_fill(hits.broken, 0.0)
            parts[name].append((answer, hits.first, hits.in_top5, sure))
            baseline = logits[baseline_of[name]]
            sound = ~hits.broken & torch.isfinite(baseline).all(dim=1)
            distances[name].add(baseline[sound], value[sound])
        labels.append(batch.labels)
        indices.append(batch.indices)
        progress(len(batch.labels))
    if not labels:
        raise DataError("there was no image to evaluate.", "check the source and its val split")
    found = {}
    for name, columns in parts.items():
        first, right, in_top5, confidence = (
            torch.cat(column).numpy() for column in zip(*columns, strict=True)
        )
        one = Answers(first, right, in_top5, confidence, distances[name])
        if one.broken == len(right):
            raise EvaluationError(
                f"{name} answers NaN or infinity to all {one.broken:,} images.",
                "leave it out by --targets, and check the run that made it",
            )
        found[name] = one
    return Collected(torch.cat(labels).numpy(), torch.cat(indices).numpy(), found)
