"""Letterboxing: an image of any shape inside the network's square, and the way back.

The longer side fills the square, the shorter is centred between grey bars; small images are
enlarged, so that an object has the size the network was trained for. Resizing is bilinear: a
bicubic filter rings along the very edges that masks and boxes are about, and bilinear is what
every library of a device has.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from care_compress.data.annotations import IGNORED, Annotation, Boxes, Mask

GREY = 114  # of the bars; close to the mean of photographs, so they excite little


@dataclass(frozen=True)
class Letterbox:
    """Where an image lies in the square; a pure function of its size.

    An image of 480 x 360 in a square of 256: ``Letterbox.of((360, 480), 256)`` has scale 0.533,
    left 0, top 32, width 256 and height 192.
    """

    resolution: int
    scale: float  # pixels of the square for one of the image; width and height are rounded
    left: int
    top: int
    width: int
    height: int
    size: tuple[int, int]  # (height, width) of the image itself

    @classmethod
    def of(cls, size_HW: tuple[int, int], resolution: int) -> "Letterbox":
        """The place of an image of this (height, width)."""
        scale = resolution / max(size_HW)
        height, width = (max(1, round(side * scale)) for side in size_HW)
        left, top = (resolution - width) // 2, (resolution - height) // 2
        return cls(resolution, scale, left, top, width, height, size_HW)

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the square that show the image.

        An answer at a stride is enlarged to the square first, cut by this, and enlarged to `size`.
        """
        rows = slice(self.top, self.top + self.height)
        return rows, slice(self.left, self.left + self.width)

    def pixels(self, image: Image.Image) -> Image.Image:
        """The square with the image in it."""
        assert image.size == self.size[::-1], "another image than the one this was made for"
        resized = image.resize((self.width, self.height), Image.Resampling.BILINEAR)
        return _pasted(resized, self.resolution, self.left, self.top, (GREY, GREY, GREY))

    def mask(self, mask: Mask) -> Mask:
        """The square with the mask in it; the bars are IGNORED."""
        resized = Image.fromarray(mask).resize((self.width, self.height), Image.Resampling.NEAREST)
        return np.array(_pasted(resized, self.resolution, self.left, self.top, IGNORED))

    def inside(self, corners: NDArray[np.float32]) -> NDArray[np.float32]:
        """Corners (n, 4) of the image in pixels of the square."""
        moved: NDArray[np.float32] = corners * self._scales + self._offset
        return moved

    def outside(self, corners: NDArray[np.float32]) -> NDArray[np.float32]:
        """Corners (n, 4) of the square in pixels of the image, clipped to it."""
        height, width = self.size
        limits = np.array([width, height, width, height], np.float32)
        moved: NDArray[np.float32] = ((corners - self._offset) / self._scales).clip(0, limits)
        return moved

    def annotation(self, annotation: Annotation) -> Annotation:
        """The mask or the boxes of the image as those of the square."""
        if not isinstance(annotation, Boxes):
            return self.mask(annotation)
        square = (self.resolution, self.resolution)
        return Boxes(self.inside(annotation.corners), annotation.classes, annotation.crowd, square)

    @property
    def _scales(self) -> NDArray[np.float32]:
        """Of x, y, x, y, with the rounding of the resized image, which is where its pixels are."""
        height, width = self.size
        return np.array([self.width / width, self.height / height] * 2, np.float32)

    @property
    def _offset(self) -> NDArray[np.float32]:
        return np.array([self.left, self.top] * 2, np.float32)


def _pasted(
    image: Image.Image, resolution: int, left: int, top: int, around: int | tuple[int, int, int]
) -> Image.Image:
    square = Image.new(image.mode, (resolution, resolution), around)
    square.paste(image, (left, top))
    return square
