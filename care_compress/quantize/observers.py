"""From a stream of values to a range: how each ``range:`` of a recipe is found.

Min-max and moving average are torchao's. Its histogram observer looks for the least squared error
of 256 levels, whatever the bits, so percentile, MSE and entropy share one histogram of our own.
All of them keep a fixed number of bins, whatever the number of images.

A new range is a class here, its name in `RangeMethod` (recipe/quantize.py), and in
`RANGES_OF_WEIGHTS` (quantize/plan.py) if weights, which are no stream of values, may use it.
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
VALUES = 1 << 16  # of one tensor that are counted; its extremes always are
SHARES = torch.linspace(1.0, 0.25, SHRINKS)  # of the full range
EMPTY = 1e-12


def in_memory_order(x: Tensor) -> tuple[Tensor, list[int]]:
    """`x` with its dimensions as they lie in memory, and the order that undoes it.

    Reducing or flattening anything else walks memory in jumps, ten times slower.
    """
    strides: tuple[int, ...] = x.stride()
    order = sorted(range(x.dim()), key=lambda dim: -strides[dim])
    return x.permute(order), [order.index(dim) for dim in range(x.dim())]


def extremes(x: Tensor) -> Tensor:
    """Least and largest of every position over the batch: the same range, in far fewer values."""
    ordered, back = in_memory_order(x)
    if back[0] != 0:  # the batch is not outermost; reducing another dimension could mix channels
        return x
    return torch.stack((ordered.amin(dim=0), ordered.amax(dim=0))).permute(back)


class _OverBatch(ObserverBase):
    """Gives torchao's observers the extremes of a batch, which cost them most of their time."""

    def forward(self, x_orig: Tensor) -> Tensor:
        """Observe one batch."""
        super().forward(extremes(x_orig.detach()))
        return x_orig


class _MinMax(_OverBatch, MinMaxObserver):
    """Extremes of everything."""


class _MovingAverage(_OverBatch, MovingAverageMinMaxObserver):
    """Extremes averaged over batches."""


class _ChannelMinMax(_OverBatch, PerChannelMinMaxObserver):
    """Extremes of every channel."""


class _ChannelMovingAverage(_OverBatch, MovingAveragePerChannelMinMaxObserver):
    """Extremes of every channel, averaged over batches."""


