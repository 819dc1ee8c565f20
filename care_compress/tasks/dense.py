"""What tasks with an answer for every place have in common: how answers are kept and compared.

Each image leaves a small record, such as the pixels of each class that were right. Everything that
is told of a set of images, or of two models on the same ones, is made of the records.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch import Tensor, nn

from care_compress.data.annotations import Annotation, annotated_size
from care_compress.data.letterbox import Letterbox
from care_compress.data.loader import Batch
from care_compress.errors import DataError, EvaluationError, TrainingError
from care_compress.model.predictor import Predictor
from care_compress.recipe.sections import DistillSection, TrainSection
from care_compress.tasks.distance import Distance
from care_compress.tasks.intervals import Interval, negated, sum_interval
from care_compress.tasks.task import (
    Collected,
    Drop,
    Lesson,
    Objective,
    Outcome,
    Predict,
    Score,
    Targets,
    Task,
    value_of,
)

Record = Any  # of one image: what the task wants to know of it later
LISTED = 100  # images that differ most, in ``compare.json``


@dataclass(frozen=True)
class Figures:
    """How one model did, as numbers; a score that adds up no more."""

    images: int
    broken: int
    values: dict[str, float]  # in percent, the one that counts first
    per_class: tuple[float | None, ...]  # of that one; None for a class that no image shows

    def __add__(self, other: Any) -> "Figures":
        """Records add up, numbers do not."""
        raise TypeError("figures of two sets of images have no sum")

    def metrics(self) -> dict[str, float]:
        """Every metric in percent."""
        return self.values


@dataclass(frozen=True)
class Compared:
    """Two models on the same images, as numbers."""

    baseline: Figures
    candidate: Figures
    drop: float
    drop_ci95: tuple[float, float]
    agreement: float
    distance: Distance

    def is_below(self, other: "Compared") -> bool:
        """Whether the candidate is beyond doubt worse than that of another pair.

        Both were compared with one baseline, so their difference is surer than this says.
        """
        mine: Interval = self.drop, *self.drop_ci95
        its: Interval = other.drop, *other.drop_ci95
        return sum_interval(mine, negated(its))[1] > 0

    def as_json(self) -> dict[str, Any]:
        """The numbers as ``results.json`` holds them."""
        return {
            "images": self.candidate.images,
            **self.candidate.values,
            "drop": self.drop,
            "drop_ci95": list(self.drop_ci95),
            "agreement": self.agreement,
            "sqnr_db": self.distance.known_db,
        }


class DenseTask(Task):
    """A task whose answers have a place; its own file says what a record is."""

    unused = frozenset({"crop_pct"})  # images are letterboxed
    keeps_counts = False
    paired: Mapping[str, str] = {}
    how_sure = (
        "Intervals come from drawing the images anew many times. That of a drop is far narrower "
        "than that of one model: both are on the same draws. What none of these images could show "
        "is added to it."
    )

    @abstractmethod
    def record(self, answer: Tensor, annotation: Annotation, resolution: int) -> Record:
        """Return what is to be known of one image, given the answer at a square of this size."""

    @abstractmethod
    def targets_of(
        self, annotations: Sequence[Annotation], device: torch.device, smoothing: float
    ) -> Targets:
        """Return what the loss takes, of annotations in pixels of the network's square."""

    @abstractmethod
    def is_broken(self, record: Record) -> bool:
        """Whether the answer was no number somewhere."""

    @abstractmethod
    def figures(self, records: Sequence[Record]) -> Figures:
        """Return how a model did on all these images."""

    @abstractmethod
    def drop(self, before: Sequence[Record], after: Sequence[Record]) -> Drop:
        """Return what another model lost on the same images."""

    @abstractmethod
    def spread(self, records: Sequence[Record]) -> tuple[float, float]:
        """Return the 95 % interval of a model's own metric, by a bootstrap over images."""

    @abstractmethod
    def agreed(
        self, before: Tensor, after: Tensor, records: Sequence[tuple[Record, Record]]
    ) -> list[tuple[int, int]]:
        """Return for each image of a batch how many things both say, and of how many."""

    def told(self, value: float, images: int) -> str:
        """Say how a model did; no image is right or wrong as a whole."""
        return f"{self.metric.name} {value:.2f} % on {images:,} images"

    def interval(self, value: float, images: int) -> None:
        """What is no share of images has no interval that a number tells."""

    def check_training(self, section: TrainSection) -> None:
        """Raise for what mixes images, or labels that are no classes of images."""
        if section.augment.mixup or section.augment.cutmix:
            raise TrainingError(
                f"{section.place}.augment mixes images, and {self.name} has labels with a place.",
                "leave out mixup and cutmix",
            )
        if section.distill is not None:
            raise TrainingError(
                f"{section.place}.distill is for the classifier's second head.",
                f"leave it out for {self.name}",
            )

    def targets(self, batch: Batch, images_BCHW: Tensor, lesson: Lesson) -> tuple[Tensor, Targets]:
        """Return the images and their labels, which moved with them."""
        smoothing = lesson.plan.label_smoothing
        return images_BCHW, self.targets_of(batch.annotations, images_BCHW.device, smoothing)

    def loss_of_images(self, answer: Tensor, batch: Batch) -> Tensor:
        """Bring the labels into the square, and take each image by itself."""
        side = batch.images.shape[-1]
        losses = []
        for one, annotation in zip(answer, batch.annotations, strict=True):
            shown = Letterbox.of(annotated_size(annotation), side).annotation(annotation)
            losses.append(self.loss(one[None], self.targets_of([shown], answer.device, 0.0)))
        return torch.stack(losses).sum()

    def lost(self, before: Score, after: Score) -> float:
        """Points of the metric; an answer that is no number anywhere has lost all of it."""
        return value_of(before, self.metric) - value_of(after, self.metric)

    def objective(self, distill: DistillSection | None, teacher: Predictor | None) -> Objective:
        """Train by the labels alone."""
        return Direct(self)

    def records(self, answer: Tensor, batch: Batch) -> list[Record]:
        """Return a record of each image of a batch."""
        size, answer = batch.images.shape[-1], answer.detach().float().cpu()
        pairs = zip(answer, batch.annotations, strict=True)
        return [self.record(one, annotation, size) for one, annotation in pairs]

    def count(self, answer: Tensor, batch: Batch) -> "Records":
        """Keep a record of each image."""
        return Records(self, self.records(answer, batch))

    @torch.inference_mode()
    def count_pairs(
        self, baseline: Predict, candidate: Predict, batches: Iterable[Batch]
    ) -> "Both":
        """Run both models, keep records and what both say."""
        both = Both(self, Records(self, []), Records(self, []), [], Distance())
        for batch in batches:
            before, after = (model(batch.images).float().cpu() for model in (baseline, candidate))
            both = both + self._both(before, after, batch)
        return both

    def _both(self, before: Tensor, after: Tensor, batch: Batch) -> "Both":
        mine = self.records(before, batch), self.records(after, batch)
        distance = Distance()
        sound = torch.isfinite(before).flatten(1).all(1) & torch.isfinite(after).flatten(1).all(1)
        distance.add(before[sound], after[sound])
        agreed = self.agreed(before, after, list(zip(*mine, strict=True)))
        return Both(self, Records(self, mine[0]), Records(self, mine[1]), agreed, distance)

    def score_of(self, record: Any) -> Figures:
        """Read figures from JSON."""
        return _FIGURES.validate_python(record)

    def record_of_score(self, score: Any) -> Any:
        """Return figures as JSON."""
        return _FIGURES.dump_python(score.figures, mode="json")

    def pair_of(self, record: Any) -> Compared:
        """Read the numbers of two models from JSON."""
        return _COMPARED.validate_python(record)

    def record_of(self, pair: Any) -> Any:
        """Return them as JSON."""
        return _COMPARED.dump_python(pair, mode="json")

    @torch.inference_mode()
    def collect(
        self,
        models: Mapping[str, Predict],
        baseline_of: Mapping[str, str],
        batches: Iterable[Batch],
        progress: Callable[[int], None],
    ) -> "Collected[DenseAnswers]":
        """Keep a record of each image and model, and how alike it is to its baseline's."""
        answers = {name: DenseAnswers(Records(self, []), [], Distance()) for name in models}
        labels, indices = [], []
        for batch in batches:
            found = {name: predict(batch.images).float().cpu() for name, predict in models.items()}
            for name, answer in found.items():
                both = self._both(found[baseline_of[name]], answer, batch)
                answers[name] += DenseAnswers(both.after, both.agreed, both.distance)
            labels.append(batch.labels)
            indices.append(batch.indices)
            progress(len(batch.labels))
        if not labels:
            raise DataError("there was no image to evaluate.", "check the source and its val split")
        for name, one in answers.items():
            if one.broken == len(one.agreed):
                raise EvaluationError(
                    f"{name} answers NaN or infinity to all {one.broken:,} images.",
                    "leave it out by --targets, and check the run that made it",
                )
        return Collected(torch.cat(labels).numpy(), torch.cat(indices).numpy(), answers)


