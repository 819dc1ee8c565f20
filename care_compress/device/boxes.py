"""A detector's output to the boxes of an image: scores, suppression, the way back, a drawing.

Shape legend: K classes, N places of the network, n boxes. Corners are x1, y1, x2, y2.
"""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from care_compress.device.drawing import COLOURS, enlarged_copy, ink_on, letters_for

FloatArray: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
IntArray: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

SCORED = 0.001  # the least score that counts for precision, whose curves end in guesses
SHOWN = 0.25  # the least score of a box that is drawn, or that two models are to agree on
SAME = 0.6  # IoU above which two boxes of a class are one object, of which the surer one stays
AGREED = 0.5  # IoU of two boxes of two answers that are the same object
CANDIDATES = 1000  # the surest that are looked at
MOST = 100  # boxes of one image, as in the COCO evaluation


class Square(Protocol):
    """Where an image lies in the network's square input."""

    @property
    def resolution(self) -> int:
        """The square's side in pixels."""
        ...

    def outside(self, corners: FloatArray) -> FloatArray:
        """Corners (n, 4) in pixels of the square as pixels of the image, clipped to it."""
        ...


@dataclass(frozen=True, eq=False)
class Detections:
    """The boxes found in one image, in its own pixels, the surest first."""

    corners: FloatArray  # (n, 4)
    scores: FloatArray  # (n,)
    classes: IntArray  # (n,)
    broken: bool = False  # the output was NaN or infinite somewhere, and says nothing

    def __len__(self) -> int:
        """How many boxes."""
        return len(self.scores)

    def surer(self, score: float = SHOWN) -> Detections:
        """Only those of at least this score."""
        rows = self.scores >= score
        return Detections(self.corners[rows], self.scores[rows], self.classes[rows], self.broken)


def find_boxes(output_CN: FloatArray, square: Square, score: float = SCORED) -> Detections:
    """Boxes of one image out of the network's output (4 + K, N).

    Rows 0 to 3 are corners as fractions of the square, the others logits of the classes; a place
    may be several classes.
    """
    if not np.isfinite(output_CN).all():
        return _detections(np.zeros((0, 4)), np.zeros(0), np.zeros(0), broken=True)
    logits_KN = output_CN[4:].astype(np.float32)
    # Most places are empty: only what passes is exponentiated.
    classes, where = np.nonzero(logits_KN >= np.log(score / (1 - score)))
    logits = logits_KN[classes, where]
    order = np.argsort(-logits, kind="stable")[:CANDIDATES]
    classes, where, logits = classes[order], where[order], logits[order]
    pixels = output_CN[:4, where].T.astype(np.float32) * np.float32(square.resolution)
    corners = square.outside(pixels)
    inside = (corners[:, 2:] > corners[:, :2]).all(axis=1)
    corners, classes, logits = corners[inside], classes[inside], logits[inside]
    rows = suppress(corners, classes)
    scores = 1 / (1 + np.exp(-logits[rows].clip(-80, 80)))
    return _detections(corners[rows], scores, classes[rows])


def suppress(corners: FloatArray, classes: IntArray) -> IntArray:
    """Rows of the boxes that stay: each removes the less sure ones of its class that overlap it.

    The boxes come surest first. One row of overlaps for each that stays, so a thousand candidates
    cost a hundred rows and not a million pairs.
    """
    stay: list[int] = []
    left = np.arange(len(corners))
    while len(left) and len(stay) < MOST:
        first, left = left[0], left[1:]
        stay.append(int(first))
        same = classes[left] == classes[first]
        overlapping = overlaps(corners[first : first + 1], corners[left])[0] > SAME
        left = left[~(same & overlapping)]
    return np.array(stay, dtype=np.int64)


def overlaps(a: FloatArray, b: FloatArray) -> FloatArray:
    """Intersection over union of every box of one set with every box of another."""
    near = np.maximum(a[:, None, :2], b[None, :, :2])
    far = np.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (far - near).clip(0).prod(axis=2)
    area_a, area_b = ((one[:, 2:] - one[:, :2]).prod(axis=1) for one in (a, b))
    union: FloatArray = area_a[:, None] + area_b[None] - shared
    ious: FloatArray = shared / np.maximum(union, np.float32(1e-9))
    return ious


def found_again(wanted: Detections, found: Detections) -> int:
    """How many sure boxes of one answer another one has, too, at least half as sure of them.

    It is of the same class and overlaps by half. What lies at the bar falls on either side of it
    where a value differs in its last bits: that is no other answer.
    """
    sure, other = wanted.surer(), found.surer(SHOWN / 2)
    if not len(sure) or not len(other):
        return 0
    same = sure.classes[:, None] == other.classes
    return int((same & (overlaps(sure.corners, other.corners) >= AGREED)).any(axis=1).sum())


def draw_boxes(image: Any, found: Detections, names: Sequence[str]) -> Any:
    """A copy of a PIL image with the boxes of at least `SHOWN`, their classes and scores.

    A small image is enlarged first: letters do not fit into it.
    """
    from PIL import ImageDraw

    picture, factor = enlarged_copy(image)
    size, found = picture.size, found.surer()
    draw, font = ImageDraw.Draw(picture), letters_for(picture)
    line = max(2, max(size) // 320)
    # The surest last: it lies on top.
    for corners, score, place in zip(
        found.corners[::-1], found.scores[::-1], found.classes[::-1], strict=True
    ):
        colour = COLOURS[place % len(COLOURS)]
        x1, y1, x2, y2 = (float(one) * factor for one in corners)
        # A dark rim, or a bright box is lost on a bright image.
        draw.rectangle((x1 - 1, y1 - 1, x2 + 1, y2 + 1), outline=(0, 0, 0), width=line + 2)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        text = f"{names[place]} {score:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + 2 * line, bottom - top + 2 * line
        x = min(max(0.0, x1), max(0.0, size[0] - width))
        y = y1 - height if y1 >= height else min(y1, size[1] - height)
        draw.rectangle((x, y, x + width, y + height), fill=colour)
        draw.text((x + line - left, y + line - top), text, fill=ink_on(colour), font=font)
    return picture


def _detections(corners: Any, scores: Any, classes: Any, broken: bool = False) -> Detections:
    return Detections(
        corners.astype(np.float32), scores.astype(np.float32), classes.astype(np.int64), broken
    )
