"""The exact rescalings and free corrections: that they are exact, and that they gain."""

import copy
import weakref
from collections.abc import Generator

import pytest
import torch
from quantized import (
    SIZE,
    W4,
    W4A4,
    batches,
    images,
    network,
    quantized,
    quantized_shipped,
    section,
    shipped_images,
    shipped_network,
    sqnr,
)

from care_compress.errors import CalibrationError
from care_compress.model.attention import AttentionCore, CovarianceCore, FusedCore
from care_compress.model.compact import ChannelAffine, Rotation, blocks
from care_compress.quantize.calibrate import calibrate
from care_compress.quantize.correct import correct
from care_compress.quantize.equalize import (
    ALPHAS,
    Alpha,
    equalized_layers,
    norms_to_affine,
    product_error,
    rescale,
    rotate,
)
from care_compress.quantize.placement import QuantizedCare, simulate
from care_compress.quantize.plan import make_plan
from care_compress.quantize.ptq import PtqJob, float_reference, planned, quantize_network
from care_compress.quantize.spec import TensorSpec
from care_compress.quantize.statistics import observe


def close(value: torch.Tensor, reference: torch.Tensor) -> bool:
    return bool((value - reference).abs().max() <= 2e-5 * reference.abs().max())


def test_ranges_and_statistics_keep_no_images() -> None:
    alive, peak = 0, 0

    def stream() -> Generator[torch.Tensor]:
        nonlocal alive, peak

        def gone() -> None:
            nonlocal alive
            alive -= 1

        for seed in range(24):
            batch = images(4, seed)
            alive += 1
            peak = max(peak, alive)
            weakref.finalize(batch, gone)
            yield batch

    every_method = [
        {"site": "stem.*", "input": {"bits": 8, "range": "percentile"}},
        {"role": "head", "input": {"bits": 8, "range": "moving_average"}},
        W4A4,
    ]
    model, plan = planned(network(), section(*every_method), SIZE)
    observe(model, stream(), equalized_layers(plan, "search", "search"))
    calibrate(simulate(model, plan), stream(), 99.9)
    assert peak <= 3, "memory does not grow with the number of calibration images"


def test_a_frozen_norm_computes_what_batch_norm_computes() -> None:
    before, after = network(), network()
    norms_to_affine(after)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in after.modules())
    assert close(after(images(4)), before(images(4)))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, "search"])
