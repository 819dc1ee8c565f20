"""Feeding a model of fixed batch size."""

from collections.abc import Callable

import torch
from torch import Tensor


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
