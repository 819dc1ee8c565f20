"""Pixels and labels with a place, prepared together; and which preparation samples need.

Evaluation shows the whole image, letterboxed. Training zooms in, stretches and mirrors, and moves
the annotation by the same numbers: bilinear for pixels, nearest for masks, both with the same
centres of pixels, so that a mask stays on its edges.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from care_compress.data.annotations import IGNORED, Annotation, Boxes, flipped, is_annotated
from care_compress.data.letterbox import Letterbox
from care_compress.data.samples import Samples
from care_compress.data.transforms import (
    EvalTransform,
    Key,
    TrainTransform,
    Transform,
    erase,
    jittered,
    to_chw,
    to_rgb,
    upright,
)
from care_compress.device.letterbox import GREY
from care_compress.recipe.sections import AugmentSection, DataSection

# Of a box that the cut leaves less of nothing can be learned but to guess.
LEAST_VISIBLE = 0.2


def evaluation_transform(samples: Samples, data: DataSection) -> Transform:
    """How these samples are shown where they are scored: letterboxed if they are annotated."""
    if is_annotated(samples):
        return LetterboxTransform(data.resolution, data.exif_rotate)
    return EvalTransform(data.resolution, data.crop_pct, data.exif_rotate)


def training_transform(
    samples: Samples, data: DataSection, augment: AugmentSection
) -> "Transform | MovingTransform":
    """How these samples are shown in training: annotations move with the pixels."""
    if is_annotated(samples):
        return MovingTransform(data.resolution, augment, data.exif_rotate)
    return TrainTransform(data.resolution, augment, data.exif_rotate)


@dataclass(frozen=True)
class LetterboxTransform:
    """The whole image in the square."""

    resolution: int
    exif_rotate: bool = False

    def __call__(self, image: Image.Image, key: Key = (0, 0, 0)) -> Tensor:
        """The evaluation pixels; `key` changes nothing."""
        image = to_rgb(upright(image) if self.exif_rotate else image)
        return to_chw(Letterbox.of(image.size[::-1], self.resolution).pixels(image))


@dataclass(frozen=True)
class View:
    """The part of an image that the square shows, and where in the square it lies.

    `box` is in pixels of the image (left, top, right, bottom) and is resized to `size` (width,
    height), whose upper left corner is at `place` (left, top).
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    place: tuple[int, int]

    @classmethod
    def draw(
        cls,
        size_WH: tuple[int, int],
        resolution: int,
        augment: AugmentSection,
        rng: np.random.Generator,
    ) -> "View":
        """A random zoom and stretch of the letterboxed image, at a random place.

        A share s of the square's area is a zoom of 1/sqrt(s); a stretch of r is sqrt(r) along x
        and its inverse along y. What is longer than the square then is cut, what is shorter is
        put somewhere inside.
        """
        zoom = resolution / max(size_WH) / math.sqrt(rng.uniform(*augment.scale))
        low, high = augment.ratio
        stretch = math.exp(rng.uniform(math.log(low), math.log(high)) / 2)
        ends, sizes, places = [], [], []
        for side, scale in zip(size_WH, (zoom * stretch, zoom / stretch), strict=True):
            shown = min(max(1, round(side * scale)), resolution)
            # Of the whole side if all of it fits, else as much as fills the square.
            length = min(float(side), shown / scale) if shown == resolution else float(side)
            first = rng.random() * (side - length)
            ends.append((first, min(first + length, float(side))))
            sizes.append(shown)
            places.append(int(rng.integers(resolution - shown + 1)))
        (left, right), (top, bottom) = ends
        return cls((left, top, right, bottom), (sizes[0], sizes[1]), (places[0], places[1]))

    def pixels(self, image: Image.Image) -> Image.Image:
        """The shown part at its size in the square."""
        return image.resize(self.size, Image.Resampling.BILINEAR, box=self.box)

    def annotation(self, annotation: Annotation, resolution: int) -> Annotation:
        """The annotation of the square; boxes with less than `LEAST_VISIBLE` in it are left out."""
        left, top = self.place
        if not isinstance(annotation, Boxes):
            shown = Image.fromarray(annotation).resize(
                self.size, Image.Resampling.NEAREST, box=self.box
            )
            square = np.full((resolution, resolution), IGNORED, np.uint8)
            square[top : top + self.size[1], left : left + self.size[0]] = np.asarray(shown)
            return square
        x1, y1, x2, y2 = self.box
        scales = np.array([self.size[0] / (x2 - x1), self.size[1] / (y2 - y1)] * 2)
        start = np.array([x1, y1] * 2)
        offset = np.array([left, top] * 2)
        whole = (annotation.corners - start) * scales + offset
        limits = offset + np.array([0, 0, *self.size])
        seen = whole.clip(np.tile(limits[:2], 2), np.tile(limits[2:], 2))
        visible = _areas(seen) >= LEAST_VISIBLE * _areas(whole)
        square_size = (resolution, resolution)
        classes, crowd = annotation.classes, annotation.crowd
        return Boxes(seen.astype(np.float32), classes, crowd, square_size).take(visible)


def _areas(corners: NDArray[np.float64]) -> NDArray[np.float64]:
    areas: NDArray[np.float64] = (corners[:, 2:] - corners[:, :2]).prod(axis=1)
    return areas


@dataclass(frozen=True)
class MovingTransform:
    """Random zoom, stretch and place, flip, colour jitter and erasing, in that order."""

    resolution: int
    augment: AugmentSection
    exif_rotate: bool = False

    def __call__(
        self, image: Image.Image, annotation: Annotation, key: Key
    ) -> tuple[Tensor, Annotation]:
        """The training pixels of this image in this epoch, and the annotation that fits them."""
        rng = np.random.default_rng(key)
        image = to_rgb(upright(image) if self.exif_rotate else image)
        view = View.draw(image.size, self.resolution, self.augment, rng)
        mirrored = rng.random() < self.augment.flip
        # Before the bars are added: they are grey in evaluation and no part of the contrast.
        shown = to_chw(jittered(view.pixels(image), self.augment.jitter, rng))
        erase(shown, self.augment.erase, rng)
        (left, top), (width, height) = view.place, view.size
        rows = torch.full((self.resolution, self.resolution, 3), GREY, dtype=torch.uint8)
        pixels = rows.permute(2, 0, 1)
        pixels[:, top : top + height, left : left + width] = shown
        moved = view.annotation(annotation, self.resolution)
        if mirrored:
            return pixels.flip(2), flipped(moved)
        return pixels, moved
