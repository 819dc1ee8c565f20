"""Labels with a place: masks of class indices, and boxes with classes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IGNORED = 255  # in our masks: a pixel where every answer is neither right nor wrong
Mask = NDArray[np.uint8]  # (H, W), class index or IGNORED


@dataclass(frozen=True, eq=False)
class Boxes:
    """The objects of one image; there may be none."""

    corners: NDArray[np.float32]
    classes: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    size: tuple[int, int]  # (height, width) of the image they are in

    def __len__(self) -> int:
        """How many objects."""
        return len(self.classes)


Annotation = Mask | Boxes
