"""Images through a model, whatever runs it: the bundle's samples, and a user's own pictures.

The samples' answers are compared with those that were exported.
"""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from care_compress.device.images import FloatArray, load_pixels, normalize_pixels
from care_compress.device.manifest import Bundle
from care_compress.device.problems import VerificationError

# Normalized floats of so many images are in memory at a time.
_IMAGES_AT_ONCE = 32
# Equal arrays have no noise and an infinite ratio, which JSON cannot say.
BEST_SQNR_DB = 150.0


class Runs(Protocol):
    """An opened engine or file."""

    @property
    def takes_bytes(self) -> bool:
        """Whether its images are pixels (N, H, W, 3) in uint8, and not normalized."""
        ...

    def run(self, images_NCHW: FloatArray) -> FloatArray:
        """Logits (N, classes) of any number of images."""
        ...


@dataclass(frozen=True)
class DeviceAgreement:
    """How far a model's logits are from the expected ones, and from the labels."""

    images: int
    top1: float  # percent right
    expected_top1: float
    agreement: float  # percent of images with the same first class as expected
    sqnr_db: float
    max_deviation: float  # largest difference, relative to the largest expected logit

    def meets(self, limits: Mapping[str, float]) -> bool:
        """Whether it is as good as the bundle demands."""
        return self.agreement >= limits["agreement"] and self.sqnr_db >= limits["sqnr_db"]

    def as_record(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """As it stands in results.json."""
        return {**asdict(self), "passed": self.meets(limits)}


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


def verify_samples(
    sessions: Mapping[str, Runs], bundle: Bundle, notify: Callable[[str], None]
) -> dict[str, DeviceAgreement]:
    """Run the bundle's samples through its models and compare with the expected logits."""
    pixels_NCHW, labels_N = bundle.array("pixels"), bundle.array("labels")
    verified = {}
    for model, session in sessions.items():
        notify(f"verifying {model} on {len(pixels_NCHW)} images")
        logits_NK = run_pixels(session, bundle, pixels_NCHW)
        verified[model] = compare_logits(logits_NK, bundle.array(f"logits_{model}"), labels_N)
    return verified


def run_pixels(session: Runs, bundle: Bundle, pixels_NCHW: Any) -> FloatArray:
    """Logits of uint8 pixels, which go as they are into a graph that normalizes them itself."""
    mean, std = bundle.manifest["mean"], bundle.manifest["std"]
    logits = []
    for first in range(0, len(pixels_NCHW), _IMAGES_AT_ONCE):
        part_NCHW = pixels_NCHW[first : first + _IMAGES_AT_ONCE]
        if session.takes_bytes:
            logits.append(session.run(part_NCHW.transpose(0, 2, 3, 1)))
        else:
            logits.append(session.run(normalize_pixels(part_NCHW, mean, std)))
    return np.concatenate(logits)


def load_files(bundle: Bundle, files: Sequence[Path]) -> np.ndarray[Any, Any]:
    """Image files as the bundle's model wants them."""
    about = bundle.manifest
    size, crop, turn = about["resolution"], about["crop_pct"], about["exif_rotate"]
    return np.stack([load_pixels(file, size, crop, turn) for file in files])


def likeliest(
    session: Runs, bundle: Bundle, pixels_NCHW: Any, top: int
) -> list[list[tuple[str, float]]]:
    """The likeliest classes of each image, with their probabilities."""
    logits_NK = run_pixels(session, bundle, pixels_NCHW)
    odds_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    odds_NK /= odds_NK.sum(axis=1, keepdims=True)
    classes = bundle.manifest["classes"]
    return [
        [(str(classes[k]), float(odds_K[k])) for k in np.argsort(-odds_K)[:top]]
        for odds_K in odds_NK
    ]
