"""Labels with a place: masks of class indices, and boxes with classes.

Coordinates are pixels with x to the right and y down; 0 is the left (upper) edge of the first
pixel, so an image of width W reaches from 0 to W, and a box of one pixel has an area of one.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, Protocol, TypeGuard

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from care_compress.data.listing import EncodedSamples
from care_compress.data.samples import Samples, spread_indices
from care_compress.errors import BadImageError, DataError
from care_compress.recipe.sections import DataSection

Kind = Literal["masks", "boxes"]

LOOKED_AT = 64  # annotations when a source is opened; every one is looked at when it is loaded

IGNORED = 255  # in our masks: a pixel where every answer is neither right nor wrong
Mask = NDArray[np.uint8]  # (H, W), class index or IGNORED


@dataclass(frozen=True, eq=False)
class Boxes:
    """The objects of one image; there may be none.

    Shapes, for two objects: `corners` (2, 4) as x1, y1, x2, y2; `classes` (2,); `crowd` (2,).
    """

    corners: NDArray[np.float32]
    classes: NDArray[np.int64]
    crowd: NDArray[
        np.bool_
    ]  # VOC `difficult`, COCO `iscrowd`: finding it is neither right nor wrong
    size: tuple[int, int]  # (height, width) of the image they are in

    def __len__(self) -> int:
        """How many objects."""
        return len(self.classes)

    def take(self, rows: NDArray[np.bool_]) -> "Boxes":
        """Only these objects, in their order."""
        return Boxes(self.corners[rows], self.classes[rows], self.crowd[rows], self.size)


Annotation = Mask | Boxes


class AnnotatedSamples(Samples, Protocol):
    """Images whose labels have a place; `labels` is an array of zeros."""

    unlabelled: int  # images without any annotation, kept as images without objects

    def annotation(self, index: int) -> Annotation:
        """The mask or the boxes of one image, in the pixels it is stored with.

        `BadImageError` if a mask cannot be decoded, `DataError` if it holds an unknown index.
        """
        ...


def is_annotated(samples: Samples) -> TypeGuard[AnnotatedSamples]:
    """Whether the samples have labels with a place."""
    return hasattr(samples, "annotation")


def annotated_size(annotation: Annotation) -> tuple[int, int]:
    """Height and width of the image that the annotation belongs to."""
    if isinstance(annotation, Boxes):
        return annotation.size
    height, width = annotation.shape
    return height, width


def check_size(annotation: Annotation, size_WH: tuple[int, int], name: str) -> None:
    """Raise DataError unless the annotation is of an image of this (width, height)."""
    height, width = annotated_size(annotation)
    if (width, height) == size_WH:
        return
    what = "boxes of an image" if isinstance(annotation, Boxes) else "a mask"
    turned = (height, width) == size_WH
    raise DataError(
        f"{name} has {size_WH[0]} x {size_WH[1]} pixels and {what} of {width} x {height}.",
        "set data.exif_rotate to what the annotations were drawn on"
        if turned
        else "annotate the image at its own size",
    )


def flipped(annotation: Annotation) -> Annotation:
    """The annotation of the image mirrored left to right."""
    if not isinstance(annotation, Boxes):
        return np.ascontiguousarray(annotation[:, ::-1])
    width = np.float32(annotation.size[1])
    x1, y1, x2, y2 = annotation.corners.T
    corners = np.stack([width - x2, y1, width - x1, y2], axis=1)
    return Boxes(corners, annotation.classes, annotation.crowd, annotation.size)


class AnnotatedImages:
    """What annotated samples of stored images have in common; a kind adds `annotation`."""

    in_memory = False
    unlabelled = 0

    def __init__(self, images: EncodedSamples, classes: tuple[str, ...]) -> None:
        self.source = images.source
        self.images = images
        self.classes = classes
        self.labels = np.zeros(len(images), np.int64)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The name of the image inside the source, such as ``images/val/12.jpg``."""
        return self.images.name(index)

    def image(self, index: int) -> Image.Image:
        """The image as stored, in any mode; `BadImageError` if it cannot be decoded."""
        return self.images.image(index)

    def hashed(self, index: int) -> tuple[Image.Image, int]:
        """`image`, and a digest of the bytes it is stored as: equal bytes, equal digest."""
        return self.images.hashed(index)


def check_some(samples: AnnotatedSamples, images: EncodedSamples, data: DataSection) -> str:
    """Look at annotations all over the set, so that what is wrong is said before training.

    Returns a digest of what was seen. What cannot be decoded is left to `data.skip_bad_images`.
    """
    digest = hashlib.sha256()
    for index in spread_indices(len(samples), LOOKED_AT):
        try:
            annotation = samples.annotation(index)
            size = images.size(index, data.exif_rotate)
        except BadImageError:
            if not data.skip_bad_images:
                raise
            continue
        check_size(annotation, size, f"{images.source}: {samples.name(index)}")
        if not isinstance(annotation, Boxes):
            digest.update(annotation.tobytes())
    return digest.hexdigest()
