"""Letterboxing: an image of any shape inside the network's square, and the way back."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Letterbox:
    """Where an image lies in the square; a pure function of its size."""

    resolution: int
    scale: float
    left: int
    top: int
    width: int
    height: int
    size: tuple[int, int]

    @classmethod
    def of(cls, size_HW: tuple[int, int], resolution: int) -> "Letterbox":
        """The place of an image of this (height, width)."""
        scale = resolution / max(size_HW)
        height, width = (max(1, round(side * scale)) for side in size_HW)
        left, top = (resolution - width) // 2, (resolution - height) // 2
        return cls(resolution, scale, left, top, width, height, size_HW)

    def outside(self, corners: NDArray[np.float32]) -> NDArray[np.float32]:
        """Corners (n, 4) of the square in pixels of the image, clipped to it."""
        height, width = self.size
        limits = np.array([width, height, width, height], np.float32)
        offset = np.array([self.left, self.top] * 2, np.float32)
        scales = np.array([self.width / width, self.height / height] * 2, np.float32)
        moved: NDArray[np.float32] = ((corners - offset) / scales).clip(0, limits)
        return moved
