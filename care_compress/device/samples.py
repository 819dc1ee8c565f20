"""The bundle's samples through a model, whatever runs it, compared with the exported answers."""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from care_compress.device.answers import answers_of
from care_compress.device.images import FloatArray, normalize_pixels
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
        """Outputs (N, ...) of any number of images."""
        ...


@dataclass(frozen=True)
class DeviceAgreement:
    """How far a model's outputs are from the expected ones."""

    images: int
    compared: dict[str, float]  # percent, as the task compares outputs; "agreement" is one
    sqnr_db: float
    max_deviation: float  # largest difference, relative to the largest expected value

    def meets(self, limits: Mapping[str, float]) -> bool:
        """Whether it is as good as the bundle demands."""
        agreement = self.compared["agreement"]
        return agreement >= limits["agreement"] and self.sqnr_db >= limits["sqnr_db"]

    def as_record(self, limits: Mapping[str, float]) -> dict[str, Any]:
        """As it stands in results.json."""
        return {
            "images": self.images,
            **self.compared,
            "sqnr_db": self.sqnr_db,
            "max_deviation": self.max_deviation,
            "passed": self.meets(limits),
        }


def compare_outputs(
    got: FloatArray, expected: np.ndarray[Any, Any], bundle: Bundle
) -> DeviceAgreement:
    """Compare what an engine or a file gives here with what it gave when it was exported."""
    if got.shape != expected.shape:
        raise VerificationError(
            f"it gives {got.shape} logits where {expected.shape} are expected.",
            "unpack the bundle again; an engine has to be built from it",
        )
    check_finite(got)
    exact = expected.astype(np.float64)
    noise = got.astype(np.float64) - exact
    power, disturbed = float((exact**2).sum()), float((noise**2).sum())
    sqnr = 10 * math.log10(max(power, 1e-30) / disturbed) if disturbed > 0 else BEST_SQNR_DB
    return DeviceAgreement(
        images=len(got),
        compared=answers_of(bundle).compare(got, expected.astype(np.float32), bundle),
        sqnr_db=min(BEST_SQNR_DB, sqnr),
        max_deviation=float(np.abs(noise).max() / max(np.abs(exact).max(), 1e-12)),
    )


def check_finite(output: FloatArray) -> None:
    """Raise VerificationError for NaN and infinity, which say nothing of an image."""
    if not np.isfinite(output).all():
        raise VerificationError(
            "it gives logits that are not finite: a value overflows somewhere in it.",
            "use the other model of the bundle, and report this one (an engine's layer table, too)",
        )


def verify_samples(
    sessions: Mapping[str, Runs], bundle: Bundle, notify: Callable[[str], None]
) -> dict[str, DeviceAgreement]:
    """Run the bundle's samples through its models and compare with the expected outputs."""
    pixels_NCHW = bundle.array("pixels")
    verified = {}
    for model, session in sessions.items():
        notify(f"verifying {model} on {len(pixels_NCHW)} images")
        got = run_pixels(session, bundle, pixels_NCHW)
        verified[model] = compare_outputs(got, bundle.array(f"logits_{model}"), bundle)
    return verified


def run_pixels(session: Runs, bundle: Bundle, pixels_NCHW: Any) -> FloatArray:
    """Outputs to uint8 pixels, which go as they are into a graph that normalizes them itself."""
    mean, std = bundle.manifest["mean"], bundle.manifest["std"]
    outputs = []
    for first in range(0, len(pixels_NCHW), _IMAGES_AT_ONCE):
        part_NCHW = pixels_NCHW[first : first + _IMAGES_AT_ONCE]
        if session.takes_bytes:
            outputs.append(session.run(part_NCHW.transpose(0, 2, 3, 1)))
        else:
            outputs.append(session.run(normalize_pixels(part_NCHW, mean, std)))
    return np.concatenate(outputs)
