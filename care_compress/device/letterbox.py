"""An image of any shape in the network's square, with the very steps of the evaluation.

The longer side fills the square, the shorter is centred between grey bars.
"""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from care_compress.device.images import FloatArray

GREY = 114  # of the bars; close to the mean of photographs, so they excite little
Square = TypeVar("Square", bound="ImageSquare")


@dataclass(frozen=True)
class ImageSquare:
    """Where an image of this (height, width) lies in the square."""

    size: tuple[int, int]
    resolution: int
    left: int
    top: int
    width: int
    height: int

    @classmethod
    def of(cls: type[Square], size_HW: tuple[int, int], resolution: int) -> Square:
        """The place of an image of this (height, width)."""
        scale = resolution / max(size_HW)
        height, width = (max(1, round(side * scale)) for side in size_HW)
        left, top = (resolution - width) // 2, (resolution - height) // 2
        return cls(size_HW, resolution, left, top, width, height)

    def pixels(self, image: Any) -> Any:
        """The square with an RGB image of Pillow in it."""
        from PIL import Image

        assert image.size == self.size[::-1], "another image than the one this was made for"
        # JetPack 6 has Pillow 9.0, which knows the filter by its older name only.
        bilinear = getattr(Image, "Resampling", Image).BILINEAR
        square = Image.new("RGB", (self.resolution, self.resolution), (GREY, GREY, GREY))
        square.paste(image.resize((self.width, self.height), bilinear), (self.left, self.top))
        return square

    def array(self, image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """uint8 pixels (3, resolution, resolution) of an RGB image of Pillow."""
        return np.ascontiguousarray(np.array(self.pixels(image), np.uint8).transpose(2, 0, 1))

    def outside(self, corners: FloatArray) -> FloatArray:
        """Corners (n, 4) in pixels of the square as pixels of the image, clipped to it."""
        height, width = self.size
        limits = np.array([width, height] * 2, np.float32)
        moved: FloatArray = ((corners - self.offset) / self.scales).clip(0, limits)
        return moved

    @property
    def scales(self) -> FloatArray:
        """Of x, y, x, y, with the rounding of the resized image, which is where its pixels are."""
        height, width = self.size
        return np.array([self.width / width, self.height / height] * 2, np.float32)

    @property
    def offset(self) -> FloatArray:
        """Of x, y, x, y."""
        return np.array([self.left, self.top] * 2, np.float32)
