from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from care_compress.quantize.fakequant import IntQuantizer
from care_compress.quantize.observers import (
    BINS,
    EntropyObserver,
    HistogramObserver,
    PercentileObserver,
    SquaredErrorObserver,
    make_observer,
    weight_scale,
)
from care_compress.quantize.spec import TensorSpec
from care_compress.recipe.quantize import RangeMethod


def observer(kind: type[HistogramObserver], bits: int = 8, **more: float) -> HistogramObserver:
    spec = TensorSpec(bits, symmetric=False)
    return kind(
        dtype=spec.dtype,
        qscheme=torch.per_tensor_affine,
        quant_min=spec.quant_min,
        quant_max=spec.quant_max,
        **more,
    )


def quantized(x: torch.Tensor, watcher: HistogramObserver) -> torch.Tensor:
    scale, zero_point = watcher.calculate_qparams()
    return torch.fake_quantize_per_tensor_affine(
        x, float(scale), int(zero_point), watcher.quant_min, watcher.quant_max
    )


def heavy_tailed(count: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(3, count).astype(np.float32))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 12), st.floats(1e-3, 1e3))
def test_a_stream_counts_what_one_look_would(seed: int, parts: int, size: float) -> None:
    values = heavy_tailed(6000, seed) * size
    whole, streamed = observer(SquaredErrorObserver), observer(SquaredErrorObserver)
    whole(values)
    for part in values.chunk(parts):
        streamed(part)
    assert streamed.exponent == whole.exponent
    assert float((streamed.counts - whole.counts).abs().sum()) <= 4, "rounding at bin edges"
    assert len(streamed.counts) == BINS, "memory does not grow with what is seen"


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "batch not outermost": lambda x: x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
    "a slice": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_extremes_are_those_of_every_value_in_any_layout(layout: str, granularity: str) -> None:
    spec = TensorSpec(8, granularity=granularity, axis=1, symmetric=False)
    quantizer = IntQuantizer(spec, "s", "input", 1 if granularity == "tensor" else 6)
    watcher = make_observer(quantizer, 99.99)
    seen = [heavy_tailed(8 * 6 * 5 * 7, seed).reshape(8, 6, 5, 7) for seed in range(3)]
    for x in seen:
        watcher(LAYOUTS[layout](x))
    together = torch.cat(seen)
    dims = (0, 1, 2, 3) if granularity == "tensor" else (0, 2, 3)
    assert torch.equal(watcher.min_val, together.amin(dims))
    assert torch.equal(watcher.max_val, together.amax(dims))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_no_channel_is_left_out_where_only_some_values_are_counted(layout: str) -> None:
    channels = 12
    x = torch.arange(channels).float()[:, None, None].expand(16, channels, 48, 48)
    watcher = observer(SquaredErrorObserver)
    watcher(LAYOUTS[layout](x.contiguous()))
    counts = watcher.filled()[1]
    assert len(counts) == channels and float(counts.max() / counts.min()) < 1.05


@pytest.mark.parametrize("bits", [8, 4])
def test_the_squared_error_range_beats_the_extremes_where_there_are_outliers(bits: int) -> None:
    x = heavy_tailed(50_000)
    best = observer(SquaredErrorObserver, bits)
    extremes = observer(PercentileObserver, bits, percentile=100.0)
    best(x), extremes(x)
    errors = [float((quantized(x, one) - x).square().mean()) for one in (best, extremes)]
    assert errors[0] < errors[1] * (0.5 if bits == 4 else 0.98)


def test_on_uniform_values_nothing_is_clipped() -> None:
    x = torch.rand(50_000)
    watcher = observer(SquaredErrorObserver)
    watcher(x)
    assert watcher.choose()[1] == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_the_percentile_keeps_that_share(percentile: float) -> None:
    x = heavy_tailed(100_000)
    watcher = observer(PercentileObserver, percentile=percentile)
    watcher(x)
    low, high = watcher.choose()
    inside = float(((x >= low) & (x <= high)).float().mean()) * 100
    assert inside == pytest.approx(percentile, abs=0.15)


