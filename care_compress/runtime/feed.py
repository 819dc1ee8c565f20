"""From the network's images to what a file takes: normalised floats, or the bytes they came from.

Everything that compares hands out (B, 3, H, W) floats. A file exported with ``input: uint8`` takes
the pixels themselves, (B, H, W, 3); its metadata say how they are normalised, and undoing that is
exact: the floats were made from 256 values.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from care_compress.errors import TargetError

PREPROCESSING = "care_compress.preprocessing"  # in a file's metadata
CHANNELS = 3

Size = TypeVar("Size")


@dataclass(frozen=True)
class Feed:
    """What a file is given for the network's images."""

    takes_bytes: bool = False
    mean: tuple[float, ...] = ()  # of a file that takes bytes
    std: tuple[float, ...] = ()

    def __call__(self, images_BCHW: Tensor) -> NDArray[Any]:
        """The file's input; floats that no pixel has, such as noise, become the nearest one."""
        x_BCHW = images_BCHW.detach().float().cpu()
        if not self.takes_bytes:
            floats: NDArray[Any] = x_BCHW.contiguous().numpy()
            return floats
        mean, std = (torch.tensor(one).view(-1, 1, 1) for one in (self.mean, self.std))
        pixels_BCHW = ((x_BCHW * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        pixels: NDArray[Any] = pixels_BCHW.permute(0, 2, 3, 1).contiguous().numpy()
        return pixels

    def as_images(self, shape: Sequence[Size]) -> list[Size]:
        """The file's shape in the order of the network's images."""
        if not self.takes_bytes:
            return list(shape)
        batch, height, width, channels = shape
        return [batch, channels, height, width]


def feed_for(path: Path, is_uint8: bool, shape: Sequence[object], said: str | None) -> Feed:
    """How a file with this input is fed; `said` are its metadata on preprocessing.

    Raises TargetError for bytes of which the file does not say what they mean.
    """
    if not is_uint8:
        return Feed()
    fix = "export it again; export.input: uint8 writes such files"
    if len(shape) != 4 or shape[-1] != CHANNELS:
        raise TargetError(f"{path} takes bytes of {list(shape)}, not of (B, H, W, 3).", fix)
    try:
        about = json.loads(said or "")
        numbers = [np.asarray(about[key], np.float64) for key in ("mean", "std")]
    except (ValueError, TypeError, KeyError):
        numbers = []
    if [one.shape for one in numbers] != [(CHANNELS,)] * 2 or not (numbers[1] > 0).all():
        raise TargetError(
            f"{path} takes bytes and has no usable {PREPROCESSING} in its metadata, by which they "
            "are normalised.",
            fix,
        )
    mean, std = (tuple(one.tolist()) for one in numbers)
    return Feed(True, mean, std)
