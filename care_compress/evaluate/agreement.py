"""Whether a file computes what the model does: logits beside logits, on real images."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from care_compress.data.transforms import normalize
from care_compress.predictor import Predictor
from care_compress.sections import DataSection

# Rounding to a step is chaotic: a difference in the last bit of a float sum moves a value by a
# whole step, so two exact implementations of one INT8 model are 35 to 50 dB apart (the simulation
# itself, in batches of 64 and one by one: 49 dB). A wrong scale or a lost pair costs far more.
LEAST_SQNR_DB = 25.0
LEAST_AGREEMENT = 99.5
# Two answers whose logits are closer than this many times the deviation are a tie.
TIE = 4.0


@dataclass(frozen=True)
class CheckImages:
    """Real images, decoded once: bytes, of which batches are prepared when they are needed."""

    pixels_BCHW: Tensor  # uint8
    labels: Tensor
    data: DataSection

    def batches(self, size: int) -> Iterator[Tensor]:
        """The network's inputs."""
        for pixels in torch.split(self.pixels_BCHW, size):
            yield normalize(pixels, self.data.mean, self.data.std)

    def logits(self, predict: Predictor, size: int = 32) -> Tensor:
        """Logits (N, K) of all images."""
        with torch.inference_mode():
            return torch.cat([predict(images).float().cpu() for images in self.batches(size)])


@dataclass(frozen=True)
class Agreement:
    """How near one model's logits are to another's."""

    images: int
    same: int  # answers
    ties: int  # answers that differ between two classes that are equally likely
    sqnr_db: float

    @property
    def exact(self) -> bool:
        """Every logit is the same."""
        return self.sqnr_db == math.inf

    @property
    def percent(self) -> float:
        """Of images with the same answer."""
        return 100 * self.same / self.images

    @property
    def holds(self) -> bool:
        """Near enough to be the same model."""
        settled = 100 * (self.same + self.ties) / self.images
        return self.sqnr_db >= LEAST_SQNR_DB and settled >= LEAST_AGREEMENT

    def as_json(self) -> dict[str, Any]:
        """The numbers as ``export.json`` holds them."""
        return {
            "images": self.images,
            "agreement": self.percent,
            "ties": self.ties,
            "sqnr_db": self.sqnr_db if math.isfinite(self.sqnr_db) else None,
            "holds": self.holds,
        }


def compare_logits(reference_NK: Tensor, found_NK: Tensor) -> Agreement:
    """`found` beside `reference`; what is no number agrees with nothing."""
    reference, found = reference_NK.double(), found_NK.double()
    noise = float((reference - found).square().mean())
    signal = float(reference.square().mean())
    if not math.isfinite(noise):
        return Agreement(len(found), 0, 0, -math.inf)
    same = reference.argmax(dim=1) == found.argmax(dim=1)
    chosen = reference.gather(1, found.argmax(dim=1, keepdim=True)).squeeze(1)
    margin = reference.amax(dim=1) - chosen
    ties = ~same & (margin <= TIE * math.sqrt(noise))
    return Agreement(
        images=len(found),
        same=int(same.sum()),
        ties=int(ties.sum()),
        sqnr_db=math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise),
    )
