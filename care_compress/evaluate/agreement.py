"""Whether a file computes what the model does: logits beside logits, on real images."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import ConfigDict
from torch import Tensor

from care_compress.data.loader import BadImages, pixel_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.data.transforms import normalize
from care_compress.errors import DataError
from care_compress.model.predictor import Predictor
from care_compress.quantize.distance import sqnr_db
from care_compress.recipe.sections import DataSection

# Rounding to a step is chaotic: a difference in the last bit of a float sum moves a value by a
# whole step, so two exact implementations of one INT8 model are 35 to 50 dB apart (the simulation
# itself, in batches of 64 and one by one: 49 dB). A wrong scale or a lost pair costs far more. The
# coarser a model is, the further apart they are, about as far as the model is from float.
LEAST_SQNR_DB = 25.0
BELOW_OWN_DB = 3.0  # allowed below the model's own distance to float, where that is the lower bar
LEAST_AGREEMENT = 99.5
# Two classes are a tie where they are closer than so many deviations of a file that is this much
# better than it needs to be.
TIE, BETTER_DB = 4.0, 10.0
NO_NUMBERS = "some logits are NaN or infinite"


@dataclass(frozen=True)
class HeldImages:
    """Real images, decoded once: bytes, of which batches are prepared when they are needed."""

    pixels_BCHW: Tensor  # uint8
    labels: Tensor
    data: DataSection

    def batches(self, size: int) -> Iterator[Tensor]:
        """Yield the network's inputs."""
        for pixels in torch.split(self.pixels_BCHW, size):
            yield normalize(pixels, self.data.mean, self.data.std)

    def logits(self, predict: Predictor, size: int = 32) -> Tensor:
        """Return the logits (N, K) of all images."""
        with torch.inference_mode():
            return torch.cat([predict(images).float().cpu() for images in self.batches(size)])


def hold_images(
    samples: Samples, data: DataSection, count: int | None, bad: BadImages
) -> HeldImages:
    """Decode `count` images of a split, evenly spaced, or all of them."""
    batches = list(pixel_batches(samples, data, spread_indices(len(samples), count), 32, bad))
    if not batches:
        raise DataError("there is no image to compare on.", "check the val split")
    pixels = torch.cat([batch.images for batch in batches])
    return HeldImages(pixels, torch.cat([batch.labels for batch in batches]), data)


@dataclass(frozen=True)
class Agreement:
    """How near one model's logits are to another's."""

    # What is exact is infinitely near, and JSON has no number for that.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_inf_nan="strings")

    images: int
    same: int  # answers
    ties: int  # answers that differ between two classes that are equally likely
    sqnr_db: float
    least_db: float  # what is demanded

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
        return 100 * self.same / self.images

    @property
    def holds(self) -> bool:
        """Whether it is near enough to be the same model."""
        settled = 100 * (self.same + self.ties) / self.images
        return self.sqnr_db >= self.least_db and settled >= LEAST_AGREEMENT

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


def compare_logits(
    reference_NK: Tensor, found_NK: Tensor, float_NK: Tensor | None = None
) -> Agreement:
    """Compare `found` with `reference`; what is no number agrees with nothing.

    With the float model's logits, a reference that is coarser than `LEAST_SQNR_DB` is held to less.
    """
    own_db = math.inf if float_NK is None else sqnr_db(float_NK, reference_NK)
    return held_to(min(LEAST_SQNR_DB, own_db - BELOW_OWN_DB), reference_NK, found_NK)


def held_to(least_db: float, reference_NK: Tensor, found_NK: Tensor) -> Agreement:
    """Compare `found` with `reference`, where it is known how near it has to be."""
    found_db = sqnr_db(reference_NK, found_NK)
    if found_db == -math.inf:
        return Agreement(len(found_NK), 0, 0, found_db, least_db)
    answers = found_NK.argmax(dim=1, keepdim=True)
    same = (reference_NK.argmax(dim=1, keepdim=True) == answers).squeeze(1)
    margin = reference_NK.amax(dim=1) - reference_NK.gather(1, answers).squeeze(1)
    deviation = reference_NK.double().square().mean().sqrt() * 10 ** (-(least_db + BETTER_DB) / 20)
    ties = ~same & (margin <= TIE * deviation)
    return Agreement(len(found_NK), int(same.sum()), int(ties.sum()), found_db, least_db)
