"""Image file to the network's input, with the very steps of care-compress' evaluation.

Shape legend: N images, C channel, H height, W width.
"""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

import contextlib
import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from care_compress.device.problems import ImageError

# Normalized images, and logits. As text: numpy 1.21 of JetPack 6 cannot be subscripted when the
# program runs.
FloatArray: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"


def open_image(path: Path, exif_rotate: bool) -> Any:
    """An image file as an RGB image of Pillow, turned as its EXIF says where that is wanted."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImageError(
            "Pillow, which reads images, is not installed.",
            "'sudo apt install python3-pil' or 'pip install pillow'",
        ) from error
    try:
        with Image.open(path) as image:
            image.load()
            return rgb_image(image, exif_rotate)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} cannot be read ({error}).", "give a JPEG or PNG file") from error


def rgb_image(image: Any, exif_rotate: bool) -> Any:
    """An opened image in RGB, turned as its EXIF says where that is wanted."""
    from PIL import Image, ImageOps

    if exif_rotate:
        # Unreadable EXIF says nothing.
        with contextlib.suppress(
            SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error
        ):
            image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit grey at 255, nearly all of it to white.
        wide = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        image = Image.fromarray(((wide + 128) // 257).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


def load_pixels(
    path: Path, resolution: int, crop_pct: float, exif_rotate: bool
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 pixels (3, resolution, resolution): shorter side resized, centre cropped."""
    return cropped_pixels(open_image(path, exif_rotate), resolution, crop_pct)


def cropped_pixels(
    image: Any, resolution: int, crop_pct: float
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """uint8 pixels (3, resolution, resolution) of an RGB image: the middle of the resized one."""
    from PIL import Image

    shorter = math.floor(resolution / crop_pct)
    width, height = image.size
    if width <= height:
        size = shorter, int(shorter * height / width)
    else:
        size = int(shorter * width / height), shorter
    if image.size != size:
        # JetPack 6 has Pillow 9.0, which knows the filter by its older name only.
        image = image.resize(size, getattr(Image, "Resampling", Image).BICUBIC)
    left, top = round((size[0] - resolution) / 2), round((size[1] - resolution) / 2)
    image = image.crop((left, top, left + resolution, top + resolution))
    return np.ascontiguousarray(np.array(image, dtype=np.uint8).transpose(2, 0, 1))


def normalize_pixels(
    pixels_NCHW: np.ndarray[Any, Any], mean: Sequence[float], std: Sequence[float]
) -> FloatArray:
    """(x / 255 - mean) / std in float32, rounding after every step as the evaluation does."""
    x_NCHW = pixels_NCHW.astype(np.float32)
    x_NCHW /= np.float32(255)
    x_NCHW -= np.asarray(mean, dtype=np.float32).reshape(-1, 1, 1)
    x_NCHW /= np.asarray(std, dtype=np.float32).reshape(-1, 1, 1)
    return x_NCHW