@dataclass(frozen=True)
class Records:
    """What a model did on some images, by image; as a score it adds up."""

    task: DenseTask
    of_images: list[Record]

    def __add__(self, other: Any) -> "Records":
        """Records of both sets of images."""
        return Records(self.task, [*self.of_images, *other.of_images])

    @property
    def images(self) -> int:
        """How many images."""
        return len(self.of_images)

    @property
    def broken(self) -> int:
        """How many answers are no numbers."""
        return sum(self.task.is_broken(one) for one in self.of_images)

    @cached_property
    def figures(self) -> Figures:
        """The numbers."""
        if not self.of_images:
            raise DataError("there was no image to evaluate.", "check the source and its val split")
        if self.broken == self.images:
            raise EvaluationError(
                f"the model answers NaN or infinity to all {self.images:,} images.",
                "check the checkpoint, data.mean and data.std; a file in float16 may overflow",
            )
        return self.task.figures(self.of_images)

    def metrics(self) -> dict[str, float]:
        """Every metric in percent."""
        return self.figures.values

    @property
    def per_class(self) -> tuple[float | None, ...]:
        """The metric that counts, by class."""
        return self.figures.per_class


@dataclass(frozen=True)
class Both:
    """Two models on some images, by image."""

    task: DenseTask
    before: Records
    after: Records
    agreed: list[tuple[int, int]]
    distance: Distance

    def __add__(self, other: Any) -> "Both":
        """Both sets of images."""
        return Both(
            self.task,
            self.before + other.before,
            self.after + other.after,
            self.agreed + other.agreed,
            self.distance + other.distance,
        )

    def settled(self) -> Compared:
        """Return the numbers."""
        before, after = self.before.figures, self.after.figures  # which say what there is none of
        drop = self.task.drop(self.before.of_images, self.after.of_images)
        return Compared(
            before,
            after,
            drop.value,
            (drop.low, drop.high),
            share_agreed(self.agreed),
            self.distance,
        )


