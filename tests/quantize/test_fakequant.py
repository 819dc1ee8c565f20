import pytest
import torch
from quantized import W4, images, network, quantized, section, sqnr

from care_compress.quantize.fakequant import GroupQuantizer, IntQuantizer, round_to_integers
from care_compress.quantize.spec import TensorSpec


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_learning_starts_where_the_simulation_stands(symmetric: bool, granularity: str) -> None:
    spec = TensorSpec(8, granularity=granularity, axis=1, symmetric=symmetric)
    scales = 1 if granularity == "tensor" else 6
    quantizer = IntQuantizer(spec, "site", "input", scales)
    x = torch.randn(4, 6, 5, 5)
    quantizer.set_qparams(
        torch.full((scales,), 0.02), torch.full((scales,), 0 if symmetric else 90)
    )
    with torch.no_grad():
        before = quantizer(x)
    quantizer.learn(True)
    during = quantizer(x)
    during.square().sum().backward()
    assert torch.equal(before, during.detach())
    assert quantizer.gain.grad is not None and bool(quantizer.gain.grad.abs().sum() > 0)
    with torch.no_grad():
        quantizer.gain.mul_(1.1)
        learned = quantizer(x)
        quantizer.settle()
        assert torch.allclose(quantizer(x), learned, atol=1e-6), "settling changes nothing"


@pytest.mark.parametrize("axis", [None, 0, 1, 2])
@pytest.mark.parametrize("limits", [(0, 255), (-128, 127), (-127, 127), (0, 15), (-8, 7)])
def test_fast_rounding_is_torchs_own_to_the_last_bit(
    axis: int | None, limits: tuple[int, int]
) -> None:
    generator = torch.Generator().manual_seed(0)
    # Halves of steps too, where rounding has to choose.
    x = torch.randn(7, 12, 33, generator=generator) * 3
    x[::2] = (x[::2] * 64).round() / 64
    scales = 1 if axis is None else x.shape[axis]
    scale = torch.rand(scales, generator=generator) * 0.1 + 1e-3
    scale[0] = 1 / 32
    zero_point = torch.randint(*limits, (scales,), generator=generator, dtype=torch.int32)
    found = round_to_integers(x, scale, zero_point, limits, axis)
    differentiated = round_to_integers(x.clone().requires_grad_(), scale, zero_point, limits, axis)
    assert differentiated.requires_grad
    assert torch.equal(found, differentiated.detach())
    assert not torch.equal(found, x)


def test_what_is_out_of_range_goes_to_the_nearest_end() -> None:
    x = torch.tensor([-torch.inf, -1e30, 1e30, torch.inf])
    found = round_to_integers(x, torch.tensor([0.5]), torch.tensor([100]), (0, 255))
    assert found.tolist() == [-50.0, -50.0, 77.5, 77.5]
    lost = round_to_integers(
        torch.tensor([torch.nan]), torch.tensor([0.5]), torch.tensor([100]), (0, 255)
    )
    assert lost.isnan().all(), "a network that is broken must show it"


@pytest.mark.parametrize("bits", [8, 4])
def test_an_offset_in_the_wrong_place_learns_its_way(bits: int) -> None:
    """At the rates of the shipped recipes: a few hundredths of the range in a training."""
    torch.manual_seed(0)
    spec = TensorSpec(bits, symmetric=False)
    quantizer = IntQuantizer(spec, "site", "input", 1)
    x = torch.rand(4, 6, 9, 9)
    steps = 2**bits - 1
    quantizer.set_qparams(torch.tensor([1.0 / steps]), torch.tensor([steps // 5]))
    quantizer.learn(True)
    optimizer = torch.optim.AdamW([quantizer.shift], lr=2e-3)

    def error() -> torch.Tensor:
        return (quantizer(x) - x).square().mean()

    before = float(error().detach())
    for _ in range(60):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    with torch.no_grad():
        quantizer.settle()
    assert int(quantizer.zero_point) < steps // 5 and float(error().detach()) < 0.6 * before


def test_groups_of_a_weight_have_their_own_scale() -> None:
    spec = TensorSpec(4, granularity="group", group=2)
    quantizer = GroupQuantizer(spec, "site", "weight", scales=4)
    weight = torch.tensor([[1.0, 0.5, 100.0, 50.0], [7.0, 3.0, 0.07, 0.03]])
    scale = weight.reshape(4, 2).abs().amax(dim=1) / 7
    quantizer.set_qparams(scale, torch.zeros(4))
    assert (quantizer(weight) - weight).abs().div(weight).max() < 0.15


def test_switched_off_it_is_the_float_network() -> None:
    model = quantized(section(W4, bias_correction=False)).model
    model.enable(False)
    x = images(3)
    assert sqnr(model(x), network()(x)) > 90, "only the rescalings' rounding is left"
