"""Is a difference more than chance? Intervals and tests for two models on the same images."""

import math

import numpy as np
from numpy.typing import NDArray

NORMAL_95 = 1.959964  # deviations that hold 95 % of a normal distribution
DRAWS = 10_000
BINS = 15


def changes(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[int, int]:
    """Images that were right and are wrong now, and the other way round."""
    return int((before & ~after).sum()), int((~before & after).sum())


def drop_interval(lost: int, gained: int, images: int, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the drop, in points.

    Drawing images with replacement draws (lost, gained, neither) from a multinomial: the same
    interval without drawing the images themselves. Never narrower than one image either way where
    nothing changed: no flip among n images does not prove that there is none among more.
    """
    rest = images - lost - gained
    shares = np.array([lost, gained, rest]) / images
    drawn = np.random.default_rng(seed).multinomial(images, shares, size=DRAWS)
    drops = 100 * (drawn[:, 0] - drawn[:, 1]) / images
    low, high = np.percentile(drops, [2.5, 97.5])
    if lost + gained == 0:
        low, high = -100 / images, 100 / images
    return float(low), float(high)


def mcnemar_p(lost: int, gained: int) -> float:
    """Two-sided exact McNemar test: how likely so uneven a split of the changed answers is.

    p = 2 sum_{k <= min} C(n, k) / 2^n, at most 1.
    """
    changed, fewer = lost + gained, min(lost, gained)
    logs = [
        math.lgamma(changed + 1) - math.lgamma(k + 1) - math.lgamma(changed - k + 1)
        for k in range(fewer + 1)
    ]
    tail = sum(math.exp(value - changed * math.log(2)) for value in logs)
    return min(1.0, 2 * tail)


def wilson(percent: float, images: int) -> tuple[float, float]:
    """95 % interval of a share of images, in percent (Wilson's score interval)."""
    p, z2 = percent / 100, NORMAL_95**2
    middle = (p + z2 / (2 * images)) / (1 + z2 / images)
    half = NORMAL_95 / (1 + z2 / images) * math.sqrt(p * (1 - p) / images + z2 / (4 * images**2))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def unpaired_interval(
    before: float, images_before: int, after: float, images_after: int
) -> tuple[float, float]:
    """95 % interval of before minus after, in points, of models scored on images of their own.

    Newcombe's, from the Wilson intervals (l, u) of both: the lower end is
    d - sqrt((before - l_before)^2 + (u_after - after)^2), the upper one likewise. Wider than the
    truth where both saw the same images, since those would cancel.
    """
    difference = before - after
    low_b, high_b = wilson(before, images_before)
    low_a, high_a = wilson(after, images_after)
    return (
        difference - math.hypot(before - low_b, high_a - after),
        difference + math.hypot(high_b - before, after - low_a),
    )


def calibration_error(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> float:
    """ECE in points: |accuracy - confidence| in 15 bins of confidence, weighted by their images."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(place, weights=right - confidence.astype(float), minlength=BINS)
    return float(100 * np.abs(gap).sum() / len(confidence))


def ratio_interval(
    numerator: NDArray[np.float64], denominator: NDArray[np.float64], seed: int = 0
) -> tuple[float, float, float]:
    """Median of paired ratios and its 95 % bootstrap interval; one pair for each turn."""
    ratios = numerator / denominator
    drawn = np.random.default_rng(seed).choice(ratios, size=(DRAWS // 10, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(ratios)), float(low), float(high)
