"""What the line asks of a task; each file beside this one answers for one of them.

A task says where its labels come from, what a training minimises, and how the answers of one model,
or of two on the same images, are counted. Nothing else of the line knows which task it works on.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from care_compress.data.listing import Split
from care_compress.data.loader import Batch
from care_compress.data.samples import Samples
from care_compress.model.care import Care
from care_compress.model.predictor import Predictor
from care_compress.recipe.sections import DataSection, DistillSection, TrainSection
from care_compress.recipe.sections import Task as TaskName
from care_compress.tasks.distance import Distance

Targets = Any  # of a batch, as the task's own losses take them


class Metric(NamedTuple):
    """What accuracy is for a task, in percent."""

    key: str  # in JSON
    name: str  # in tables
    of_class: str  # what it is of one class


class Same(NamedTuple):
    """What of two models' answers can be the same."""

    name: str  # of a column: same answer
    things: str  # in a sentence: 99 % of answers the same


class CardWords(NamedTuple):
    """How a model card tells of the task, in the Hub's words."""

    tag: str  # of the Hub: image-classification
    metric: str  # of the Hub: accuracy
    said: str  # that metric in words
    noun: str  # what a model is
    program: str  # what the programs of the card are called
    answer: str  # Python that tells `outputs` of `picture`


class Drawn(NamedTuple):
    """An answer drawn on its image."""

    picture: Image.Image
    legend: dict[str, tuple[int, int, int]]  # what a colour means, where the drawing does not say


class Lesson(NamedTuple):
    """Which step of which training it is."""

    plan: TrainSection
    num_classes: int
    seed: int
    step: int


class Outcome(NamedTuple):
    """Loss of one batch, and the answers accuracy is counted on."""

    loss: Tensor
    logits: Tensor


class Objective(Protocol):
    """Maps (model, images, targets, part of the training done) to a loss."""

    def __call__(
        self, model: nn.Module, images_BCHW: Tensor, targets: Targets, progress: float, /
    ) -> Outcome:
        """Run the model forward and return the loss to minimise."""
        ...


@dataclass(frozen=True)
class Drop:
    """What of the metric was lost against the baseline, in points, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"drop {self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


class Score(Protocol):
    """How one model did on some images; those of several processes add up."""

    @property
    def images(self) -> int:
        """How many images."""
        ...

    @property
    def broken(self) -> int:
        """How many answers hold NaN or infinity; they count as wrong."""
        ...

    def __add__(self, other: Any) -> Self:
        """Score over both sets of images."""
        ...

    def metrics(self) -> dict[str, float]:
        """Every metric in percent, by its key, the one that counts first."""
        ...


def value_of(score: Score, metric: Metric) -> float:
    """Return the metric in percent; 0 of a model whose answers are no numbers at all."""
    return 0.0 if score.broken == score.images else score.metrics()[metric.key]


class Pair(Protocol):
    """A model beside its baseline on the same images, as numbers that can be written down."""

    @property
    def baseline(self) -> Score:
        """How the baseline did."""
        ...

    @property
    def candidate(self) -> Score:
        """How the model did."""
        ...

    @property
    def distance(self) -> Distance:
        """Distance of the raw answers."""
        ...

    @property
    def drop(self) -> float:
        """The metric of the baseline minus that of the candidate, in points."""
        ...

    @property
    def drop_ci95(self) -> tuple[float, float]:
        """95 % interval of the drop."""
        ...

    @property
    def agreement(self) -> float:
        """Percent of answers that are the baseline's."""
        ...

    def is_below(self, other: Any) -> bool:
        """Whether the candidate is beyond doubt worse than that of another pair."""
        ...

    def as_json(self) -> dict[str, Any]:
        """The numbers as ``results.json`` holds them."""
        ...


class Counted(Protocol):
    """Two models on some images; what several processes counted adds up."""

    def __add__(self, other: Any) -> Self:
        """Count over both sets of images."""
        ...

    def settled(self) -> Pair:
        """Return the numbers."""
        ...


class Answers(Protocol):
    """One model's answers to a list of images."""

    def __add__(self, other: Any) -> Self:
        """Answers to both lists of images."""
        ...

    @property
    def broken(self) -> int:
        """How many of them hold NaN or infinity."""
        ...

    @property
    def sqnr_db(self) -> float | None:
        """Distance of the raw answers to the baseline's; None for the baseline itself."""
        ...

    def metrics(self) -> dict[str, float]:
        """Every metric in percent, by its key, the one that counts first."""
        ...

    def intervals(self) -> dict[str, tuple[float, float]]:
        """95 % interval of this model's own metric, as ``compare.json`` holds it.

        None where the metric and the number of images tell it (`Task.interval`).
        """
        ...

    def drop_to(self, after: Any) -> Drop:
        """Return what another model lost on these images."""
        ...

    def agreement(self, after: Any) -> float:
        """Return the percent of another model's answers that are the same."""
        ...

    def details(
        self,
        after: Any,
        names: tuple[str, str],
        images: "Collected[Any]",
        classes: Sequence[str],
    ) -> dict[str, Any]:
        """What else is known of two models, as ``compare.json`` holds it."""
        ...


