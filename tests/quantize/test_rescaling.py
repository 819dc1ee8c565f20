"""Rescalings, statistics and rounding of single layers, by hand."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from care_compress.model.care import build_model
from care_compress.model.compact import ChannelAffine, Rotation
from care_compress.model.rewrite import rewrite
from care_compress.quantize.equalize import (
    LARGEST_SCALING,
    Rescaling,
    apply,
    norms_to_affine,
    product_error,
    rescale,
)
from care_compress.quantize.fakequant import HalfRounding, IntQuantizer, make_quantizer
from care_compress.quantize.plan import make_plan
from care_compress.quantize.spec import TensorSpec
from care_compress.quantize.statistics import ROWS, InputStatistics
from care_compress.recipe.sections import RewriteSection


def producers() -> list[nn.Module]:
    torch.manual_seed(0)
    depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    bare = nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False)
    return [ChannelAffine(torch.rand(4) + 0.5, torch.randn(4)), depthwise, bare, Rotation(4, 4)]


@pytest.mark.parametrize("kind", range(4))
def test_what_is_divided_where_channels_are_made_is_multiplied_where_they_are_read(
    kind: int,
) -> None:
    producer, layer, x = producers()[kind], nn.Conv2d(4, 6, 1), torch.randn(2, 4, 5, 5)
    scale, shift = torch.tensor([0.1, 2.0, 30.0, 1.0]), torch.tensor([1.0, -2.0, 0.5, 3.0])
    with torch.no_grad():
        made = producer(x)
        before = layer(made)
        apply(producer, layer, Rescaling(scale, shift, 1.0))
        expected = (made - shift.view(-1, 1, 1)) / scale.view(-1, 1, 1)
        torch.testing.assert_close(producer(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer(producer(x)), before, rtol=1e-4, atol=1e-5)


def test_a_channel_that_is_nearly_dead_is_not_blown_up() -> None:
    model = rewrite(build_model("care_nano", 4), RewriteSection(fold_norms=False))
    norms_to_affine(model)
    name = "stages.1.blocks.0.inter_layer.inter1_fc1"
    reach = torch.ones(model.get_submodule(name).in_channels)
    reach[0], reach[1] = 1e-7, 1e7
    found = rescale(
        model, make_plan(model, (), None, 32), name, 1.0, InputStatistics(-reach, reach)
    )
    assert found is not None
    assert float(found.scale[0]) == pytest.approx(1 / LARGEST_SCALING)
    assert float(found.scale[1]) == LARGEST_SCALING


def error(rows: torch.Tensor, spec: TensorSpec, weight: TensorSpec | None = None) -> float:
    return product_error(rows, torch.eye(rows.shape[1]), spec, weight or TensorSpec("float"))


@pytest.mark.parametrize("ends", [(-3.0, 1.0), (-1.0, 3.0), (0.0, 4.0), (-4.0, 0.0)])
def test_the_error_of_rounded_rows_is_that_of_their_range(ends: tuple[float, float]) -> None:
    """A uniform value is off by step^2 / 12 on average; a symmetric range wastes levels."""
    rows = torch.rand(4000, 1) * 4 + ends[0]
    rows[:2, 0] = torch.tensor(ends)
    step = 4 / 255
    assert error(rows, TensorSpec(8, symmetric=False)) == pytest.approx(
        4000 * step**2 / 12, rel=0.06
    )
    step = max(abs(end) for end in ends) / 127.5
    assert error(rows, TensorSpec(8)) == pytest.approx(4000 * step**2 / 12, rel=0.06)


def test_a_shift_of_all_products_is_no_error_and_clipping_is_tried_where_asked() -> None:
    rows = torch.full((100, 2), 0.3)
    rows[0] = 1.0
    coarse = error(rows, TensorSpec(4, symmetric=False))
    off = 0.3 - round(0.3 * 15) / 15
    assert coarse < 100 * off**2, "bias correction takes the mean away"
    torch.manual_seed(0)
    heavy = torch.randn(2000, 4)
    heavy[0] = 7.0
    spec = TensorSpec(4, symmetric=False)
    clipped = error(heavy, TensorSpec(4, symmetric=False, range="mse"))
    assert clipped < 0.9 * error(heavy, spec)


def test_a_rounded_weight_errs_by_the_step_of_its_row() -> None:
    torch.manual_seed(0)
    rows, matrix = torch.randn(500, 64), torch.randn(8, 64)
    matrix[:, 0] = 7.0
    found = product_error(rows, matrix, TensorSpec(8), TensorSpec(4, "channel"))
    off = rows @ (matrix - matrix.round().clamp(-8, 7)).T
    assert found == pytest.approx(float((off - off.mean(dim=0)).square().sum()), rel=0.02)


def test_statistics_follow_the_rescaling_that_they_led_to() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 2, 1), torch.randn(4, 3, 6, 6)
    scale, shift = torch.tensor([0.5, 2.0, 4.0]), torch.tensor([1.0, -1.0, 0.0])
    plain, moved = InputStatistics(), InputStatistics()
    plain.add(layer, x)
    moved.add(layer, (x - shift.view(-1, 1, 1)) / scale.view(-1, 1, 1))
    found = plain.rescaled(scale, shift)
    assert found.low is not None and found.high is not None
    torch.testing.assert_close(found.low, moved.low)
    torch.testing.assert_close(found.high, moved.high)
    torch.testing.assert_close(found.sample(), moved.sample())
    wanted = torch.cov(moved.sample().T, correction=0)
    torch.testing.assert_close(found.covariance(), wanted, rtol=1e-4, atol=1e-5)
    assert plain.low is not None and plain.high is not None
    assert torch.equal(plain.low, x.amin(dim=(0, 2, 3)))
    assert torch.equal(plain.high, x.amax(dim=(0, 2, 3)))


def test_sampled_rows_are_what_the_layer_multiplies_and_stay_few() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 5, 2, stride=2), torch.randn(3, 3, 8, 8)
    seen = InputStatistics()
    seen.add(layer, x)
    products = F.linear(seen.sample(), layer.weight.flatten(1), layer.bias)
    outputs = layer(x).permute(0, 2, 3, 1).reshape(-1, 5)
    apart = (products[:, None] - outputs).abs().amax(dim=2).min(dim=1).values
    assert len(products) == 12 and float(apart.detach().max()) < 1e-5
    one = nn.Conv2d(2, 2, 1)
    many = InputStatistics()
    for batch in range(60):
        many.add(one, torch.full((40, 2, 4, 4), float(batch)))
    kept = many.sample()[:, 0]
    assert ROWS / 2 <= len(kept) < 2 * ROWS and many.images == 2400
    shares = torch.bincount(kept.long(), minlength=60)
    assert float(shares.max()) <= 1.5 * float(shares.min()), "early and late images count alike"


def test_a_value_is_cut_off_where_it_is_more_than_half_a_step_outside() -> None:
    symmetric = IntQuantizer(TensorSpec(8), "s", "input", 1)
    symmetric.set_qparams(torch.tensor([2.0]), torch.tensor([0]))
    x = torch.tensor([-257.2, -256.8, -254.0, 0.0, 254.8, 255.2])
    assert symmetric.cut(x) == 2
    spec = TensorSpec(8, granularity="channel", axis=1, symmetric=False)
    channels = IntQuantizer(spec, "s", "input", 2)
    channels.set_qparams(torch.tensor([1.0, 0.1]), torch.tensor([0, 100]))
    values = torch.tensor([[0.0, -11.0], [254.0, 15.0], [-1.0, 16.0]])
    assert channels.cut(values) == 3, "each channel by its own range"


@pytest.mark.parametrize("bits", [8, 4])
def test_a_learned_scale_moves_alike_whatever_the_size_of_the_tensor(bits: int) -> None:
    """LSQ: gradients over sqrt(elements * largest integer)."""

    def slope(copies: int) -> float:
        quantizer = IntQuantizer(TensorSpec(bits), "s", "weight", 1)
        quantizer.set_qparams(torch.tensor([0.5]), torch.tensor([0]))
        quantizer.learn(True)
        x = torch.tensor([0.6, 1.3, -0.9, 100.0]).repeat(copies)
        quantizer(x).sum().backward()
        assert quantizer.gain.grad is not None
        return float(quantizer.gain.grad)

    # Of one value: its rounding error in steps, and the end of the range where it is cut off.
    ends = 2 ** (bits - 1) - 1
    whole = 0.5 * sum((1 - 1.2, 3 - 2.6, -2 + 1.8, ends))
    assert slope(1) == pytest.approx(whole / (4 * 2 ** (bits - 1)) ** 0.5, rel=1e-4)
    assert slope(4) == pytest.approx(2 * slope(1), rel=1e-4)


def test_half_types_round_as_they_do() -> None:
    x = torch.tensor([1 + 2**-9, 70000.0])
    found = {kind: HalfRounding(TensorSpec(kind), "s", "input")(x) for kind in ("fp16", "bf16")}
    assert found["fp16"].tolist() == [1 + 2**-9, float("inf")]
    assert found["bf16"][0] == 1 and abs(found["bf16"][1] - 70000) < 300


def test_a_quantizer_has_a_scale_for_each_channel_head_or_group() -> None:
    for spec, shape, scales in (
        (TensorSpec(8, "channel", axis=1), (2, 12, 7, 7), 12),
        (TensorSpec(8, "channel"), (5, 12, 1, 1), 5),
        (TensorSpec(4, "group", group=4), (5, 12, 1, 1), 15),
        (TensorSpec(8), (2, 12, 7, 7), 1),
    ):
        made = make_quantizer(spec, "s", "input", torch.Size(shape))()
        assert len(made.scale) == scales
