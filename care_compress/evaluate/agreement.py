"""Whether a file computes what the model does: logits beside logits, on real images."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor
from torch.fx import Interpreter, Node

from care_compress.data.annotations import Annotation
from care_compress.data.loader import BadImages, Batch, pixel_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.data.transforms import normalize
from care_compress.errors import DataError
from care_compress.model.predictor import Predictor
from care_compress.quantize.placement import QuantizedCare
from care_compress.recipe.sections import DataSection
from care_compress.tasks.distance import sqnr_db
from care_compress.tasks.task import Drop, Task

# Rounding to a step is chaotic: a difference in the last bits of a float moves a value by a whole
# step, and that the next ones. So two exact implementations of one quantized model differ, by how
# much depends on the model: `Rounded` to 16 bits, which is how exactly runtimes requantize, INT8
# differs from itself by 34 dB, W4A4 by 18, a network quantized naively by 21. A file may have twice
# that noise; a wrong scale or a lost pair costs far more.
REQUANTIZED_BITS, HALF_BITS = 16, 11
TWICE_DB = 6.0
MOST_DB = 50.0  # demanded of any file: a float model in float16 reaches 59 to 67
LEAST_AGREEMENT = 99.5
# What is chaotic is rare: most images come out bit for bit, and one that does not may move by far
# more than the average. One other answer among so many or more is therefore allowed.
ONE_OF = 16
# Two classes are a tie where they are closer than so many deviations of an exact implementation.
TIE = 4.0
NO_NUMBERS = "some logits are NaN or infinite"


@dataclass(frozen=True)
class HeldImages:
    """Real images, decoded once: bytes, of which batches are prepared when they are needed."""

    pixels_BCHW: Tensor  # uint8
    labels: Tensor
    data: DataSection
    annotations: tuple[Annotation, ...] = ()  # where labels have a place

    def __len__(self) -> int:
        """How many images."""
        return len(self.pixels_BCHW)

    def as_batch(self) -> Batch:
        """All of them with their labels, for what counts answers."""
        return Batch(self.pixels_BCHW, self.labels, torch.arange(len(self)), self.annotations)

    def only(self, places: Sequence[int]) -> "HeldImages":
        """Return some of them."""
        chosen = list(places)
        annotations = tuple(self.annotations[place] for place in chosen if self.annotations)
        return HeldImages(self.pixels_BCHW[chosen], self.labels[chosen], self.data, annotations)

    def batches(self, size: int) -> Generator[Tensor]:
        """Yield the network's inputs."""
        for pixels in torch.split(self.pixels_BCHW, size):
            yield normalize(pixels, self.data.mean, self.data.std)

    def logits(self, predict: Predictor, size: int = 32) -> Tensor:
        """Return the logits (N, K) of all images."""
        with torch.inference_mode():
            return torch.cat([predict(images).float().cpu() for images in self.batches(size)])


def hold_images(
    samples: Samples,
    data: DataSection,
    count: int | None,
    bad: BadImages,
    indices: Sequence[int] | None = None,
) -> HeldImages:
    """Decode `count` images of a split, evenly spaced, or all of them; or those of `indices`."""
    chosen = spread_indices(len(samples), count) if indices is None else indices
    batches = list(pixel_batches(samples, data, chosen, 32, bad))
    if not batches:
        raise DataError("there is no image to compare on.", "check the val split")
    pixels = torch.cat([batch.images for batch in batches])
    annotations = tuple(one for batch in batches for one in batch.annotations)
    return HeldImages(pixels, torch.cat([batch.labels for batch in batches]), data, annotations)


