import pytest
import torch
from quantized import W4, W4A4, images, network, quantized, section, sqnr

from care_compress.quantize.fakequant import GroupQuantizer, IntQuantizer
from care_compress.quantize.placement import lower
from care_compress.quantize.spec import TensorSpec


@pytest.mark.parametrize(
    "chosen",
    [
        section(),
        section({"input": {"bits": 8, "symmetric": True, "granularity": "tensor"}}),
        section(W4A4),
        section({"role": "pointwise", "weight": {"bits": 4, "group": 4}}),
        section({"role": "attention.*", "weight": 8, "input": 8}),
        section(
            {"role": "attention.kv", "input": {"bits": 8, "granularity": "channel"}},
            {"role": "attention.out", "input": {"bits": 8, "granularity": "channel"}},
        ),
        section(
            {"role": "pointwise", "site": "*fc1", "input": {"bits": 8, "granularity": "channel"}}
        ),
        section({"weight": "bf16", "input": "bf16"}),
        section({"role": "residual_add", "input": 8}),
    ],
    ids=["int8", "symmetric", "w4a4", "groups", "attention", "heads", "prenorm", "bf16", "adds"],
)
def test_lowered_integers_compute_what_was_simulated(chosen: object) -> None:
    model = quantized(chosen).model
    x = images(4, seed=9)
    with torch.no_grad():
        simulated, lowered = model(x), lower(model)(x)
    assert torch.allclose(lowered, simulated, atol=1e-5 * float(simulated.abs().max()))
    assert sqnr(simulated, network()(x)) > 3, "and that is still the network"


def test_lowering_stores_int8_weights_and_a_pair_for_every_planned_tensor() -> None:
    model = quantized(section()).model
    graph = lower(model)
    ops = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    planned = len(list(model.quantizers()))
    assert sum("dequantize" in op for op in ops) == planned
    weights = sum(quantizer.operand == "weight" for quantizer in model.quantizers())
    stored = [b for b in graph.buffers() if b.dtype == torch.int8] + [
        p for p in graph.parameters() if p.dtype == torch.int8
    ]
    assert len(stored) == weights
    assert sum(".quantize" in op for op in ops) == planned - weights, "weights are folded"


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
