"""A mask of classes drawn over its image, in colours that hold for any number of classes."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from care_compress.data.annotations import Mask
from care_compress.device.drawing import READABLE
from care_compress.device.masks import colour_of

Colour = tuple[int, int, int]

NOTHING = "background"  # a class of this name is left grey
COVER = 0.6  # of a coloured pixel is its class, the rest is the image without its colours
DARK = 0.35  # of a line between classes


def draw_mask(image: Image.Image, mask_HW: Mask, names: Sequence[str]) -> Image.Image:
    """The image in grey with every pixel in the colour of its class, dark lines between them.

    A small image is enlarged first. What is no class, such as a pixel without a label, stays grey.
    """
    assert mask_HW.shape == image.size[::-1], "another image than the one the mask is of"
    factor = max(1, -(-READABLE // max(image.size)))
    size = image.width * factor, image.height * factor
    enlarged = image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    grey = np.asarray(enlarged).astype(np.float32).mean(axis=2, keepdims=True)
    pixels = np.repeat(grey, 3, axis=2)
    mask = np.kron(mask_HW, np.ones((factor, factor), mask_HW.dtype))
    for place in _drawn(mask_HW, names):
        colour = np.array(colour_of(place), np.float32)
        pixels[mask == place] = COVER * colour + (1 - COVER) * pixels[mask == place]
    # The pixels whose right or lower neighbour is of another class.
    edges: NDArray[np.bool_] = np.zeros(mask.shape, np.bool_)
    edges[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edges[:-1] |= mask[:-1] != mask[1:]
    pixels[edges] *= DARK
    return Image.fromarray(pixels.round().astype(np.uint8))


def legend_of(mask_HW: Mask, names: Sequence[str]) -> dict[str, Colour]:
    """The colour of each class that a drawn mask shows."""
    return {names[place]: colour_of(place) for place in _drawn(mask_HW, names)}


def _drawn(mask_HW: Mask, names: Sequence[str]) -> list[int]:
    there = [int(place) for place in np.unique(mask_HW) if place < len(names)]
    return [place for place in there if names[place] != NOTHING]
