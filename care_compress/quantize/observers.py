"""From a stream of values to a range: how each ``range:`` of a recipe is found.

Min-max and moving average are torchao's. Its histogram observer looks for the least squared error
of 256 levels, whatever the bits, so percentile, MSE and entropy share one histogram of our own.
All of them keep a fixed number of bins, whatever the number of images.
"""

import math

import torch
from torch import Tensor
from torchao.quantization.pt2e import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
)

from care_compress.quantize.fakequant import IntQuantizer

BINS = 4096
SHRINKS = 64  # candidate ranges that a search tries
VALUES = 1 << 17  # of one tensor that are counted; its extremes always are
EMPTY = 1e-12


class HistogramObserver(MinMaxObserver):
    """Counts values in `BINS` equal bins of [-2^k, 2^k); subclasses choose a range from them.

    When a value falls outside, k grows and neighbouring bins merge in pairs, which is exact.
    """

    def __init__(self, **qparams: object) -> None:
        super().__init__(**qparams)
        self.exponent: int | None = None
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def forward(self, x_orig: Tensor) -> Tensor:
        """Count one tensor."""
        x = x_orig.detach()
        super().forward(x)
        needed = _exponent(max(abs(float(self.min_val)), abs(float(self.max_val))))
        if self.exponent is None:
            self.exponent = needed
        while self.exponent < needed:
            self._widen()
        half = 2.0**self.exponent
        values = x.float().flatten()
        stride = len(values) // VALUES | 1  # odd, so that no channel is left out
        self.counts += torch.histc(values[::stride], BINS, -half, half).double().cpu()
        return x_orig

    def _widen(self) -> None:
        assert self.exponent is not None
        merged = self.counts.view(-1, 2).sum(dim=1)
        self.counts = torch.zeros_like(self.counts)
        self.counts[BINS // 4 : 3 * BINS // 4] = merged
        self.exponent += 1

    def centres(self) -> Tensor:
        """Middle of every bin."""
        assert self.exponent is not None
        half = 2.0**self.exponent
        width = 2 * half / BINS
        return torch.arange(BINS, dtype=torch.float64) * width - half + width / 2

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the chosen range."""
        low, high = self.choose()
        low, high = min(low, 0.0), max(high, 0.0)  # zero is padding, and must stay exact
        qparams: tuple[Tensor, Tensor] = self._calculate_qparams(
            torch.tensor(low, dtype=torch.float32), torch.tensor(high, dtype=torch.float32)
        )
        return qparams

    def choose(self) -> tuple[float, float]:
        """The range to quantize."""
        raise NotImplementedError

    def candidates(self) -> tuple[Tensor, Tensor]:
        """Lows and highs of ranges from the full one to a quarter of it, both ends alike."""
        shares = torch.linspace(1.0, 0.25, SHRINKS)
        return shares * self.min_val.cpu(), shares * self.max_val.cpu()

    def quantized(self, lows: Tensor, highs: Tensor) -> Tensor:
        """Every bin centre as each of these ranges would represent it (ranges, bins)."""
        scale, zero_point = self._calculate_qparams(lows, highs)
        scale, zero_point = scale.double()[:, None], zero_point.double()[:, None]
        steps = (self.centres() / scale).round_() + zero_point
        values: Tensor = (steps.clamp_(self.quant_min, self.quant_max) - zero_point) * scale
        return values


class PercentileObserver(HistogramObserver):
    """Keeps the middle `percentile` percent of the values."""

    def __init__(self, percentile: float = 99.99, **qparams: object) -> None:
        super().__init__(**qparams)
        self.percentile = percentile

    def choose(self) -> tuple[float, float]:
        """The two quantiles, never outside what was seen."""
        shares = self.counts.cumsum(dim=0) / self.counts.sum().clamp(min=EMPTY)
        tail = (1 - self.percentile / 100) / 2
        centres = self.centres()
        low = centres[int((shares < tail).sum().clamp(max=BINS - 1))]
        high = centres[int((shares < 1 - tail).sum().clamp(max=BINS - 1))]
        return max(float(low), float(self.min_val)), min(float(high), float(self.max_val))


class SquaredErrorObserver(HistogramObserver):
    """Least mean squared error: argmin over ranges of sum_b n_b (x_b - Q(x_b))^2."""

    def choose(self) -> tuple[float, float]:
        """The best of the candidate ranges."""
        lows, highs = self.candidates()
        errors = (self.centres() - self.quantized(lows, highs)).square() @ self.counts
        best = int(errors.argmin())
        return float(lows[best]), float(highs[best])


class EntropyObserver(HistogramObserver):
    """Least KL(P || Q) between the values and what quantization leaves of them.

    Each level spreads its count evenly over the non-empty bins it represents; what lies outside
    the range is counted in the outermost bins (the calibration TensorRT made known).
    """

    def choose(self) -> tuple[float, float]:
        """The best of the candidate ranges."""
        lows, highs = self.candidates()
        divergences = [
            self._divergence(float(low), float(high), levels)
            for low, high, levels in zip(lows, highs, self.quantized(lows, highs), strict=True)
        ]
        best = divergences.index(min(divergences))
        return float(lows[best]), float(highs[best])

    def _divergence(self, low: float, high: float, levels: Tensor) -> float:
        centres = self.centres()
        inside = (centres >= low) & (centres <= high)
        kept = self.counts * inside
        if float(kept.sum()) == 0:
            return math.inf
        clipped = kept.clone()
        first, last = int(inside.nonzero()[0]), int(inside.nonzero()[-1])
        clipped[first] += self.counts[:first].sum()
        clipped[last] += self.counts[last + 1 :].sum()
        values, index = torch.unique(levels, return_inverse=True)
        occupied = (kept > 0).double()
        totals = torch.zeros(len(values), dtype=torch.float64).index_add_(0, index, kept)
        shared = torch.zeros(len(values), dtype=torch.float64).index_add_(0, index, occupied)
        spread = occupied * (totals / shared.clamp(min=1))[index]
        p = clipped / clipped.sum()
        q = (spread + EMPTY) / (spread + EMPTY).sum()
        live = p > 0
        return float((p[live] * (p[live] / q[live]).log()).sum())


def make_observer(quantizer: IntQuantizer, percentile: float) -> ObserverBase:
    """The observer a quantizer's ``range`` asks for."""
    spec = quantizer.spec
    qparams = {
        "dtype": spec.dtype,
        "qscheme": quantizer.qscheme,
        "quant_min": spec.quant_min,
        "quant_max": spec.quant_max,
    }
    if spec.granularity == "channel":
        averaging = spec.range == "moving_average"
        kind = MovingAveragePerChannelMinMaxObserver if averaging else PerChannelMinMaxObserver
        return kind(ch_axis=spec.axis, **qparams)
    if spec.range == "percentile":
        return PercentileObserver(percentile=percentile, **qparams)
    kinds: dict[str, type[ObserverBase]] = {
        "min_max": MinMaxObserver,
        "moving_average": MovingAverageMinMaxObserver,
        "mse": SquaredErrorObserver,
        "entropy": EntropyObserver,
    }
    return kinds[spec.range](**qparams)


def _exponent(magnitude: float) -> int:
    """The smallest k with magnitude < 2^k."""
    return math.frexp(magnitude)[1] if magnitude > 0 else -20


def weight_scale(
    quantizer: IntQuantizer, weight: Tensor, covariance: Tensor | None = None
) -> Tensor:
    """Symmetric scales of a weight: from its largest magnitude, or of least squared error.

    With the covariance of the layer's inputs, the error is that of the product,
    e^T Cov(x) e for each row's rounding error e; a weight's own error says little about it where
    channels differ in size.
    """
    rows = weight.detach().reshape(len(quantizer.scale), -1)
    largest = rows.abs().amax(dim=1).clamp(min=EMPTY)
    full = largest / quantizer.quant_max
    if quantizer.spec.range != "mse":
        return full
    best, least = full, torch.full_like(full, math.inf)
    for share in torch.linspace(1.0, 0.3, SHRINKS).tolist():
        scale = (full * share)[:, None]
        steps = (rows / scale).round().clamp(quantizer.quant_min, quantizer.quant_max)
        rest = rows - steps * scale
        metric = rest if covariance is None else rest @ covariance
        error = (rest * metric).sum(dim=1)
        better = error < least
        best = torch.where(better, scale[:, 0], best)
        least = torch.where(better, error, least)
    return best