@pytest.mark.parametrize("rotated", [False, True])
def test_rescaling_and_rotating_change_nothing_in_float(alpha: Alpha, rotated: bool) -> None:
    chosen = section(W4A4, prescale=alpha, equalize=alpha, hadamard=rotated)
    model, plan = planned(network(), chosen, SIZE)
    assert any(isinstance(m, Rotation) for m in model.modules()) == rotated
    names = equalized_layers(plan, alpha, alpha)
    assert len(names) > 20
    seen = observe(model, batches(), names)
    before = copy.deepcopy(model.state_dict())
    for name, wanted in names.items():
        rescale(model, plan, name, wanted, seen[name])
    moved = [
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert len(moved) > 20, "something was rescaled"
    assert close(model(images(4)), network()(images(4)))


def test_alpha_one_fills_the_range_of_every_channel_equally() -> None:
    model, plan = planned(network(), section(), SIZE)
    name = "stages.1.blocks.0.inter_layer.inter1_fc1"
    seen = observe(model, batches(), [name])[name]
    uneven = (seen.high - seen.low).max() / (seen.high - seen.low).min()
    rescale(model, plan, name, 1.0, seen)
    seen = observe(model, batches(), [name])[name]
    reach = (seen.high - seen.low) / 2
    assert uneven > 3 and float(reach.max() / reach.min()) == pytest.approx(1, abs=1e-3)
    assert torch.allclose(seen.high, -seen.low, rtol=1e-3), "centred on zero"


def test_alpha_zero_makes_every_column_of_the_weight_alike() -> None:
    model, plan = planned(network(), section(), SIZE)
    name = "stages.1.blocks.0.inter_layer.inter1_fc1"
    layer = model.get_submodule(name)
    assert isinstance(layer, torch.nn.Conv2d)

    def unevenness() -> float:
        columns = layer.weight.abs().amax(dim=(0, 2, 3))
        return float(columns.max() / columns.min())

    before = unevenness()
    rescale(model, plan, name, 0.0, observe(model, batches(), [name])[name])
    assert before > 1.2 and unevenness() == pytest.approx(1, abs=1e-3)


def test_a_search_ends_with_the_least_error_of_all_it_may_take() -> None:
    name = "stages.1.blocks.0.inter_layer.inter1_fc1"

    def error_after(alpha: Alpha) -> float:
        model, plan = planned(network(), section(), SIZE)
        rescale(model, plan, name, alpha, observe(model, batches(), [name])[name])
        seen = observe(model, batches(), [name])[name]
        decision = plan.of(name)
        assert decision.weight is not None
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        return product_error(seen.sample(), weight.flatten(1), decision.input, decision.weight)

    searched = error_after("search")
    assert searched <= 1.001 * min(error_after(alpha) for alpha in ALPHAS)


def test_the_scale_site_gains_most_of_all() -> None:
    """Pre-norms folded into the 1x1 are ruinous at 4 bits; kept and rescaled they are not."""
    x, labels = shipped_images("val", 256)
    plain = {"prescale": "trained", "equalize": "off", "bias_correction": False}
    right = {}
    for name, fold, chosen in (
        ("folded", True, section(W4, **plain)),
        ("kept", False, section(W4, **plain)),
        ("tuned", False, section(W4)),
    ):
        logits = quantized_shipped(chosen, fold_norms=fold)(x)
        right[name] = 100 * float((logits.argmax(dim=1) == labels).float().mean())
    assert right["kept"] > right["folded"] + 10
    assert right["tuned"] > right["folded"] + 10


def test_a_searched_alpha_is_never_worse_than_none_on_its_rows() -> None:
    rows = torch.randn(512, 8) * torch.tensor([0.01, 0.1, 1, 1, 1, 1, 10, 100.0])
    matrix = torch.randn(16, 8) / torch.tensor([0.01, 0.1, 1, 1, 1, 1, 10, 100.0])
    spec = TensorSpec(8, symmetric=False), TensorSpec(8, granularity="channel")
    trained = product_error(rows, matrix, *spec)
    scale = rows.abs().amax(dim=0)
    assert product_error(rows / scale, matrix * scale, *spec) < trained / 100


def test_a_rotation_spreads_an_outlier_over_its_block() -> None:
    rotation = Rotation(64, 32)
    x = torch.zeros(1, 64, 1, 1)
    x[0, 3] = 32.0
    y = rotation(x)
    assert float(y.square().sum()) == pytest.approx(32.0**2), "it keeps lengths"
    assert float(y.abs().max()) == pytest.approx(32 / 32**0.5)
    assert not y[0, 32:].any(), "the other block sees nothing"


def test_rotating_only_touches_inputs_below_eight_bits() -> None:
    model, _ = planned(network(), section(hadamard=True), SIZE)
    assert not any(isinstance(m, Rotation) for m in model.modules())
    model = network()
    norms_to_affine(model)
    rule = {"stage": 1, "role": "pointwise", "input": 4}
    rotate(model, make_plan(model, section(rule).rules, None, SIZE))
    places = [
        block for block in blocks(model) if isinstance(block.inter_layer.inter1_norm, Rotation)
    ]
    assert len(places) == 2


@pytest.mark.parametrize("form", [FusedCore, CovarianceCore])
def test_attention_forms_are_one_function(form: type[AttentionCore]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 16, 49, dtype=torch.float64) for _ in range(3))
    assert torch.allclose(form()(q, k, v), AttentionCore()(q, k, v), rtol=1e-11, atol=1e-12)


def test_the_covariance_form_keeps_kv_small_and_so_precise() -> None:
    """kv is mostly mean(v) mean(k)^T; what is left needs far fewer levels."""
    torch.manual_seed(0)
    k, v = torch.rand(8, 2, 16, 49) + 2, torch.randn(8, 2, 16, 49) * 0.3 + 2
    kv = v @ k.transpose(-1, -2) / 49
    covariance = kv - v.mean(-1, keepdim=True) * k.mean(-1, keepdim=True).transpose(-1, -2)
    assert float(covariance.abs().max()) < float(kv.abs().max()) / 20

    rule = {"role": "attention.*", "weight": 8, "input": 8}
    x, wanted = images(32, seed=5), network()(images(32, seed=5))
    plain = quantized(section(rule, covariance=False)).model(x)
    centred = quantized(section(rule)).model(x)
    assert sqnr(centred, wanted) > sqnr(plain, wanted)


def test_bias_correction_returns_the_mean() -> None:
    """On the images it saw, every output has its float mean again; the last ones are logits."""
    x = images(48)
    wanted = network()(x).mean(dim=0)
    plain = quantized(section(W4A4, bias_correction=False)).model(x).mean(dim=0)
    off = float((plain - wanted).abs().max())
    assert off > 2e-2
    for norms in (False, True):
        mended = quantized(section(W4A4, norm_reestimation=norms)).model(x).mean(dim=0)
        left = float((mended - wanted).abs().max())
        assert left < off / 10, "but for values at a rounding edge"


def test_corrections_bring_a_trained_network_nearer_and_find_nothing_without_error() -> None:
    x, _ = shipped_images("val", 256)
    wanted = shipped_network()(x)
    plain = quantized_shipped(section(W4A4, bias_correction=False))
    corrected = quantized_shipped(section(W4A4, norm_reestimation=True))
    assert sqnr(corrected(x), wanted) > sqnr(plain(x), wanted) + 0.5
    reference = float_reference(plain)
    untouched = float_reference(plain)
    correct(untouched, reference, x, biases=True, norms=True)
    assert close(untouched(x), reference(x))


