"""What every runtime looks like to accuracy, latency and distillation: pixels in, logits out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from care_compress.errors import TargetError

# What an exported file says its task is; a classifier, which may be anybody's, says nothing.
TASK = "care_compress.task"
# How many axes an answer has, and how many of its rows are no classes: the sides of a box.
RANKS = {"classification": 2, "segmentation": 4, "detection": 3}
NOT_CLASSES = {"detection": 4}


def answers(said: str | None) -> str:
    """The task of a file that says so, or of one that does not."""
    return said if said in RANKS else "classification"


class Predictor(Protocol):
    """A loaded network, wherever it runs."""

    task: str
    num_classes: int

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Answers (B, ...) in float32 of normalised float32 images; any batch size."""
        ...


def in_slices(run: Callable[[Tensor], Tensor], images_BCHW: Tensor, fixed: int | None) -> Tensor:
    """Logits of any number of images; the last slice is filled up and cut again."""
    if fixed is None or len(images_BCHW) == fixed:
        return run(images_BCHW)
    logits = []
    for chunk in torch.split(images_BCHW, fixed):
        missing = fixed - len(chunk)
        padded = torch.cat([chunk, chunk[-1:].expand(missing, -1, -1, -1)]) if missing else chunk
        logits.append(run(padded)[: len(chunk)])
    return torch.cat(logits)


def as_answers(value: Any, images_BCHW: Tensor, rows: int, rank: int, path: Path) -> Tensor:
    """What a runtime gave back, if it is what the file declares: one answer for each image."""
    floats = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    if not floats or value.shape[:2] != (len(images_BCHW), rows) or value.ndim != rank:
        given = f"{value.dtype} {value.shape}" if isinstance(value, np.ndarray) else type(value)
        wanted = ", ".join([str(len(images_BCHW)), str(rows), *["..."] * (rank - 2)])
        raise TargetError(
            f"{path} answers {len(images_BCHW)} images with {given}, not with ({wanted}) numbers.",
            "give a CARE with one (B, 3, H, W) input, or another classifier with (B, K) logits",
        )
    return torch.from_numpy(value).to(images_BCHW.device)


def failed(path: Path, error: Exception) -> TargetError:
    """The error for images that a runtime does not run on."""
    reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
    return TargetError(
        f"{path} does not run on these images: {reason.strip()[:200]}.", "export it again"
    )
