"""An image of any shape in the network's square, with the very steps of the evaluation.

The longer side fills the square, the shorter is centred between grey bars.
"""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from care_compress.device.images import FloatArray

GREY = 114  # of the bars


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
    def of(cls, size_HW: tuple[int, int], resolution: int) -> ImageSquare:
        """The place of an image of this (height, width)."""
        scale = resolution / max(size_HW)
        height, width = (max(1, round(side * scale)) for side in size_HW)
        left, top = (resolution - width) // 2, (resolution - height) // 2
        return cls(size_HW, resolution, left, top, width, height)

    def pixels(self, image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """uint8 pixels (3, resolution, resolution) of an RGB image of Pillow."""
        from PIL import Image

        # JetPack 6 has Pillow 9.0, which knows the filter by its older name only.
        bilinear = getattr(Image, "Resampling", Image).BILINEAR
        square = Image.new("RGB", (self.resolution, self.resolution), (GREY, GREY, GREY))
        square.paste(image.resize((self.width, self.height), bilinear), (self.left, self.top))
        return np.ascontiguousarray(np.array(square, dtype=np.uint8).transpose(2, 0, 1))

    def outside(self, corners: FloatArray) -> FloatArray:
        """Corners (n, 4) in pixels of the square as pixels of the image, clipped to it."""
        height, width = self.size
        # Of the resized image, whose sides are whole pixels: x, y, x, y.
        scales = np.array([self.width / width, self.height / height] * 2, np.float32)
        offset = np.array([self.left, self.top] * 2, np.float32)
        limits = np.array([width, height] * 2, np.float32)
        moved: FloatArray = ((corners - offset) / scales).clip(0, limits)
        return moved
