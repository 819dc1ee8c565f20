"""A segmentation network's output to the class of each pixel of an image, and its drawing.

Shape legend: K classes, h x w places of the network, H x W pixels of the image.
"""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from care_compress.device.drawing import COLOURS, enlarged_copy, ink_on, letters_for
from care_compress.device.images import FloatArray
from care_compress.device.letterbox import ImageSquare

# A class for each pixel.
ClassMap: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"

_NUMBERS_AT_ONCE = 1 << 24  # of logits at the image's size, which can be gigabytes together
_LISTED = 0.001  # the least share of an image that its drawing names
_OPAQUE = 140  # of 255: a class' colour over the image
_UNTINTED, _BARE = "background", (235, 235, 235)


def find_mask(logits_Khw: FloatArray, square: ImageSquare) -> ClassMap:
    """The class of each pixel of an image: logits are enlarged, cut and enlarged once more.

    First to the square, of which the image's part is cut, then to the image. Both steps are linear
    in rows and in columns, so each axis is one matrix.
    """
    classes, h, w = logits_Khw.shape
    height, width = square.size
    from_square = _stretching(height, square.height), _stretching(width, square.width)
    to_square = _stretching(square.resolution, h), _stretching(square.resolution, w)
    rows_Hh = from_square[0] @ to_square[0][square.top : square.top + square.height]
    columns_Ww = from_square[1] @ to_square[1][square.left : square.left + square.width]
    wide_KhW = logits_Khw.astype(np.float32) @ columns_Ww.T
    step = max(1, _NUMBERS_AT_ONCE // (classes * width))
    parts = [
        np.matmul(rows_Hh[first : first + step], wide_KhW).argmax(axis=0)
        for first in range(0, height, step)
    ]
    return np.concatenate(parts)


def shares_of(mask_HW: ClassMap, classes: int) -> list[tuple[int, float]]:
    """Classes that are there with their parts of the image, the largest first."""
    counts_K = np.bincount(mask_HW.ravel(), minlength=classes)
    there = [k for k in np.argsort(-counts_K, kind="stable") if counts_K[k]]
    return [(int(k), float(counts_K[k] / mask_HW.size)) for k in there]


def draw_mask(image: Any, mask_HW: ClassMap, names: Sequence[str]) -> Any:
    """A copy of a PIL image in the colours of its classes, with the list of these below it."""
    from PIL import Image, ImageDraw

    picture, _ = enlarged_copy(image)
    # JetPack 6 has Pillow 9.0, which knows the filter by its older name only.
    nearest = getattr(Image, "Resampling", Image).NEAREST
    colours = [_BARE if name == _UNTINTED else colour_of(k) for k, name in enumerate(names)]
    opaque_K = np.array([0 if name == _UNTINTED else _OPAQUE for name in names], np.uint8)
    tint, opaque = (
        Image.fromarray(of_class[mask_HW]).resize(picture.size, nearest)
        for of_class in (np.array(colours, np.uint8), opaque_K)
    )
    picture.paste(tint, (0, 0), opaque)
    font, gap = letters_for(picture), max(4, max(picture.size) // 120)
    listed = [one for one in shares_of(mask_HW, len(names)) if one[1] >= _LISTED]
    labels = [(f"{names[k]} {share:.1%}", colours[k]) for k, share in listed]
    measuring = ImageDraw.Draw(picture)
    boxes = [measuring.textbbox((0, 0), text, font=font) for text, _ in labels]
    high = max(bottom for _, _, _, bottom in boxes) + 2 * gap
    places, x, y = [], 0, 0
    for _, _, right, _ in boxes:
        if x and x + right + 2 * gap > picture.width:
            x, y = 0, y + high
        places.append((x, y))
        x += int(right) + 2 * gap
    sheet = Image.new("RGB", (picture.width, picture.height + int(y + high)), (255, 255, 255))
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for (text, colour), (x, y), (_, _, right, _) in zip(labels, places, boxes, strict=True):
        y += picture.height
        draw.rectangle((x, y, x + right + 2 * gap - 1, y + high - 1), fill=colour)
        draw.text((x + gap, y + gap), text, fill=ink_on(colour), font=font)
    return sheet


def _stretching(size: int, of: int) -> FloatArray:
    """Linear interpolation of `of` values to `size`, as a matrix; outer halves stay constant."""
    at = ((np.arange(size) + 0.5) * (of / size) - 0.5).clip(0, of - 1)
    low = np.floor(at).astype(np.int64)
    high, part = np.minimum(low + 1, of - 1), (at - low).astype(np.float32)
    matrix: FloatArray = np.zeros((size, of), np.float32)
    matrix[np.arange(size), low] = 1 - part
    matrix[np.arange(size), high] += part
    return matrix


def colour_of(k: int) -> tuple[int, int, int]:
    """A colour of a class' own: those of all drawings, then hues a golden section apart."""
    if k < len(COLOURS):
        return COLOURS[k]
    saturation, brightness = 0.55 + 0.3 * (k % 2), 0.9 - 0.2 * (k % 3)
    red, green, blue = colorsys.hsv_to_rgb(k * 0.618034 % 1, saturation, brightness)
    return round(255 * red), round(255 * green), round(255 * blue)
