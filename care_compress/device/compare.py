"""Are a model's answers those that were exported? Numbers first, then passed or failed."""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from care_compress.device.images import FloatArray
from care_compress.device.problems import VerificationError

# Equal arrays have no noise and an infinite ratio, which JSON cannot say.
BEST_SQNR_DB = 150.0


@dataclass(frozen=True)
class DeviceAgreement:
    """How far a model's logits are from the expected ones, and from the labels."""

    images: int
    top1: float  # percent right
    expected_top1: float
    agreement: float  # percent of images with the same first class as expected
    sqnr_db: float
    max_deviation: float  # largest difference, relative to the largest expected logit

    def meets(self, limits: dict[str, float]) -> bool:
        """Whether it is as good as the bundle demands."""
        return self.agreement >= limits["agreement"] and self.sqnr_db >= limits["sqnr_db"]


def compare_logits(
    got_NK: FloatArray,
    expected_NK: np.ndarray[Any, Any],
    labels_N: np.ndarray[Any, Any],
) -> DeviceAgreement:
    """Compare what an engine or a file gives here with what it gave when it was exported."""
    if got_NK.shape != expected_NK.shape:
        raise VerificationError(
            f"it gives {got_NK.shape} logits where {expected_NK.shape} are expected.",
            "unpack the bundle again; an engine has to be built from it",
        )
    if not np.isfinite(got_NK).all():
        raise VerificationError(
            "it gives logits that are not finite: a value overflows somewhere in it.",
            "use the other model of the bundle, and report this one (an engine's layer table, too)",
        )
    expected_NK = expected_NK.astype(np.float64)
    noise_NK = got_NK.astype(np.float64) - expected_NK
    signal, noise = float((expected_NK**2).sum()), float((noise_NK**2).sum())
    sqnr = 10 * math.log10(max(signal, 1e-30) / noise) if noise > 0 else BEST_SQNR_DB
    first_N, expected_N = got_NK.argmax(axis=1), expected_NK.argmax(axis=1)
    return DeviceAgreement(
        images=len(got_NK),
        top1=100 * float((first_N == labels_N).mean()),
        expected_top1=100 * float((expected_N == labels_N).mean()),
        agreement=100 * float((first_N == expected_N).mean()),
        sqnr_db=min(BEST_SQNR_DB, sqnr),
        max_deviation=float(np.abs(noise_NK).max() / max(np.abs(expected_NK).max(), 1e-12)),
    )