Model = TypeVar("Model", bound=Answers)


@dataclass(frozen=True)
class Collected(Generic[Model]):
    """All answers to one list of images."""

    labels: NDArray[np.int64]
    indices: NDArray[np.int64]  # positions in the data set
    answers: Mapping[str, Model]

    def __len__(self) -> int:
        """How many images."""
        return len(self.indices)


Predict = Callable[[Tensor], Tensor]


class Task(Protocol):
    """One task."""

    name: TaskName
    metric: Metric
    shown: Mapping[str, str]  # metrics in tables, by key
    paired: Mapping[str, str]  # what tables say of two models beside the drop, by key
    same: Same
    card: CardWords
    recipes: str  # what names of its shipped recipes begin with
    how_sure: str  # where the intervals come from
    kind: type[Care]  # of network
    unused: frozenset[str]  # keys of a recipe's data section that change nothing
    keeps_counts: bool  # whether a score is so small that it is written down on the way

    def samples(self, data: DataSection, split: Split) -> Samples:
        """Open the images of one split with the labels of this task."""
        ...

    def told(self, value: float, images: int) -> str:
        """Say how a model did by the metric that counts."""
        ...

    def interval(self, value: float, images: int) -> tuple[float, float] | None:
        """95 % interval of the metric of one model; None where these two do not tell it."""
        ...

    def draw(
        self, image: Image.Image, answer: Tensor, resolution: int, classes: Sequence[str]
    ) -> Drawn | None:
        """Draw the answer to an image, given at a square of this size; None where a word says it.

        `image` is as it was stored, upright where the network saw it so.
        """
        ...

    def check_training(self, section: TrainSection) -> None:
        """Raise TrainingError for what this task cannot be trained with."""
        ...

    def targets(self, batch: Batch, images_BCHW: Tensor, lesson: Lesson) -> tuple[Tensor, Targets]:
        """Return what a training step sees: images, mixed where the recipe says so, and targets."""
        ...

    def objective(self, distill: DistillSection | None, teacher: Predictor | None) -> Objective:
        """Return what training from labels minimises."""
        ...

    def loss(self, answer: Tensor, targets: Targets) -> Tensor:
        """Return the loss of what is deployed, by the labels."""
        ...

    def loss_of_images(self, answer: Tensor, batch: Batch) -> Tensor:
        """Return the sum over images of each one's own loss, as they are shown for evaluation."""
        ...

    def along(self, answer: Tensor, generator: torch.Generator) -> Tensor:
        """Return what is answered along a random direction, in units that count alike.

        The mean square of its gradient tells how much an error inside the network costs.
        """
        ...

    def weighed(self, answer: Tensor, reference: Tensor) -> Tensor:
        """Return an answer in units in which equal errors near the reference cost alike."""
        ...

    def lost(self, before: Any, after: Any) -> float:
        """Return by how many points of the metric a score is below another on the same images."""
        ...

    def following(self, answer: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Return the distance of a compressed model's answer from its teacher's."""
        ...

    def running_score(self, answer: Tensor, batch: Batch) -> float | None:
        """Return percent right in one training batch, for the eye; none where that means little."""
        ...

    def count(self, answer: Tensor, batch: Batch) -> Score:
        """Count one model's answers to a batch."""
        ...

    def count_pairs(
        self, baseline: Predict, candidate: Predict, batches: Iterable[Batch]
    ) -> Counted:
        """Run both models over all prepared batches and count."""
        ...

    def score_of(self, record: Any) -> Score:
        """Read what `record_of_score` wrote."""
        ...

    def record_of_score(self, score: Score) -> Any:
        """Return a score as JSON."""
        ...

    def pair_of(self, record: Any) -> Pair:
        """Read what `record_of` wrote."""
        ...

    def record_of(self, pair: Pair) -> Any:
        """Return a pair as JSON."""
        ...

    def collect(
        self,
        models: Mapping[str, Predict],
        baseline_of: Mapping[str, str],
        batches: Iterable[Batch],
        progress: Callable[[int], None],
    ) -> "Collected[Any]":
        """Run every model over all prepared batches; `baseline_of` says whom each is beside."""
        ...

    def rows(self, answer: Tensor) -> Tensor:
        """Return an answer as rows of class scores, of which the highest is what is answered."""
        ...
