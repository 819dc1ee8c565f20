"""From a stored image to the network's input: RGB conversion, resizing, cropping, augmentation.

Both transforms return uint8 pixels, three times fewer bytes to move than float; `normalize` makes
floats of a whole batch. The evaluation pixels are those of timm's ImageNet evaluation with Pillow
(bicubic resize of the shorter side, centre crop), bit for bit. The training pixels are drawn from
(seed, epoch, index) alone, so they depend on no worker and no order.

Shape legend: B batch, C channel, H height, W width.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from care_compress.recipe.sections import AugmentSection

Key = tuple[int, int, int]  # seed, epoch, index of the image: what random draws may depend on
Box = tuple[int, int, int, int]  # left, top, right, bottom

CROP_TRIES = 10  # as torchvision, before the central crop is taken instead
ERASE_SCALE = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)


class Transform(Protocol):
    """Image to uint8 tensor; picklable, because worker processes receive it."""

    def __call__(self, image: Image.Image, key: Key) -> Tensor:
        """The pixels, uint8 CHW, the same for the same image and key."""
        ...


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: alpha is dropped, 16-bit grey is scaled to 8 bits."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        # Pillow would clip at 255 and make nearly every 16-bit image white.
        wide = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        return Image.fromarray(((wide + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB gives the same colours and a warning
    return image.convert("RGB")


def upright(image: Image.Image) -> Image.Image:
    """Turn the image as its EXIF orientation says; unreadable EXIF says nothing."""
    try:
        return ImageOps.exif_transpose(image)
    except (SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        return image


def to_chw(image: Image.Image) -> Tensor:
    """RGB image to uint8 CHW, a view of rows of pixels (no transposed copy)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@dataclass(frozen=True)
class EvalTransform:
    """Resize the shorter side to floor(resolution / crop_pct), then crop the centre."""

    resolution: int
    crop_pct: float
    exif_rotate: bool = False

    def __call__(self, image: Image.Image, key: Key = (0, 0, 0)) -> Tensor:
        """The evaluation pixels; `key` changes nothing."""
        image = to_rgb(upright(image) if self.exif_rotate else image)
        width, height = resized_size(image.size, math.floor(self.resolution / self.crop_pct))
        # crop_pct <= 1, so the crop always fits and torchvision's padding never happens.
        left = round((width - self.resolution) / 2)
        top = round((height - self.resolution) / 2)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        if image.size != (self.resolution, self.resolution):
            image = image.crop((left, top, left + self.resolution, top + self.resolution))
        return to_chw(image)


def resized_size(size: tuple[int, int], shorter: int) -> tuple[int, int]:
    """(width, height) with the shorter side made `shorter`; the longer is cut, as torchvision."""
    width, height = size
    if width <= height:
        return shorter, int(shorter * height / width)
    return int(shorter * width / height), shorter


@dataclass(frozen=True)
class TrainTransform:
    """Random resized crop, flip, colour jitter and erasing, in that order."""

    resolution: int
    augment: AugmentSection
    exif_rotate: bool = False

    def __call__(self, image: Image.Image, key: Key) -> Tensor:
        """The training pixels of this image in this epoch."""
        rng = np.random.default_rng(key)
        image = to_rgb(upright(image) if self.exif_rotate else image)
        box = random_crop_box(image.size, self.augment.scale, self.augment.ratio, rng)
        # Cropped first: resize(box=...) would let pixels outside the crop bleed into its edges.
        size = (self.resolution, self.resolution)
        image = image.crop(box).resize(size, Image.Resampling.BICUBIC)
        if rng.random() < self.augment.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = to_chw(jittered(image, self.augment.jitter, rng))
        erase(pixels, self.augment.erase, rng)
        return pixels


def jittered(image: Image.Image, spread: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation changed by up to `spread`, in a random order."""
    if spread > 0:
        changes = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        factors = rng.uniform(1 - spread, 1 + spread, size=len(changes))
        for which in rng.permutation(len(changes)):
            image = changes[which](image).enhance(float(factors[which]))
    return image


def erase(pixels_CHW: Tensor, probability: float, rng: np.random.Generator) -> None:
    """Put noise into a random rectangle, in place, as often as `probability` says."""
    if rng.random() < probability:
        _, height, width = pixels_CHW.shape
        erased = _random_box((width, height), ERASE_SCALE, ERASE_RATIO, rng, spared=1)
        if erased is not None:
            left, top, right, bottom = erased
            noise = rng.integers(256, size=(3, bottom - top, right - left), dtype=np.uint8)
            pixels_CHW[:, top:bottom, left:right] = torch.from_numpy(noise)


def random_crop_box(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Box:
    """A random part, or the largest central one of a fitting aspect ratio where none was found."""
    box = _random_box(size, scale, ratio, rng)
    if box is not None:
        return box
    width, height = w, h = size
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _random_box(
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
    spared: int = 0,
) -> Box | None:
    """A random part, area and aspect ratio as torchvision draws; None after `CROP_TRIES` misses.

    At least `spared` rows and columns of pixels stay outside.
    """
    width, height = size
    for _ in range(CROP_TRIES):
        target = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width - spared and 0 < h <= height - spared:
            top = int(rng.integers(height - h + 1))
            left = int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    return None


def normalize(images_BCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x / 255 - mean) / std in float32, in the rounding steps of ToTensor and Normalize.

    The memory format (channels_last or not) and the device stay those of `images_BCHW`.
    """
    x = images_BCHW.to(torch.float32)
    mean_C = torch.tensor(mean, dtype=torch.float32, device=x.device)
    std_C = torch.tensor(std, dtype=torch.float32, device=x.device)
    if x.is_contiguous(memory_format=torch.channels_last):
        # Whole rows of pixels at once: over single pixels torch's inner loop is 3 long, 4x slower.
        batch, channels, height, width = x.shape
        rows = x.permute(0, 2, 3, 1).view(batch, height, width * channels)
        rows.div_(255).sub_(mean_C.repeat(width)).div_(std_C.repeat(width))
        return x
    return x.div_(255).sub_(mean_C.view(-1, 1, 1)).div_(std_C.view(-1, 1, 1))
