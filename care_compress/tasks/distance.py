"""How far one tensor is from another: signal over noise, in decibels.

    SQNR = 10 log10(sum expected^2 / sum (expected - found)^2)

The sums add up over batches; a mean of decibels would let one easy image hide a hard one.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict
from torch import Tensor

EXACT_DB = 200.0  # stands for no difference at all, where a file or a plot needs a number
TINY = 1e-300  # a signal of zeros has no logarithm


@dataclass
class Distance:
    """Signal and noise, summed over batches."""

    # No difference is infinitely far away, and JSON has no number for that.
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(ser_json_inf_nan="strings")

    signal: float = 0.0
    noise: float = 0.0

    def add(self, expected: Tensor, found: Tensor) -> None:
        """Count two tensors of one shape."""
        wanted = expected.double()
        self.signal += float(wanted.square().sum())
        self.noise += float((wanted - found.double()).square().sum())

    def __add__(self, other: "Distance") -> "Distance":
        """Signal and noise over the batches of both."""
        return Distance(self.signal + other.signal, self.noise + other.noise)

    @property
    def sqnr_db(self) -> float:
        """Infinite for no difference, minus infinite where anything is no number."""
        if not math.isfinite(self.noise):
            return -math.inf
        return math.inf if self.noise == 0 else 10 * math.log10(max(self.signal, TINY) / self.noise)

    @property
    def known_db(self) -> float | None:
        """None where JSON has no number: no difference, or nothing that could be compared."""
        return self.sqnr_db if math.isfinite(self.sqnr_db) else None

    @property
    def shown_db(self) -> float:
        """Never infinite, for JSON and for plots; nothing can be lost where there is no signal."""
        if self.signal == 0:
            return EXACT_DB
        return max(-EXACT_DB, min(EXACT_DB, self.sqnr_db))


def sqnr_db(expected: Tensor, found: Tensor) -> float:
    """`Distance` of a single pair."""
    distance = Distance()
    distance.add(expected, found)
    return distance.sqnr_db
