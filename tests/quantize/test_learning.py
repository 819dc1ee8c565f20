"""Learned rounding, the way to another target's ranges, and NNCF's judge, by hand."""

import copy
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from care_compress.data.loader import Batch
from care_compress.quantize import reconstruct as learned
from care_compress.quantize.fakequant import IntQuantizer
from care_compress.quantize.nncf_ptq import AccuracyControl
from care_compress.quantize.nncf_qat import _FakeQuantize
from care_compress.quantize.reconstruct import _divided, _Dropped, _SoftRounding, reconstruct
from care_compress.quantize.retarget import (
    SMALLEST_SCALE,
    _range_in,
    _round_biases,
    _round_up_to_half,
)
from care_compress.quantize.spec import TensorSpec
from care_compress.recipe.quantize import ReconstructSection
from care_compress.recipe.sections import DataSection
from care_compress.tasks.known import task_called

CONV = torch.ops.aten.conv2d.default


class OneLayer:
    """What learning needs of a quantized model: one 1x1 convolution with a 4-bit weight."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        root = nn.Module()
        root.weight = nn.Parameter(torch.randn(6, 4, 1, 1))
        root.rounding = IntQuantizer(TensorSpec(4, "channel"), "site", "weight", 6)
        root.rounding.set_qparams(
            root.weight.detach().abs().amax(dim=(1, 2, 3)) / 7, torch.zeros(6)
        )
        graph = Graph()
        x = graph.placeholder("x")
        rounded = graph.call_module("rounding", (graph.get_attr("weight"),))
        graph.output(graph.call_function(CONV, (x, rounded)))
        self.graph = GraphModule(root, graph)
        self.start, *self.nodes, _ = self.graph.graph.nodes
        self.end = self.nodes[-1]
        self.quantizers = {"rounding": root.rounding}
        self.quantized = self

    def weight(self, site: str) -> nn.Parameter:
        return cast(nn.Parameter, self.graph.weight)

    def tensors(self) -> list[Tensor]:
        return [self.weight("site")]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The sharpness asked for in every step, and how far up each weight rounds at the end."""
    seen: dict[str, list[Any]] = {"beta": [], "up": []}
    undecided, decided = _SoftRounding.undecided, _SoftRounding.decided

    def asked(self: _SoftRounding, beta: float) -> Tensor:
        seen["beta"].append(beta)
        return undecided(self, beta)

    def ended(self: _SoftRounding) -> Tensor:
        seen["up"].append(self.up().detach())
        return decided(self)

    monkeypatch.setattr(_SoftRounding, "undecided", asked)
    monkeypatch.setattr(_SoftRounding, "decided", ended)
    return seen


