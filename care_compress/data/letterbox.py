"""Letterboxing: an image of any shape inside the network's square, and the way back.

The longer side fills the square, the shorter is centred between grey bars; small images are
enlarged, so that an object has the size the network was trained for. Resizing is bilinear: a
bicubic filter rings along the very edges that masks and boxes are about, and bilinear is what
every library of a device has.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from care_compress.data.annotations import IGNORED, Annotation, Boxes, Mask
from care_compress.device.letterbox import ImageSquare


class Letterbox(ImageSquare):
    """Where an image lies in the square; a pure function of its size.

    An image of 480 x 360 in a square of 256: ``Letterbox.of((360, 480), 256)`` has left 0, top 32,
    width 256 and height 192. What a board needs of it stands in `ImageSquare`.
    """

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the square that show the image.

        An answer at a stride is enlarged to the square first, cut by this, and enlarged to `size`.
        """
        rows = slice(self.top, self.top + self.height)
        return rows, slice(self.left, self.left + self.width)

    def mask(self, mask: Mask) -> Mask:
        """The square with the mask in it; the bars are IGNORED."""
        resized = Image.fromarray(mask).resize((self.width, self.height), Image.Resampling.NEAREST)
        square = Image.new("L", (self.resolution, self.resolution), IGNORED)
        square.paste(resized, (self.left, self.top))
        return np.array(square)

    def inside(self, corners: NDArray[np.float32]) -> NDArray[np.float32]:
        """Corners (n, 4) of the image in pixels of the square."""
        moved: NDArray[np.float32] = corners * self.scales + self.offset
        return moved

    def annotation(self, annotation: Annotation) -> Annotation:
        """The mask or the boxes of the image as those of the square."""
        if not isinstance(annotation, Boxes):
            return self.mask(annotation)
        square = (self.resolution, self.resolution)
        return Boxes(self.inside(annotation.corners), annotation.classes, annotation.crowd, square)