@pytest.mark.parametrize("kind", [SquaredErrorObserver, EntropyObserver])
def test_a_far_outlier_is_clipped_and_the_bulk_kept(kind: type[HistogramObserver]) -> None:
    x = torch.cat([torch.randn(50_000), torch.tensor([40.0])])
    watcher = observer(kind, bits=8 if kind is EntropyObserver else 4)
    watcher(x)
    low, high = watcher.choose()
    assert 2 < high < 15 and -6 < low < -2, "one end does not pull in the other"


def test_every_range_of_a_recipe_has_an_observer_that_gives_usable_numbers() -> None:
    for method in get_args(RangeMethod):
        for granularity in ("tensor", "channel"):
            if granularity == "channel" and method not in ("min_max", "moving_average"):
                continue
            spec = TensorSpec(8, granularity=granularity, axis=1, symmetric=False, range=method)
            quantizer = IntQuantizer(spec, "s", "input", 1 if granularity == "tensor" else 3)
            watcher = make_observer(quantizer, 99.99)
            watcher(torch.randn(8, 3, 4, 4)), watcher(torch.zeros(8, 3, 4, 4))
            scale, zero_point = watcher.calculate_qparams()
            assert bool((scale > 0).all()) and bool(((zero_point >= 0) & (zero_point <= 255)).all())


def test_dead_input_gives_a_scale_that_divides_by_no_zero() -> None:
    for kind in (SquaredErrorObserver, EntropyObserver, PercentileObserver):
        watcher = observer(kind)
        watcher(torch.zeros(100))
        assert float(watcher.calculate_qparams()[0]) > 0


def test_a_weight_scale_of_least_error_is_no_worse_than_the_largest_weight() -> None:
    weight = heavy_tailed(4096).reshape(16, 256)
    errors = []
    for method in ("min_max", "mse"):
        spec = TensorSpec(4, granularity="channel", range=method)
        quantizer = IntQuantizer(spec, "s", "weight", 16)
        quantizer.set_qparams(weight_scale(quantizer, weight), torch.zeros(16))
        errors.append((quantizer(weight) - weight).square().sum(dim=1))
    assert bool((errors[1] <= errors[0]).all()) and float(errors[1].sum()) < float(errors[0].sum())


def test_either_end_is_cut_alone_where_only_that_helps() -> None:
    """A far value below and many just under the top: cutting both ends alike would lose the top."""
    x = torch.cat([torch.rand(50_000) * 4, torch.tensor([-4.0])])
    watcher = observer(SquaredErrorObserver, 4)
    watcher(x)
    low, high = watcher.choose()
    assert high > 3.5 and -2.0 < low <= 0.0

    def error(low: float, high: float) -> float:
        centres, counts = watcher.filled()
        ends = torch.tensor([low]), torch.tensor([high])
        return float(((watcher.levels(centres, *ends)[1] - centres) ** 2 * counts).sum())

    for share in (1.0, 0.75, 0.5, 0.3):
        assert error(low, high) <= error(-4.0 * share, high) + 1e-9
        assert error(low, high) <= error(low, 4.0 * share) + 1e-9


