"""``builtin:shapes``: 24,000 drawn images in 40 classes that need no download.

A class is what the largest patterned form shows: its outline, its texture and its tint, such as
``barred-red-triangle``. Each cue is graded (corners are rounded, stars fill up, light is
coloured), smaller forms of other classes stand around, a bar lies across; so that many answers
are close calls and a network that lost precision gives other ones. Every class is invariant
under a horizontal flip. Labels go round the classes, so the first n images of a split are balanced.
"""

import hashlib
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from care_compress.data.checks import digest_of
from care_compress.data.shapes_cache import cache_folder, cached
from care_compress.data.shapes_render import CLASSES, SIZE, render
from care_compress.errors import DataError

# Part of every file name and image name: raise it with any change of the drawn bits.
VERSION = "v1"
COUNTS = {"train": 20_000, "val": 4_000}


class Shapes:
    """One split as `Samples`; the pixels are drawn on first use and then mapped from the cache."""

    classes = CLASSES
    in_memory = True

    def __init__(self, split: Literal["train", "val"], seed: int = 0) -> None:
        if not 0 <= seed < 2**64:
            raise DataError(f"the seed of builtin:shapes is {seed}.", "use 0 or more, below 2**64")
        self.split = split
        self.seed = seed
        self.labels: NDArray[np.int64] = np.arange(COUNTS[split], dtype=np.int64) % len(CLASSES)
        self._series = f"shapes-{VERSION}-seed{seed}"
        self._path = cache_folder() / f"{self._series}-{split}.npy"
        self._pixels: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the pixels: a worker process maps the same file again."""
        return {**self.__dict__, "_pixels": None}

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """All images (N, SIZE, SIZE, 3), read-only."""
        if self._pixels is None:
            shape = (len(self), SIZE, SIZE, 3)
            self._pixels = cached(self._path, shape, partial(render, self.seed, self.split))
        return self._pixels

    def name(self, index: int) -> str:
        """Such as ``shapes-v1-seed0/val/00012``."""
        return f"{self._series}/{self.split}/{range(len(self))[index]:05d}"

    def image(self, index: int) -> Image.Image:
        """The image as RGB."""
        return Image.fromarray(np.array(self.pixels[index]))

    def hashed(self, index: int) -> tuple[Image.Image, int]:
        """`image`, and a digest of its pixels."""
        return self.image(index), digest_of(self.pixels[index].tobytes())

    def fingerprint(self) -> str:
        """Hex digest of the list of names, labels and classes."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for index, label in enumerate(self.labels.tolist()):
            digest.update(f"\n{self.name(index)}\t{label}".encode())
        return digest.hexdigest()

    def content_digest(self) -> str:
        """The fingerprint: the version in the names stands for the bits."""
        return self.fingerprint()
