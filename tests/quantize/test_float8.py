"""8-bit floats: what they round to, where they may stand, and that they come back from a file."""

from pathlib import Path

import pytest
import torch
from quantized import KEPT, care, images, network, quantized, sqnr

from care_compress.errors import RecipeError
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.quantize.artifact import load_saved, save_quantized
from care_compress.quantize.fakequant import Float8Quantizer
from care_compress.quantize.health import share_cut
from care_compress.quantize.plan import make_plan
from care_compress.quantize.retarget import export_rules
from care_compress.quantize.spec import FLOAT, Plan, TensorSpec
from care_compress.recipe.quantize import QuantizeSection, RuleSection
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.target import all_targets, load_target

SPEC = TensorSpec("fp8")
ABLE = ("tensorrt-gpu", "tensorrt-jetson-thor", "tensorrt-rtx")


def shipped() -> QuantizeSection:
    section = load_recipe("fp8_ptq").quantize
    assert section is not None
    return section


def quantizer(*scales: float) -> Float8Quantizer:
    spec = SPEC if len(scales) == 1 else TensorSpec("fp8", "channel", axis=0)
    made = Float8Quantizer(spec, "site", "weight", len(scales))
    made.set_qparams(torch.tensor(scales), torch.zeros(len(scales)))
    return made


def planned_for(name: str, *rules: dict[str, object]) -> Plan:
    target, section = load_target(name), shipped()
    chosen = tuple(RuleSection.model_validate(rule) for rule in rules) or section.rules
    return make_plan(network(), (*chosen, *target.rules), target, 32)


def test_it_is_torchs_own_cast_of_every_value_and_between() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = codes[codes.isfinite()].unique()
    between = (finite[1:] + finite[:-1]) / 2  # where it has to choose: the even one
    x = torch.cat([finite, between, between * 1.001, torch.randn(1000) * 100])
    assert len(finite) == 253 and float(finite[-1]) == 448
    assert torch.equal(quantizer(1.0)(x), x.clamp(-448, 448).to(torch.float8_e4m3fn).float())
    assert torch.equal(quantizer(1.0)(finite), finite), "what it can hold it keeps"


def test_it_saturates_at_448_steps_and_keeps_powers_of_two() -> None:
    found = quantizer(0.5)(torch.tensor([-1e9, -224.0, 224.0, 225.0, 1e9, torch.inf]))
    assert found.tolist() == [-224, -224, 224, 224, 224, 224]
    powers = torch.pow(2.0, torch.arange(-9, 9))  # from the smallest to 256
    assert torch.equal(quantizer(1.0)(powers), powers)
    assert torch.equal(quantizer(0.25)(powers / 4), powers / 4)
    assert quantizer(1.0)(torch.tensor([2.0**-11])).item() == 0, "under half of the smallest"


def test_each_row_of_a_weight_has_its_own_scale() -> None:
    weight = torch.tensor([[448.0, 17.0], [0.448, 0.017]])
    found = quantizer(1.0, 1e-3)(weight)
    assert torch.allclose(found, torch.tensor([[448.0, 16.0], [0.448, 0.016]]), rtol=1e-6)


def test_up_to_half_of_the_last_step_nothing_is_cut_off() -> None:
    assert quantizer(2.0).cut(torch.tensor([900.0, 927.0, 929.0, -950.0])) == 2


def test_scales_are_the_largest_magnitude_over_448() -> None:
    model = quantized(shipped()).model
    weights = [one for one in model.integers("weight")]
    assert weights and all(isinstance(one, Float8Quantizer) for one in model.integers())
    for one in weights:
        largest = model.weight(one.site).detach().flatten(1).abs().amax(dim=1)
        assert torch.allclose(one.scale, largest / 448)
    seen: dict[str, float] = {}

    def watch(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, Float8Quantizer)
        now = float(inputs[0].abs().max())
        seen[module.site] = max(seen.get(module.site, 0.0), now)

    hooks = [one.register_forward_pre_hook(watch) for one in model.integers("input")]
    model.enable(False)
    model(images())  # those it was calibrated on; its biases were corrected since
    for hook in hooks:
        hook.remove()
    for one in model.integers("input"):
        assert float(one.scale) == pytest.approx(seen[one.site] / 448, rel=0.3)
    model.enable(True)
    x = images(16, seed=5)
    assert 15 < sqnr(model(x), network()(x)) < 60
    assert max(share_cut(model, x).values()) < 0.02


