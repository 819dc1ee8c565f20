"""A mask of classes drawn over its image, in colours that hold for any number of classes."""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from care_compress.device.boxes import COLOURS, READABLE

ClassArray: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Colour: TypeAlias = "tuple[int, int, int]"

NOTHING = "background"  # a class of this name keeps the pixels of the image
COVER = 0.6  # of a coloured pixel is its class, the rest is the image without its colours
TURN = 0.618034  # of the circle of hues, from one class to the next: never twice the same
SHADES = ((0.55, 0.95), (0.9, 0.6), (0.4, 0.75))  # saturation and value, in turns


def colour_of(place: int) -> Colour:
    """The colour of a class by its place in the list: Okabe and Ito's first, then hues."""
    if place < len(COLOURS):
        return COLOURS[place]
    saturation, value = SHADES[place % len(SHADES)]
    mixed = colorsys.hsv_to_rgb(place * TURN % 1, saturation, value)
    red, green, blue = (round(255 * part) for part in mixed)
    return red, green, blue


def draw_mask(image: Any, mask_HW: ClassArray, names: Sequence[str]) -> Any:
    """A copy of a PIL image with every pixel in the colour of its class, dark lines between them.

    A small image is enlarged first. What is no class, such as a pixel without a label, stays grey.
    """
    from PIL import Image

    assert mask_HW.shape == image.size[::-1], "another image than the one the mask is of"
    factor = max(1, -(-READABLE // max(image.size)))
    size = image.width * factor, image.height * factor
    # JetPack 6 has Pillow 9.0, which knows the filter by its older name only.
    nearest = getattr(Image, "Resampling", Image).NEAREST
    pixels = np.asarray(image.convert("RGB").resize(size, nearest)).astype(np.float32)
    mask = np.kron(mask_HW, np.ones((factor, factor), mask_HW.dtype))
    grey = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    for place in np.unique(mask).tolist():
        if place >= len(names):
            pixels[mask == place] = grey[mask == place]
        elif names[place] != NOTHING:
            colour = np.array(colour_of(place), np.float32)
            pixels[mask == place] = COVER * colour + (1 - COVER) * grey[mask == place]
    pixels[_edges(mask)] *= 0.35
    return Image.fromarray(pixels.round().astype(np.uint8))


def legend_of(mask_HW: ClassArray, names: Sequence[str]) -> dict[str, Colour]:
    """The colour of each class that a drawn mask shows."""
    there = [place for place in np.unique(mask_HW).tolist() if place < len(names)]
    return {names[place]: colour_of(place) for place in there if names[place] != NOTHING}


def _edges(mask_HW: ClassArray) -> ClassArray:
    """Pixels whose right or lower neighbour is of another class."""
    edges = np.zeros(mask_HW.shape, np.bool_)
    edges[:, :-1] |= mask_HW[:, :-1] != mask_HW[:, 1:]
    edges[:-1] |= mask_HW[:-1] != mask_HW[1:]
    return edges