@dataclass(frozen=True)
class DenseAnswers:
    """One model's answers, in the order of the images."""

    score: Records
    agreed: list[tuple[int, int]] = field(repr=False)  # with its baseline
    distance: Distance

    def __add__(self, other: "DenseAnswers") -> "DenseAnswers":
        """Answers to both lists of images."""
        return DenseAnswers(
            self.score + other.score, self.agreed + other.agreed, self.distance + other.distance
        )

    @property
    def broken(self) -> int:
        """How many answers are no numbers."""
        return self.score.broken

    @property
    def sqnr_db(self) -> float | None:
        """Distance of the raw answers to the baseline's; None for the baseline itself."""
        return self.distance.known_db

    def metrics(self) -> dict[str, float]:
        """Every metric in percent."""
        return self.score.metrics()

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Of the metric that counts."""
        task = self.score.task
        return {f"{task.metric.key}_ci95": task.spread(self.score.of_images)}

    def drop_to(self, after: "DenseAnswers") -> Drop:
        """Return what another model lost on these images."""
        return self.score.task.drop(self.score.of_images, after.score.of_images)

    def agreement(self, after: "DenseAnswers") -> float:
        """Return the percent of what another model says that its baseline says, too."""
        return share_agreed(after.agreed)

    def details(
        self,
        after: "DenseAnswers",
        names: tuple[str, str],
        images: Collected[Any],
        classes: Sequence[str],
    ) -> dict[str, Any]:
        """What each class lost, and the images that changed most, the worst first."""
        lost = {}
        every = self.score.figures.per_class, after.score.figures.per_class
        for name, before, now in zip(classes, *every, strict=True):
            if before is not None and now is not None:
                lost[name] = before - now
        shares = np.array([same / of if of else 1.0 for same, of in after.agreed])
        changed: NDArray[np.int64] = np.argsort(shares, kind="stable")
        changed = changed[shares[changed] < 1]
        return {
            "drop_per_class": lost,
            "per_class": {
                name: dict(zip(classes, values, strict=True))
                for name, values in zip(names, every, strict=True)
            },
            "changed": [
                {"index": int(images.indices[i]), "agreement": 100 * float(shares[i])}
                for i in changed[:LISTED]
            ],
            "changed_in_all": len(changed),
        }


class Direct:
    """The loss of what a network gives out, by the labels."""

    def __init__(self, task: DenseTask) -> None:
        self.task = task

    def __call__(
        self, model: nn.Module, images_BCHW: Tensor, targets: Targets, progress: float
    ) -> Outcome:
        """Run the model forward."""
        answer = model(images_BCHW)
        return Outcome(self.task.loss(answer, targets), answer.detach())


def share_agreed(agreed: Sequence[tuple[int, int]]) -> float:
    """Percent of all things said that both say; two models that say nothing agree."""
    same, of = (sum(column) for column in zip(*agreed, strict=True))
    return 100 * same / of if of else 100.0


_FIGURES = TypeAdapter(Figures)
_COMPARED = TypeAdapter(Compared)
