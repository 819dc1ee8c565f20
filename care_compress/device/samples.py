"""Images through a model, whatever runs it: the bundle's samples, and a user's own pictures."""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from care_compress.device.compare import DeviceAgreement, compare_logits
from care_compress.device.images import FloatArray, load_pixels, normalize_pixels
from care_compress.device.manifest import Bundle

# Normalized floats of so many images are in memory at a time.
_IMAGES_AT_ONCE = 32


class Runs(Protocol):
    """An opened engine or file."""

    def run(self, images_NCHW: FloatArray) -> FloatArray:
        """Logits (N, classes) of any number of images."""
        ...


@dataclass(frozen=True)
class Verified:
    """One model's answers."""

    agreement: DeviceAgreement
    passed: bool

    def as_record(self) -> dict[str, Any]:
        """As it stands in results.json."""
        return {**asdict(self.agreement), "passed": self.passed}


def verify_samples(
    sessions: Mapping[str, Runs], bundle: Bundle, notify: Callable[[str], None]
) -> dict[str, Verified]:
    """Run the bundle's samples through its models and compare with the expected logits."""
    pixels_NCHW, labels_N = bundle.array("pixels"), bundle.array("labels")
    verified = {}
    for model, session in sessions.items():
        notify(f"verifying {model} on {len(pixels_NCHW)} images")
        logits_NK = run_pixels(session, bundle, pixels_NCHW)
        agreement = compare_logits(logits_NK, bundle.array(f"logits_{model}"), labels_N)
        verified[model] = Verified(agreement, agreement.meets(bundle.manifest["limits"]))
    return verified


def run_pixels(session: Runs, bundle: Bundle, pixels_NCHW: Any) -> FloatArray:
    """Logits of uint8 pixels."""
    mean, std = bundle.manifest["mean"], bundle.manifest["std"]
    return np.concatenate(
        [
            session.run(normalize_pixels(pixels_NCHW[first : first + _IMAGES_AT_ONCE], mean, std))
            for first in range(0, len(pixels_NCHW), _IMAGES_AT_ONCE)
        ]
    )


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