def test_the_shipped_recipe_leaves_in_float_what_has_no_kernel() -> None:
    for name in ABLE:
        plan = planned_for(name)
        eight = [decision for decision in plan.decisions if decision.input.bits == "fp8"]
        assert {decision.site.role for decision in eight} <= {
            "pointwise", "downsample", "attention.qk",
        }  # fmt: skip
        for decision in eight:
            assert decision.weight == TensorSpec("fp8", "channel")
            assert decision.site.narrowest > 16 and decision.precision == "fp8"
        rest = [decision for decision in plan.decisions if decision not in eight]
        assert all(decision.input == FLOAT for decision in rest)
        narrow = [d for d in rest if d.site.role == "pointwise"]
        assert narrow and all(decision.site.narrowest <= 16 for decision in narrow)
        assert len(eight) > 10


def test_targets_without_such_products_refuse_in_one_line() -> None:
    refusing = {target.name for target in all_targets()} - set(ABLE)
    assert {"tensorrt-jetson-orin", "openvino-cpu", "onnxruntime-cpu"} <= refusing
    for name in refusing:
        target, section = load_target(name), shipped()
        export = load_recipe("fp8_ptq").export
        with pytest.raises(RecipeError, match=f"{name} has no products of 8-bit floats") as caught:
            make_plan(network(), export_rules(export, section, target), target, 32)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        ([{"role": "residual_add", "input": "fp8"}], "both"),
        ([{"role": "pointwise", "weight": "fp8"}], "both"),
        ([{"role": "pointwise", "weight": "fp8", "input": 8}], "both"),
        ([{"role": "stem", "weight": "fp8", "input": "fp8"}], "no FP8 kernel"),
        ([{"role": "pointwise", "weight": {"bits": "fp8", "group": 8}}], "one form"),
        ([{"role": "pointwise", "input": {"bits": "fp8", "range": "mse"}}], "one form"),
    ],
)
def test_what_is_no_product_of_two_is_refused(rules: list[dict[str, object]], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        planned_for("tensorrt-gpu", *rules)


def test_a_depthwise_convolution_is_refused_without_the_targets_own_rules() -> None:
    rule = RuleSection.model_validate({"role": "depthwise", "weight": "fp8", "input": "fp8"})
    with pytest.raises(RecipeError, match="no FP8 kernel for depthwise"):
        make_plan(network(), (rule,), load_target("tensorrt-gpu"), 32)
    plan = make_plan(network(), (rule,), None, 32)
    assert plan.macs_by_precision()["fp8"] > 0, "no runtime's: simulated all the same"


def test_few_channels_of_either_side_are_selected() -> None:
    rule = RuleSection.model_validate({"max_channels": 16, "weight": 8})
    chosen = {d.site.name for d in make_plan(network(), (rule,), None, 32).decisions if d.quantized}
    assert {"stem.0", "heads.fc", "stages.2.blocks.0.token_mixer.qk"} <= chosen
    assert "stages.2.blocks.0.inter_layer.inter1_fc1" not in chosen
    assert not any(name.endswith(("add", "core.kv")) for name in chosen)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("quantize.qat={}", "no qat"),
        ("quantize.reconstruct={}", "no reconstruct"),
        ("precision=int8", "precision: fp8"),
    ],
)
def test_a_recipe_says_fp8_and_does_not_train_it(change: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        load_recipe("fp8_ptq", [change])
    with pytest.raises(RecipeError, match="precision: fp8"):
        load_recipe("int8_ptq", ["precision=fp8"])


def test_a_saved_model_computes_the_same_when_it_is_loaded(tmp_path: Path) -> None:
    section = shipped()
    start: CompactCare = rewrite(care(), KEPT)
    model = quantized(section, start).model
    save_quantized(model, section, KEPT, tmp_path / "model.safetensors")
    again = load_saved(tmp_path / "model.safetensors")
    assert again.section == section and again.model.plan == model.plan
    x = images(4, seed=3)
    with torch.no_grad():
        assert torch.equal(again.model(x), model(x))
    model.enable(False)
    with torch.no_grad():
        assert not torch.equal(again.model(x), model(x)), "and it is quantized"