def learn(layer: OneLayer, steps: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(32, 4, 3, 3)
    wanted = nn.functional.conv2d(inputs, layer.weight("site").detach())
    section = ReconstructSection(steps=steps, batch_size=8)
    generator = torch.Generator().manual_seed(0)
    learned._learn(cast(Any, layer), inputs, wanted, section, generator)


def test_rounding_is_free_at_first_and_decided_in_the_end(watched: dict[str, list[Any]]) -> None:
    layer = OneLayer()
    before = layer.weight("site").detach().clone()
    learn(layer, 300)
    beta = watched["beta"]
    assert 230 <= len(beta) <= 240, "nothing is pushed in the first fifth"
    assert beta == sorted(beta, reverse=True), "ever sharper"
    assert 19 < beta[0] <= 20 and 2 <= beta[-1] < 2.2
    (up,) = watched["up"]
    assert float(((up < 0.05) | (up > 0.95)).float().mean()) > 0.9, "decided before it is cut"
    after = layer.weight("site").detach()
    quantizer = layer.quantizers["rounding"]
    torch.testing.assert_close(quantizer(after), after)
    step = quantizer.scale.view(-1, 1, 1, 1)
    assert bool(((after - before).abs() <= step * 1.001).all()), "to a neighbour on the grid"


def test_a_rounding_begins_at_the_weight_itself() -> None:
    layer = OneLayer()
    weight = layer.weight("site").detach()
    soft = _SoftRounding(layer.quantizers["rounding"], weight)
    step = layer.quantizers["rounding"].scale.view(-1, 1, 1, 1)
    assert bool(((soft(weight) - weight).abs() <= 0.011 * step).all())
    torch.testing.assert_close(soft.decided(), layer.quantizers["rounding"](weight))


def test_a_quarter_of_the_channels_skips_where_a_quarter_is_asked_for() -> None:
    quantizer = IntQuantizer(TensorSpec(8), "s", "input", 1)
    quantizer.set_qparams(torch.tensor([10.0]), torch.tensor([0]))
    dropped = _Dropped(quantizer, 0.25, torch.Generator().manual_seed(0))
    x = torch.full((50, 40, 2, 2), 4.0)  # rounds to 0
    skipped = dropped(x) == x
    assert bool((skipped == skipped[:, :, :1, :1]).all()), "whole channels"
    assert float(skipped.float().mean()) == pytest.approx(0.25, abs=0.03)


def stream(count: int, size: int = 8) -> Generator[Tensor]:
    yield from torch.arange(count).split(size)


@pytest.mark.parametrize(
    ("count", "wanted", "taught", "held"),
    [(30, 256, 20, range(20, 30)), (30, 8, 8, range(20, 30)), (1000, 256, 256, range(872, 1000)),
     (2, 256, 1, range(1, 2))],
)  # fmt: skip
def test_images_that_judge_are_the_last_and_are_not_learned_from(
    count: int, wanted: int, taught: int, held: range
) -> None:
    images, held_back = _divided(lambda: stream(count), wanted)
    assert images == taught and held_back.tolist() == list(held)


@pytest.mark.parametrize("change", [-0.5, 0.5])
def test_a_half_keeps_what_brings_the_logits_nearer_and_nothing_else(
    change: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float logits are the images times 2; the layer begins at 1, learns 0.5 or 1.5."""

    class Scaled:
        value = torch.tensor(1.0)
        plan = SimpleNamespace(
            decisions=[
                SimpleNamespace(
                    site=SimpleNamespace(name="a.inter1_fc1", branch="inter1"),
                    weight=TensorSpec(4),
                )
            ]
        )

        def __call__(self, images: Tensor) -> Tensor:
            return images * self.value

    model, exact = Scaled(), Scaled()
    model.value, exact.value = torch.tensor(1.0), torch.tensor(2.0)
    node = SimpleNamespace(name="n")
    half = SimpleNamespace(start=node, end=node, tensors=lambda: [model.value])
    monkeypatch.setattr(learned, "Half", lambda quantized, name: half)
    monkeypatch.setattr(learned, "_collect", lambda *given: torch.zeros(1))
    monkeypatch.setattr(learned, "_learn", lambda *given: model.value.add_(change))
    images = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    kept = reconstruct(
        cast(Any, model), cast(Any, exact), ReconstructSection(), lambda: iter_of(images), 0
    )
    assert kept == {"a.inter1": change > 0}
    assert float(model.value) == (1.5 if change > 0 else 1.0), "else it is as it was"


def iter_of(images: Tensor) -> Generator[Tensor]:
    yield images


def quantizer(spec: TensorSpec, scale: list[float], zero_point: list[int]) -> IntQuantizer:
    made = IntQuantizer(spec, "s", "input", len(scale))
    made.set_qparams(torch.tensor(scale), torch.tensor(zero_point))
    return made


PER_TENSOR, PER_CHANNEL = TensorSpec(8, symmetric=False), TensorSpec(8, "channel", 1, None, False)


@pytest.mark.parametrize(
    ("source", "spec", "scales"),
    [
        (quantizer(TensorSpec(8), [0.1], [0]), PER_TENSOR, 1),
        (quantizer(PER_TENSOR, [0.1], [30]), TensorSpec(8), 1),
        (quantizer(PER_TENSOR, [0.1], [200]), TensorSpec(8), 1),
        (quantizer(PER_CHANNEL, [0.1, 0.02, 0.05], [10, 255, 0]), PER_TENSOR, 1),
        (quantizer(PER_CHANNEL, [0.1, 0.02, 0.05], [10, 255, 0]), TensorSpec(8), 1),
        (quantizer(PER_TENSOR, [0.1], [30]), PER_CHANNEL, 3),
        (quantizer(TensorSpec(8), [0.1], [0]), TensorSpec(8, reduced=True), 1),
    ],
)
def test_a_range_in_another_form_covers_what_it_covered_and_little_more(
    source: IntQuantizer, spec: TensorSpec, scales: int
) -> None:
    before = source.bounds(2)
    scale, zero_point = _range_in(source, spec, scales)
    assert len(scale) == scales
    low, high = scale * (spec.quant_min - zero_point), scale * (spec.quant_max - zero_point)
    wanted_low, wanted_high = before[0].min(), before[1].max()
    assert bool((low <= wanted_low + scale / 2 + 1e-5).all())
    assert bool((high >= wanted_high - scale / 2 - 1e-5).all())
    if spec.symmetric:
        assert not zero_point.any()
        excess = torch.minimum(wanted_low - low, high - wanted_high)
    else:
        excess = torch.maximum(wanted_low - low, high - wanted_high)
    assert bool((excess <= scale / 2 + 1e-5).all()), "no level is wasted"


def test_a_range_that_needs_no_other_form_stays_to_the_bit() -> None:
    source = quantizer(PER_TENSOR, [0.1], [30])
    scale, zero_point = _range_in(source, PER_TENSOR, 1)
    assert torch.equal(scale, source.scale) and zero_point.tolist() == [30]


def test_scales_of_a_half_graph_are_the_next_half_and_never_smaller() -> None:
    scale = torch.cat([10 ** torch.linspace(-6, 2, 200), torch.tensor([0.5, 1e-9, 1 + 2**-11])])
    found = _round_up_to_half(scale)
    assert torch.equal(found, found.half().float()) and bool((found >= scale).all())
    below = torch.nextafter(found.half(), torch.zeros(()).half()).float()
    assert bool(((below < scale) | (found == SMALLEST_SCALE)).all()), "and no larger than needed"
    assert float(found[-3]) == 0.5 and float(found[-2]) == SMALLEST_SCALE


def test_biases_become_whole_steps_of_the_integer_sums() -> None:
    step = quantizer(PER_TENSOR, [0.5], [0])
    weight = quantizer(TensorSpec(8, "channel"), [0.25, 0.125], [0, 0])
    weight.operand, bias = "weight", nn.Parameter(torch.tensor([0.19, -0.16]))
    graph = SimpleNamespace(named_parameters=lambda: [("network.s.bias", bias)])
    model = SimpleNamespace(graph=graph, integers=lambda: iter([step, weight]))
    _round_biases(cast(Any, model))
    # Steps of 0.125 and 0.0625: 1.52 of one and -2.56 of the other.
    assert bias.tolist() == [2 * 0.125, -3 * 0.0625]


def test_nncf_is_told_top1_in_percent_and_no_number_is_right() -> None:
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [np.nan, 0.0], [0.0, 3.0]], np.float32)
    control = AccuracyControl(task_called("classification"), 1.0, [], DataSection())
    pixels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    compiled = lambda images: {"logits": copy.copy(logits)}  # noqa: E731
    items = [Batch(pixels, torch.tensor([0, 1, 0, 0]), torch.arange(4))]
    top1, outputs = control.validate(compiled, items * 2)
    assert top1 == 50.0 and len(outputs) == 2


def test_levels_that_a_trained_weight_does_not_use_stay_unused() -> None:
    source = SimpleNamespace(
        scale=torch.tensor([0.5]),
        zero_point=torch.tensor([0]),
        activation_post_process=SimpleNamespace(quant_min=-128, quant_max=127),
        ch_axis=0,
    )
    rounded = _FakeQuantize(source, (-64, 63))(torch.tensor([-100.0, 0.3, 100.0]))
    assert rounded.tolist() == [-32.0, 0.5, 31.5]
    narrow = SimpleNamespace(**{**vars(source), "activation_post_process": SimpleNamespace(
        quant_min=-7, quant_max=7)})  # fmt: skip
    assert _FakeQuantize(narrow, (-64, 63))(torch.tensor([-100.0])).tolist() == [-3.5]
