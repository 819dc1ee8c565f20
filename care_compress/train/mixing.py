"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) on a batch.

Each image is mixed with its neighbour in the batch (the order is already random) with one lambda
per step. So a global batch is mixed alike however many processes share it.
"""

import numpy as np
import torch
from torch import Tensor

from care_compress.sections import AugmentSection

MIXING_STREAM = 1  # keeps these draws apart from the loader's, which share the seed


def mix(
    images_BCHW: Tensor, targets_BK: Tensor, augment: AugmentSection, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Mix neighbours (0 with 1, 2 with 3, ...); an odd last image stays as it is."""
    if not (augment.mixup or augment.cutmix):
        return images_BCHW, targets_BK
    rng = np.random.default_rng((seed, MIXING_STREAM, step))
    cut = augment.cutmix > 0 and (augment.mixup == 0 or rng.random() < 0.5)
    shape = augment.cutmix if cut else augment.mixup
    share = float(rng.beta(shape, shape))
    partner = neighbours(len(images_BCHW), images_BCHW.device)
    if cut:
        rows, columns, share = _box(images_BCHW.shape[2], images_BCHW.shape[3], share, rng)
        mixed = images_BCHW.clone()
        mixed[:, :, rows, columns] = images_BCHW[partner][:, :, rows, columns]
    else:
        mixed = images_BCHW * share + images_BCHW[partner] * (1 - share)
    return mixed, targets_BK * share + targets_BK[partner] * (1 - share)


def neighbours(count: int, device: torch.device) -> Tensor:
    """Index of each image's partner."""
    partner = torch.arange(count, device=device) ^ 1
    return partner.clamp_(max=count - 1)


def _box(
    height: int, width: int, kept: float, rng: np.random.Generator
) -> tuple[slice, slice, float]:
    """A random box of area 1 - kept, clipped to the image, and the share really kept."""
    side = float(np.sqrt(1 - kept))
    cut_h, cut_w = int(height * side), int(width * side)
    y, x = int(rng.integers(height)), int(rng.integers(width))
    top, bottom = max(0, y - cut_h // 2), min(height, y + cut_h - cut_h // 2)
    left, right = max(0, x - cut_w // 2), min(width, x + cut_w - cut_w // 2)
    kept = 1 - (bottom - top) * (right - left) / (height * width)
    return slice(top, bottom), slice(left, right), kept
