"""Boxes from files: what annotations say, held against their images and packed.

How Pascal VOC and COCO write them is known by `voc` and `coco`; both give a `Told` for each image.
A box may stick out of its image by rounding and is clipped; further out, or without an area, it is
an error that names it: a network would learn from it what is nowhere to be seen.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from care_compress.data.annotations import AnnotatedImages, Boxes, check_some
from care_compress.data.listing import EncodedSamples, summary
from care_compress.errors import BadImageError, DataError
from care_compress.recipe.sections import DataSection

MOST_SIDE = 1 << 24  # of an image; what claims to be longer fits in no number here
ROUNDING = 1.01  # pixels outside that counting from 1, or a float, explains


class Object(NamedTuple):
    """One object as it is written."""

    name: str  # of its class
    corners: tuple[float, float, float, float]
    crowd: bool


class Told(NamedTuple):
    """What an annotation says about an image."""

    image: str  # its name in the source
    size: tuple[int, int] | None  # height and width, where they are said
    objects: Sequence[Object]
    where: str  # of the annotation, for messages


class BoxSamples(AnnotatedImages):
    """Images and their objects, in five arrays however many there are."""

    def __init__(
        self,
        images: EncodedSamples,
        told: Sequence[Told],
        classes: tuple[str, ...],
        data: DataSection,
    ) -> None:
        super().__init__(images, classes)
        labels = {name: label for label, name in enumerate(classes)}
        sizes = np.empty((len(told), 2), np.int64)
        packed: list[Boxes] = []
        for index, one in enumerate(told):
            where = f"{images.source}: {one.where}"
            if absent := {each.name for each in one.objects} - labels.keys():
                raise DataError(
                    f"{where} has classes that the list does not name: {summary(absent)}.",
                    "add them to classes.txt or the file of data.classes, or remove their boxes",
                )
            size = one.size
            if size is None:
                try:
                    size = images.size(index, data.exif_rotate)[::-1]
                except BadImageError:
                    if not data.skip_bad_images:
                        raise
                    # Nobody will ask: the image is left out when it is loaded.
                    one, size = one._replace(objects=()), (1, 1)
            if max(size) > MOST_SIDE:
                raise DataError(
                    f"{where} tells of an image of more than {MOST_SIDE:,} pixels to a side.",
                    "write the size of the image, or leave it out",
                )
            packed.append(_boxes(one.objects, labels, size, where))
            sizes[index] = size
        self._sizes = sizes
        self._bounds = np.cumsum([0, *map(len, packed)])
        self._corners = np.concatenate([one.corners for one in packed])
        self._classes = np.concatenate([one.classes for one in packed])
        self._crowd = np.concatenate([one.crowd for one in packed])
        self.unlabelled = sum(len(one) == 0 for one in packed)
        check_some(self, images, data)

    def annotation(self, index: int) -> Boxes:
        """The objects of one image."""
        at = range(len(self))[index]
        rows = slice(self._bounds[at], self._bounds[at + 1])
        height, width = self._sizes[at].tolist()
        return Boxes(self._corners[rows], self._classes[rows], self._crowd[rows], (height, width))

    def fingerprint(self) -> str:
        """Hex digest of the list of images, the classes, and every box."""
        return self._digest(self.images.fingerprint())

    def content_digest(self) -> str:
        """Hex digest that also changes with images under the same names."""
        return self._digest(self.images.content_digest())

    def _digest(self, images: str) -> str:
        text = "\n".join([images, *self.classes])
        digest = hashlib.sha256(text.encode("utf-8", "backslashreplace"))
        for array, form in (
            (self._bounds, "<i8"),
            (self._sizes, "<i8"),
            (self._corners, "<f4"),
            (self._classes, "<i8"),
            (self._crowd, "u1"),
        ):
            digest.update(array.astype(form).tobytes())
        return digest.hexdigest()


def _boxes(
    objects: Sequence[Object], labels: dict[str, int], size: tuple[int, int], where: str
) -> Boxes:
    """The objects as arrays, clipped to the image; DataError for a box that cannot be one."""
    height, width = size
    corners: NDArray[np.float64] = np.array([one.corners for one in objects], float).reshape(-1, 4)
    limits = np.array([width, height, width, height])
    clipped = corners.clip(0, limits)
    with np.errstate(invalid="ignore"):  # of infinity minus infinity
        moved = ~(np.abs(corners - clipped) <= ROUNDING).all(axis=1)
    flat = (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)
    if (moved | flat).any():
        first = int(np.argmax(moved | flat))
        x1, y1, x2, y2 = (f"{value:.6g}" for value in corners[first])
        what = f"reaches outside the image of {width} x {height}" if moved[first] else "has no area"
        raise DataError(
            f"{where}: object {first + 1} ({objects[first].name}) from ({x1}, {y1}) to "
            f"({x2}, {y2}) {what}.",
            "correct or remove it; VOC writes xmin, ymin, xmax, ymax, COCO x, y, width, height",
        )
    return Boxes(
        clipped.astype(np.float32),
        np.array([labels[one.name] for one in objects], np.int64),
        np.array([one.crowd for one in objects], bool),
        size,
    )