def test_entropy_is_the_published_search_step_by_step() -> None:
    """Bins outside go to the outermost inside; each level spreads evenly over what it holds."""
    # A long tail on one side: where what is cut goes to, and that it counts, decides the range.
    rng = np.random.default_rng(2)
    x = np.concatenate([rng.normal(size=4000), rng.exponential(3, size=400)])
    x = torch.from_numpy(x).float()
    watcher = observer(EntropyObserver, 4)
    watcher(x)
    centres, counts = (values.tolist() for values in watcher.filled())
    lows, highs = watcher.candidates()
    divergences = []
    for low, high in zip(lows.tolist(), highs.tolist(), strict=True):
        inside = [i for i, centre in enumerate(centres) if low <= centre <= high]
        p = {i: counts[i] for i in inside}
        p[inside[0]] += sum(n for c, n in zip(centres, counts, strict=True) if c < low)
        p[inside[-1]] += sum(n for c, n in zip(centres, counts, strict=True) if c > high)
        ends = torch.tensor([low]), torch.tensor([high])
        steps = watcher.levels(torch.tensor(centres), *ends)[0][0].tolist()
        held: dict[float, list[int]] = {}
        for i in inside:
            held.setdefault(steps[i], []).append(i)
        q = {
            i: sum(counts[j] for j in members) / len(members)
            for members in held.values()
            for i in members
        }
        everything, left = sum(p.values()), sum(q.values())
        divergences.append(
            sum(
                share / everything * np.log((share / everything) / (q[i] / left))
                for i, share in p.items()
                if share
            )
        )
    best = int(np.argmin(divergences))
    assert watcher.choose() == pytest.approx((float(lows[best]), float(highs[best])))
    assert 0 < best < len(divergences) - 1, "the case decides something"


def test_a_weight_scale_weighs_errors_by_what_flows_in() -> None:
    """One large weight sees nothing; the others are worth every step."""
    torch.manual_seed(0)
    weight = torch.rand(4, 16) * 0.1
    weight[:, 0] = 0.35
    covariance = torch.eye(16)
    covariance[0, 0] = 1e-6
    spec = TensorSpec(4, granularity="channel", range="mse")
    quantizer = IntQuantizer(spec, "s", "weight", 4)
    scale = weight_scale(quantizer, weight, covariance)

    def error(scale: torch.Tensor) -> torch.Tensor:
        steps = (weight / scale[:, None]).round().clamp(quantizer.quant_min, quantizer.quant_max)
        rest = weight - steps * scale[:, None]
        return torch.einsum("ri,ij,rj->r", rest, covariance, rest)

    full = weight.amax(dim=1) / quantizer.quant_max
    for share in torch.linspace(1.0, 0.3, 64):
        assert bool((error(scale) <= error(full * share) * (1 + 1e-5)).all())
    assert bool((error(scale) < 0.5 * error(weight_scale(quantizer, weight))).all())


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_weight_is_kept_where_no_error_is_asked_for(bits: int) -> None:
    """It is the top of its row, or the bottom, and no rounding cuts it off."""
    weight = heavy_tailed(512).reshape(4, 128)
    quantizer = IntQuantizer(TensorSpec(bits, granularity="channel"), "s", "weight", 4)
    quantizer.set_qparams(weight_scale(quantizer, weight), torch.zeros(4))
    most = weight.abs().amax(dim=1)
    torch.testing.assert_close(quantizer(weight).abs().amax(dim=1), most)
    assert torch.allclose(quantizer.scale * (2 ** (bits - 1) - 1), most)


def test_a_value_stands_in_the_middle_of_its_bin_on_average() -> None:
    x = torch.rand(60_000) * 2 - 1
    watcher = observer(SquaredErrorObserver)
    watcher(x)
    centres, counts = watcher.filled()
    half_a_bin = 1 / BINS
    mean = float((centres * counts).sum() / counts.sum())
    assert mean == pytest.approx(float(x.double().mean()), abs=half_a_bin / 10)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_moving_average_forgets_what_came_once(granularity: str) -> None:
    spec = TensorSpec(8, granularity, axis=1, symmetric=False, range="moving_average")
    quantizer = IntQuantizer(spec, "s", "input", 1 if granularity == "tensor" else 2)
    watcher = make_observer(quantizer, 99.99)
    usual = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 2, 4, 4).contiguous()
    for x in (usual, usual * 101, *[usual] * 20):
        watcher(x)
    assert bool((watcher.max_val > 1.0).all() and (watcher.max_val < 2.0).all())
    assert bool((watcher.min_val < -1.0).all() and (watcher.min_val > -2.0).all())
