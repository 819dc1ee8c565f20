"""Where two models part: every site's output in both, in the order of the network."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from care_compress.evaluate.taps import run_module, tap_file
from care_compress.quantize.distance import sqnr_db

NEAR_DB = 80.0  # above it only the order of float sums differs


@dataclass(frozen=True)
class Parting:
    """The site where two models part."""

    site: str
    sqnr_db: float
    before_db: float  # the lowest of the sites before it

    def __str__(self) -> str:
        return f"{self.site} ({self.sqnr_db:.1f} dB, before it {self.before_db:.1f})"


def sharpest_fall(distances_db: Mapping[str, float]) -> Parting | None:
    """The first site whose output differs: where the distance falls furthest.

    What comes after inherits it. None where every site is near.
    """
    before, furthest, found = math.inf, 0.0, None
    for site, distance in distances_db.items():
        reference = min(before, NEAR_DB)
        if reference - distance > furthest:
            furthest, found = reference - distance, Parting(site, distance, reference)
        before = min(before, distance)
    return found


@torch.no_grad()
def first_divergence(model: nn.Module, artifact: Path, sites: Iterable[str], image: Tensor) -> str:
    """Where a file parts from the model it was made from, in words."""
    expected = run_module(model, image).sites
    names = [name for name in sites if name in expected]
    found = tap_file(artifact, names)(image)
    distances = {
        name: sqnr_db(expected[name], found[name].reshape(expected[name].shape))
        for name in names
        if name in found
    }
    return str(sharpest_fall(distances) or "no layer that both name")