def test_learned_rounding_beats_nearest_and_ends_on_the_grid() -> None:
    x, _ = shipped_images("train", 128)
    wanted = shipped_network()(x)
    rule = {"role": "pointwise", "weight": {"bits": 4, "range": "mse"}}
    settings = {"steps": 60, "images": 96, "batch_size": 16}

    def spread(model: QuantizedCare) -> float:
        return float((model(x) - wanted).var(dim=0).sum())

    nearest = quantized_shipped(section(rule, bias_correction=False))
    model = quantized_shipped(section(rule, bias_correction=False, reconstruct=settings))
    assert spread(model) < 0.9 * spread(nearest)
    learned = 0
    for quantizer in model.integers("weight"):
        if quantizer.spec.bits == 4:
            weight = model.weight(quantizer.site)
            learned += bool(torch.allclose(quantizer(weight), weight, atol=1e-6))
    assert learned > 4, "what was kept lies on the grid"


def test_the_same_seed_gives_the_same_bits() -> None:
    chosen = section(W4A4, reconstruct={"steps": 5, "images": 32, "batch_size": 16})
    first, second = (quantized(chosen).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_constant_channel_keeps_its_norm() -> None:
    """One image of the smallest size: the last stage is one pixel, and no deviation is known."""
    model = quantized(section(W4A4, bias_correction=False)).model
    before = {name: value.clone() for name, value in model.graph.named_parameters()}
    correct(model, float_reference(model), images(1), biases=False, norms=True)
    for name, value in model.graph.named_parameters():
        if name.endswith("norm.scale"):
            ratio = value / before[name]
            assert bool((ratio >= 0.49).all() and (ratio <= 2.01).all()), name


def test_a_norm_gets_its_deviation_back_where_that_may_be_quantization() -> None:
    """Half as much again is undone, ten times only by two, and a dead channel is no error."""
    reference = float_reference(simulate(*planned(network(), section(), SIZE)))
    model = float_reference(reference)
    (name, scale), *_ = (
        (name, value)
        for name, value in model.graph.named_parameters()
        if name.endswith("norm.scale")
    )
    factors, expected = (torch.ones_like(scale) for _ in range(2))
    factors[:4, 0, 0] = torch.tensor([1.5, 10.0, 0.1, 1e-9])
    expected[:4, 0, 0] = torch.tensor([1.0, 5.0, 0.2, 1e-9])
    with torch.no_grad():
        scale.mul_(factors)
    correct(model, reference, images(), biases=False, norms=True)
    found = model.graph.get_parameter(name) / reference.graph.get_parameter(name)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-12)


def test_rounding_is_learned_from_few_images_in_one_batch_too() -> None:
    """As many images as are wanted for learning: some are held back all the same."""
    x = images(40)
    settings = {"steps": 3, "images": 40, "batch_size": 8}
    job = PtqJob(network(), SIZE, 0, lambda: (batch for batch in (x,)))
    made = quantize_network(job, section(W4, reconstruct=settings))
    assert made.tuning.rounded and str(made.tuning).endswith("halves")


def test_a_weight_with_one_scale_is_clipped_by_its_own_error() -> None:
    rule = {"role": "pointwise", "weight": {"bits": 4, "granularity": "tensor", "range": "mse"}}
    model = quantized(section(rule)).model
    assert sqnr(model(images(8)), network()(images(8))) > 0


def test_one_scale_per_channel_at_the_scale_site_holds_whatever_prescale_says() -> None:
    per_channel = {"role": "pointwise", "input": {"bits": 8, "granularity": "channel"}}
    made = quantized(section({**per_channel, "site": "*_fc1"}, prescale="trained", equalize="off"))
    assert made.tuning.alphas and set(made.tuning.alphas.values()) == {1.0}
    fc1 = [d for d in made.model.plan.decisions if d.site.name.endswith("_fc1")]
    assert {d.site.name for d in fc1} == set(made.tuning.alphas), "the plan says per channel"
    read = [q for q in made.model.integers("input") if q.site in made.tuning.alphas]
    assert [q.scale.numel() for q in read] == [1] * len(fc1), "a product in integers has one"


def test_activations_that_overflow_name_the_first_operation() -> None:
    model = network()
    model.stages[1].blocks[0].inter_layer.inter1_fc2.weight.data.fill_(1e38)
    with pytest.raises(CalibrationError, match=r"stages\.1\.blocks\.0\.inter_layer\.inter1_fc2"):
        quantized(section(), model)


def test_affine_is_one_multiply_add_per_channel() -> None:
    affine = ChannelAffine(torch.tensor([2.0, 3.0]), torch.tensor([1.0, -1.0]))
    assert torch.equal(affine(torch.ones(1, 2, 1, 1)).flatten(), torch.tensor([3.0, 2.0]))