class HistogramObserver(_MinMax):
    """Counts values in `BINS` equal bins of [-2^k, 2^k); subclasses choose a range from them.

    When a value falls outside, k grows and neighbouring bins merge in pairs, which is exact.
    """

    def __init__(self, **qparams: object) -> None:
        super().__init__(**qparams)
        self.exponent: int | None = None
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def forward(self, x_orig: Tensor) -> Tensor:
        """Count one tensor."""
        super().forward(x_orig)
        magnitude = max(abs(float(self.min_val)), abs(float(self.max_val)))
        # The smallest k with magnitude < 2^k.
        needed = math.frexp(magnitude)[1] if magnitude > 0 else -20
        if self.exponent is None:
            self.exponent = needed
        while self.exponent < needed:
            merged = self.counts.view(-1, 2).sum(dim=1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : 3 * BINS // 4] = merged
            self.exponent += 1
        half = 2.0**self.exponent
        values = in_memory_order(x_orig.detach())[0].reshape(-1)
        stride = max(1, len(values) // VALUES)
        while math.gcd(stride, len(values)) > 1 and stride > 1:  # else it leaves channels out
            stride += 1
        self.counts += torch.histc(values[::stride].float(), BINS, -half, half).double().cpu()
        return x_orig

    def filled(self) -> tuple[Tensor, Tensor]:
        """Centres and counts of the bins that hold anything, in rising order."""
        assert self.exponent is not None
        half = 2.0**self.exponent
        width = 2 * half / BINS
        held = self.counts.nonzero().flatten()
        return held * width - half + width / 2, self.counts[held]

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
        """Lows and highs of ranges from the full one to a quarter of it.

        What is cut is the larger end, until both are alike: after a GELU there is nothing to gain
        at the small one.
        """
        low, high = self.min_val.cpu(), self.max_val.cpu()
        limits = SHARES * torch.maximum(-low, high)
        return torch.maximum(low, -limits), torch.minimum(high, limits)

    def levels(self, centres: Tensor, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        """The integer and the value that each range has for each centre (ranges, centres)."""
        scale, zero_point = self._calculate_qparams(lows, highs)
        scale, zero_point = scale.double()[:, None], zero_point.double()[:, None]
        steps = (centres / scale).round_().add_(zero_point).clamp_(self.quant_min, self.quant_max)
        return steps, (steps - zero_point) * scale


class PercentileObserver(HistogramObserver):
    """Keeps the middle `percentile` percent of the values."""

    def __init__(self, percentile: float = 99.99, **qparams: object) -> None:
        super().__init__(**qparams)
        self.percentile = percentile

    def choose(self) -> tuple[float, float]:
        """The two quantiles, never outside what was seen."""
        centres, counts = self.filled()
        shares = counts.cumsum(dim=0) / counts.sum()
        tail = (1 - self.percentile / 100) / 2
        last = len(centres) - 1
        low = centres[int((shares < tail).sum().clamp(max=last))]
        high = centres[int((shares < 1 - tail).sum().clamp(max=last))]
        return max(float(low), float(self.min_val)), min(float(high), float(self.max_val))


class SquaredErrorObserver(HistogramObserver):
    """Least mean squared error: argmin over ranges of sum_b n_b (x_b - Q(x_b))^2."""

    def choose(self) -> tuple[float, float]:
        """The best of the candidate ranges, then of either end moved alone."""
        _, high = self._best(*self.candidates())
        low, _ = self._best(self.min_val.cpu() * SHARES, high.expand(len(SHARES)))
        low, high = self._best(low.expand(len(SHARES)), self.max_val.cpu() * SHARES)
        return float(low), float(high)

    def _best(self, lows: Tensor, highs: Tensor) -> tuple[Tensor, Tensor]:
        centres, counts = self.filled()
        _, values = self.levels(centres, lows, highs)
        errors = values.sub_(centres).square_() @ counts
        best = int(errors.argmin())
        return lows[best], highs[best]


class EntropyObserver(HistogramObserver):
    """Least KL(P || Q) between the values and what quantization leaves of them.

    Each level spreads its count evenly over the non-empty bins it represents; what lies outside
    the range is counted in the outermost bins (the calibration TensorRT made known).
    """

    def choose(self) -> tuple[float, float]:
        """The best of the candidate ranges."""
        centres, counts = self.filled()
        lows, highs = self.candidates()
        inside = (centres >= lows[:, None]) & (centres <= highs[:, None])
        kept = counts * inside
        rank = inside.cumsum(dim=1)
        first = inside & (rank == 1)
        last = inside & (rank == inside.sum(dim=1, keepdim=True)) & ~first
        # What is outside below goes to the first bin inside, what is above to the last.
        below = (counts * (centres < lows[:, None])).sum(dim=1, keepdim=True)
        above = (counts * (centres > highs[:, None])).sum(dim=1, keepdim=True)
        clipped = kept + below * first + above * last
        steps, _ = self.levels(centres, lows, highs)
        level = (steps - self.quant_min).long()
        share = _per_level(kept, level) / _per_level(inside.double(), level).clamp(min=1)
        spread = share.gather(1, level) * inside
        divergences = _divergence(clipped, spread)
        best = int(divergences.argmin())
        return float(lows[best]), float(highs[best])


def _per_level(values: Tensor, level: Tensor) -> Tensor:
    """Sums of `values` (ranges, bins) over the bins of each level."""
    sums = torch.zeros(len(values), int(level.max()) + 1, dtype=torch.float64)
    return sums.scatter_add_(1, level, values)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(P || Q) of each row of counts; infinite where nothing is left."""
    p = p / p.sum(dim=1, keepdim=True)
    q = (q + EMPTY) / (q + EMPTY).sum(dim=1, keepdim=True)
    found: Tensor = torch.xlogy(p, p).sum(dim=1) - (p * q.log()).sum(dim=1)
    return found.nan_to_num(nan=math.inf)


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
        kind = _ChannelMovingAverage if spec.range == "moving_average" else _ChannelMinMax
        return kind(ch_axis=spec.axis, **qparams)
    if spec.range == "percentile":
        return PercentileObserver(percentile=percentile, **qparams)
    kinds: dict[str, type[ObserverBase]] = {
        "min_max": _MinMax,
        "moving_average": _MovingAverage,
        "mse": SquaredErrorObserver,
        "entropy": EntropyObserver,
    }
    return kinds[spec.range](**qparams)


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
