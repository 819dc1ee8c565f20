"""The published network as the tests know it: names, shapes, reproducible weights, golden outputs.

Every tensor is drawn from a generator seeded with the CRC of its name; the golden outputs are what
the published implementation computes with exactly these values.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from care_compress.model.care import Care

DATA = Path(__file__).parent / "data"
SHAPES = json.loads((DATA / "published_shapes.json").read_text())
GOLDEN = np.load(DATA / "golden_care_s0.npz")
GOLDEN_SIZES = [(224, 224), (96, 96), (160, 192)]


def published_state(arch: str) -> dict[str, Tensor]:
    """Every published tensor of care_s0, care_s1 or care_s2."""
    shapes = SHAPES["CARETrans_" + arch.removeprefix("care_").upper()]
    return {name: _tensor(name, tuple(shape)) for name, shape in shapes.items()}


def published_model(arch: str = "care_s0") -> Care:
    """A CARE with those tensors, loaded strictly, in eval mode."""
    model = Care(arch)
    model.load_state_dict(published_state(arch), strict=True)
    return model.eval()


def golden_input(height: int, width: int) -> Tensor:
    """The two images that the golden outputs belong to."""
    draws = np.random.default_rng(7).standard_normal((2, 3, height, width))
    return torch.from_numpy(draws.astype(np.float32))


def _tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return torch.tensor(0)
    uniform = {"running_var": (0.5, 1.5), "gamma": (0.1, 0.3)}.get(leaf)
    spread = {"running_mean": 0.1, "bias": 0.05}.get(leaf)
    if uniform is None and spread is None and len(shape) == 1:
        uniform = (0.8, 1.2)  # norm weights
    if uniform is not None:
        values = rng.uniform(*uniform, shape)
    else:
        scale = spread if spread is not None else 1 / np.sqrt(np.prod(shape[1:]))
        values = rng.standard_normal(shape) * scale
    return torch.from_numpy(values.astype(np.float32))


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Largest deviation over the largest magnitude."""
    return float((value.double() - reference.double()).abs().max() / reference.double().abs().max())
