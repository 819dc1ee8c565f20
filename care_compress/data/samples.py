"""What every data source looks like to the rest of the product: a numbered, labelled image set."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Samples(Protocol):
    """A labelled set of images with random access.

    Implementations are picklable (worker processes receive them) and hold no per-image Python
    objects: a million images must list in seconds and fit in memory.
    """

    classes: tuple[str, ...]
    labels: NDArray[np.int64]  # (len,) index into classes
    in_memory: bool  # reading an image needs no decoding, so worker processes would only cost

    def __len__(self) -> int:
        """How many images."""
        ...

    def name(self, index: int) -> str:
        """A stable name of one image inside its source, such as ``val/cat/12.jpg``."""
        ...

    def image(self, index: int) -> Image.Image:
        """The image as stored, in any mode; `BadImageError` if it cannot be decoded."""
        ...

    def hashed(self, index: int) -> tuple[Image.Image, int]:
        """`image`, and a digest of the bytes it is stored as: equal bytes, equal digest."""
        ...

    def fingerprint(self) -> str:
        """Hex digest of the list of names, labels and classes: equal lists, equal digest."""
        ...

    def content_digest(self) -> str:
        """Hex digest that also changes when images under the same names do.

        Cheap, so it may differ between copies of one set; what resumes compares it with its own.
        """
        ...


def spread_indices(count: int, wanted: int | None) -> list[int]:
    """`wanted` of `count` images, evenly spaced: the first of a folder are all of one class."""
    chosen = min(wanted or count, count)
    return [i * count // chosen for i in range(chosen)]