class Rounded(Interpreter):
    """Another implementation of a simulation: each result of an operation has only so many bits."""

    def __init__(self, model: QuantizedCare, bits: int) -> None:
        super().__init__(model.graph)
        self.task = model.task
        self.num_classes = model.num_classes
        self.bits = bits

    def run_node(self, n: Node) -> Any:
        """Run one operation and round what it gives."""
        out = super().run_node(n)
        if not isinstance(out, Tensor) or not out.is_floating_point():
            return out
        mantissa, exponent = torch.frexp(out)
        return torch.ldexp((mantissa * 2.0**self.bits).round() / 2.0**self.bits, exponent)

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Logits (B, K)."""
        logits: Tensor
        logits, *_ = self.run(images_BCHW)
        return logits


@dataclass(frozen=True)
class Agreement:
    """How near one model's logits are to another's."""

    # What is exact is infinitely near, and JSON has no number for that.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_inf_nan="strings")

    images: int
    same: int  # answers: one for each image, or for each place of each image
    ties: int  # answers that differ between two classes that are equally likely
    sqnr_db: float
    least_db: float  # what is demanded
    places: int = 1  # of each image that have an answer

    @property
    def exact(self) -> bool:
        """Whether every logit is the same."""
        return self.sqnr_db == math.inf

    def __str__(self) -> str:
        """How near, in a word."""
        if not self.comparable:
            return "no numbers"
        return "exact" if self.exact else f"{self.sqnr_db:.1f} dB"

    @property
    def comparable(self) -> bool:
        """Whether every logit is a number."""
        return self.sqnr_db != -math.inf

    @property
    def percent(self) -> float:
        """Percent of images with the same answer."""
        return 100 * self.same / (self.images * self.places)

    @property
    def holds(self) -> bool:
        """Whether it is near enough to be the same model."""
        answers = self.images * self.places
        allowed = answers * (100 - LEAST_AGREEMENT) / 100
        if answers >= ONE_OF:
            allowed = max(allowed, 1.0)
        return self.sqnr_db >= self.least_db and answers - self.same - self.ties <= allowed

    def as_json(self) -> dict[str, Any]:
        """The numbers as ``export.json`` holds them."""
        return {
            "images": self.images,
            "agreement": self.percent,
            "ties": self.ties,
            "sqnr_db": self.sqnr_db if math.isfinite(self.sqnr_db) else None,
            **({} if self.comparable else {"not_measured": {"sqnr_db": NO_NUMBERS}}),
            "least_sqnr_db": self.least_db,
            "holds": self.holds,
        }


def least_db(exact_db: float) -> float:
    """How near a file has to come to a model of which two exact implementations come so near."""
    return min(MOST_DB, exact_db - TWICE_DB)


def compare_logits(
    reference_NK: Tensor,
    found_NK: Tensor,
    exact_db: float = math.inf,
    images: int | None = None,
) -> Agreement:
    """Compare `found` with `reference`; what is no number agrees with nothing.

    `exact_db` is how near two exact implementations come; without it, it is a float model. There
    may be many rows for each of so many `images`.
    """
    return held_to(least_db(exact_db), reference_NK, found_NK, images)


def compare_answers(
    task: Task, reference: Tensor, found: Tensor, exact_db: float = math.inf
) -> Agreement:
    """Compare what two implementations of one model answer to the same images."""
    rows = task.rows(reference), task.rows(found)
    return compare_logits(*rows, exact_db, len(reference))


def drop_on_held(task: Task, before: Tensor, after: Tensor, held: HeldImages) -> Drop:
    """What of the metric one set of answers loses against another, on held images."""
    batch = held.as_batch()
    pair = task.count_pairs(lambda images: before, lambda images: after, [batch]).settled()
    return Drop(pair.drop, *pair.drop_ci95)


def held_to(
    demanded_db: float, reference_NK: Tensor, found_NK: Tensor, images: int | None = None
) -> Agreement:
    """Compare `found` with `reference`, where it is known how near it has to be."""
    found_db, images = sqnr_db(reference_NK, found_NK), images or len(found_NK)
    places = len(found_NK) // images
    if found_db == -math.inf:
        return Agreement(images, 0, 0, found_db, demanded_db, places)
    answers = found_NK.argmax(dim=1, keepdim=True)
    same = (reference_NK.argmax(dim=1, keepdim=True) == answers).squeeze(1)
    margin = reference_NK.amax(dim=1) - reference_NK.gather(1, answers).squeeze(1)
    deviation = reference_NK.double().square().mean().sqrt() * 10 ** (
        -(demanded_db + TWICE_DB) / 20
    )
    ties = ~same & (margin <= TIE * deviation)
    return Agreement(images, int(same.sum()), int(ties.sum()), found_db, demanded_db, places)
