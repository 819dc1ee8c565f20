"""Evenly spaced images of a data set: streamed as pixels, or decoded once and held."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from care_compress.data.loader import BadImages, pixel_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.data.transforms import normalize
from care_compress.errors import DataError
from care_compress.model.predictor import Predictor
from care_compress.recipe.sections import DataSection


@dataclass(frozen=True)
class HeldImages:
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


def hold_images(
    samples: Samples, data: DataSection, count: int | None, bad: BadImages
) -> HeldImages:
    """`count` images of a split, or all of them."""
    batches = list(pixel_batches(samples, data, spread_indices(len(samples), count), 32, bad))
    if not batches:
        raise DataError("there is no image to compare on.", "check the val split")
    pixels = torch.cat([batch.images for batch in batches])
    return HeldImages(pixels, torch.cat([batch.labels for batch in batches]), data)
