"""How sure a number is: 95 % intervals of drops, shares and speeds, as plain formulas.

Each covers the truth at least 94 times in a hundred where little was seen, too; tests draw them.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import chdtri, stdtr

Interval = tuple[float, float, float]  # value, low, high

NORMAL_95 = 1.959964  # deviations that hold 95 % of a normal distribution
TAIL = 0.025
FAR = 3.0  # deviations from the middle beyond which a value counts as just so far
# What the autocorrelation of turns may be, each as likely before anything is seen.
AUTOCORRELATIONS = np.arange(20) / 20


def drop_interval(lost: int, gained: int, images: int) -> tuple[float, float]:
    """95 % interval of the drop, in points, where `lost` answers turned wrong and `gained` right.

    The exact Poisson limits (l, u) of both counts (Garwood 1936), joined by `sum_interval`:

        low = lost - gained - sqrt((lost - l_lost)^2 + (u_gained - gained)^2),

    the upper end likewise. No flip seen says up to 3.7 either way, and one flip seen says more: a
    bootstrap of what was seen knows nothing of what was not, and is surer the less there is.
    """
    turned = (float(lost), *_poisson_limits(lost)), (float(gained), *_poisson_limits(gained))
    _, low, high = sum_interval(turned[0], negated(turned[1]))
    return max(-100.0, 100 * low / images), min(100.0, 100 * high / images)


def sum_interval(*parts: Interval) -> Interval:
    """Sum of estimates that know nothing of each other, with its 95 % interval.

    Their distances to their own ends are joined as deviations are (MOVER, Zou and Donner 2008):

        low = sum v_i - sqrt(sum (v_i - l_i)^2),    high = sum v_i + sqrt(sum (u_i - v_i)^2)

    Estimates that err to the same side have a wider sum; their difference has a narrower one, so
    for a difference of such the interval is too wide rather than too narrow.
    """
    value = math.fsum(one for one, _, _ in parts)
    low = value - math.hypot(*(one - low for one, low, _ in parts))
    return value, low, value + math.hypot(*(high - one for one, _, high in parts))


def negated(interval: Interval) -> Interval:
    """Turn an estimate round: its ends change places."""
    value, low, high = interval
    return -value, -high, -low


def _poisson_limits(count: int) -> tuple[float, float]:
    """Exact 95 % limits of the mean that a count was drawn from."""
    low = float(chdtri(2 * count, 1 - TAIL)) / 2 if count else 0.0
    return low, float(chdtri(2 * count + 2, TAIL)) / 2


# The most events, at 97.5 %, behind none seen.
UNSEEN = _poisson_limits(0)[1]


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

    Newcombe's, from the Wilson intervals (l, u) of both, joined by `sum_interval`: the lower end is
    d - sqrt((before - l_before)^2 + (u_after - after)^2), the upper one likewise. Wider than the
    truth where both saw the same images, since those would cancel.
    """
    first = before, *wilson(before, images_before)
    _, low, high = sum_interval(first, negated((after, *wilson(after, images_after))))
    return low, high


def ratio_interval(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> Interval:
    """Ratio of what was measured in pairs, one pair for each turn, with its 95 % interval."""
    value, low, high = (math.exp(end) for end in centre_interval(np.log(numerator / denominator)))
    return value, low, high


def centre_interval(values: NDArray[np.float64]) -> Interval:
    """Centre of values that were measured one after the other, with its 95 % interval.

    A machine that is slow stays slow for a while: neighbours are alike, and n of them say less than
    n. How much is not known either, so every autocorrelation phi of a first-order process counts by
    how likely it makes the values, their mean m and spread integrated out,

        p(phi) ~ sqrt(1 - phi^2) A^(-1/2) S^(-(n - 1)/2),    m | phi ~ t_(n-1)(m_phi, S / (n - 1) A)

    with u_i = x_i - phi x_(i-1), e_i = 1 - phi (the first of each sqrt(1 - phi^2) x_1 and
    sqrt(1 - phi^2)), A = e.e, m_phi = e.u / A and S = |u - m_phi e|^2. A turn in which another
    program ran is far out and counts as just so far.
    """
    middle = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - middle)))  # of a normal distribution
    if spread > 0:
        values = np.clip(values, middle - FAR * spread, middle + FAR * spread)
    if np.ptp(values) <= 1e-12 * max(1.0, abs(middle)):
        return middle, middle, middle
    n, phi = len(values), AUTOCORRELATIONS[:, None]
    first = np.sqrt(1 - phi**2)
    u = np.hstack((first * values[0], values[1:] - phi * values[:-1]))
    e = np.hstack((first, np.repeat(1 - phi, n - 1, axis=1)))
    a = (e**2).sum(axis=1)
    means = (e * u).sum(axis=1) / a
    s = ((u - means[:, None] * e) ** 2).sum(axis=1)
    scales = np.sqrt(s / (n - 1) / a)
    logs = np.log(first[:, 0]) - np.log(a) / 2 - (n - 1) / 2 * np.log(s)
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()

    def quantile(share: float) -> float:
        widest = 1e4 * float(scales.max())
        ends = float(means.min()) - widest, float(means.max()) + widest

        def excess(at: float) -> float:
            return float(weights @ stdtr(n - 1, (at - means) / scales)) - share

        return float(brentq(excess, *ends, xtol=1e-6 * float(scales.min())))

    return quantile(0.5), quantile(TAIL), quantile(1 - TAIL)
