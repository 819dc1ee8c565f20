import json
import re

import pytest
import torch
import yaml
from quantized import SIZE, images, network, rules, section

import care_compress
from care_compress.errors import RecipeError
from care_compress.model.cost import measure_cost
from care_compress.model.rewrite import rewrite
from care_compress.quantize.placement import simulate
from care_compress.quantize.plan import make_plan
from care_compress.quantize.ptq import planned
from care_compress.quantize.sites import find_sites
from care_compress.quantize.spec import Plan
from care_compress.recipe.quantize import QuantizeSection, RuleSection
from care_compress.recipe.recipe import RECIPES_DIR
from care_compress.recipe.target import load_target


def plan(*extra: dict[str, object], target: str | None = None, alone: bool = False) -> Plan:
    chosen = [RuleSection.model_validate(rule) for rule in extra] if alone else rules(*extra)
    return make_plan(network(), chosen, load_target(target) if target else None, SIZE)


def test_every_weight_and_product_is_a_site_and_their_macs_are_all_macs() -> None:
    model = network()
    sites = find_sites(model, SIZE)
    weighted = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    }
    assert {site.name for site in sites if site.weighted} == weighted
    assert sum(site.macs for site in sites) == measure_cost(model, SIZE).macs


def test_a_network_is_simulated_at_the_size_of_its_plan() -> None:
    """The trace of one structure serves every network like it, at the same size alone."""
    start = network()
    for size in (SIZE, 2 * SIZE):
        model, found = planned(start, section(), size)
        simulated, x = simulate(model, found), torch.randn(3, 3, size, size)
        simulated.enable(False)
        with torch.no_grad():
            torch.testing.assert_close(simulated(x), model(x), rtol=1e-3, atol=1e-3)


def test_the_last_matching_rule_decides_each_tensor() -> None:
    found = plan(
        {"stage": 2, "branch": "inter1", "weight": 4},
        {"stage": 2, "block": 1, "role": "pointwise", "input": "float"},
        {"site": "stages.2.*.inter1_fc2", "weight": 8},
    )
    first = found.of("stages.2.blocks.1.inter_layer.inter1_fc1")
    assert (first.weight.bits, first.weight_rule) == (4, 5)
    assert (first.input.bits, first.input_rule) == ("float", 6)
    second = found.of("stages.2.blocks.1.inter_layer.inter1_fc2")
    assert (second.weight.bits, second.weight_rule) == (8, 7)
    other = found.of("stages.1.blocks.0.inter_layer.inter1_fc1")
    assert (other.weight.bits, other.weight_rule, other.input_rule) == (8, 1, 1)


def test_without_a_rule_a_site_stays_in_float_and_the_plan_says_no_rule_did_it() -> None:
    found = plan({"role": "head", "weight": 8, "input": 8}, alone=True)
    stem = found.of("stem.0")
    assert not stem.quantized and stem.input_rule == stem.weight_rule == 0
    assert found.of("heads.fc").quantized
    assert any("attention" in kept.what for kept in found.kept)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"role": "pointwize", "weight": 8}, "did you mean pointwise"),
        ({"branch": "mixer.dw5", "weight": 8}, "did you mean mixer.dw"),
        ({"site": "stages.9.*", "weight": 8}, "matches no site"),
        ({"stage": 3, "block": 7, "input": 8}, "matches no site"),
        ({"role": "pointwise", "weight": {"bits": 4, "group": 7}}, "do not divide into groups"),
        ({"role": "pointwise", "weight": {"bits": 8, "range": "entropy"}}, "no stream"),
        ({"role": "head", "input": {"bits": 8, "granularity": "channel"}}, "one input scale"),
        (
            {"role": "depthwise", "input": {"bits": 8, "granularity": "channel", "range": "mse"}},
            "per tensor",
        ),
    ],
)
def test_a_rule_that_cannot_hold_is_refused_with_its_number(
    rule: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        plan(rule)
    assert "rule 5" in str(caught.value)


@pytest.mark.parametrize(
    ("target", "rule", "message"),
    [
        ("openvino-cpu", {"role": "pointwise", "input": 4}, "no 4-bit activations"),
        ("openvino-cpu", {"role": "head", "weight": 4}, "no 4-bit weights"),
        (
            "tensorrt-gpu",
            {"role": "stem", "input": {"bits": 8, "symmetric": False}},
            "zero point other than 0",
        ),
        (
            "tensorrt-gpu",
            {"role": "depthwise", "input": {"bits": 8, "granularity": "channel"}},
            "one scale per activation tensor",
        ),
        ("openvino-cpu", {"role": "stem", "input": "fp16", "weight": "fp16"}, "in fp32"),
    ],
)
def test_what_a_target_cannot_execute_is_refused(
    target: str, rule: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(rule, target=target)


def test_left_out_settings_follow_the_target() -> None:
    depthwise = "stages.0.blocks.0.inter_layer.inter1_conv"
    for target, symmetric, granularity in (
        ("openvino-cpu", False, "channel"),
        ("tensorrt-jetson-orin", True, "tensor"),
        (None, False, "channel"),
    ):
        found = plan(target=target).of(depthwise).input
        assert (found.symmetric, found.granularity) == (symmetric, granularity)


def test_energy_of_care_s0_is_the_published_estimate() -> None:
    """0.717 G products: 3.30 mJ in float32, 0.215 in INT8."""
    model = rewrite(care_compress.build_model("care_s0"))
    for bits, millijoules in ((8, 0.215), ("float", 3.30)):
        rule = RuleSection.model_validate({"weight": bits, "input": bits})
        found = make_plan(model, [rule], None, 224)
        assert found.energy_mj == pytest.approx(millijoules, rel=0.01)
    assert set(found.macs_by_precision()) == {"float"}


def test_a_rotation_is_work_in_float_and_counted() -> None:
    rule = {"role": "pointwise", "weight": 4, "input": 4}
    plain, turned = (
        planned(network(), section(rule, hadamard=on), SIZE)[1] for on in (False, True)
    )
    added = turned.macs - plain.macs
    assert added > 0 and turned.macs_by_precision()["float"] >= added
    assert turned.energy_mj - plain.energy_mj == pytest.approx(added * 4.6e-9)


def test_only_the_rule_that_decides_must_be_possible() -> None:
    impossible = {"weight": 8, "input": {"bits": 8, "granularity": "channel"}}
    found = plan(impossible, {"input": 8}, target="openvino-cpu")
    assert found.of("heads.fc").input.granularity == "tensor"
    clipped = plan({"input": {"bits": 8, "range": "mse"}}, target="openvino-cpu")
    assert all(d.input.range == "mse" for d in clipped.decisions), "one rule clips everything"


def test_attention_has_a_scale_per_head_where_that_can_be() -> None:
    attention = {"role": "attention.*", "input": 8}
    name = "stages.2.blocks.0.token_mixer.core.kv"
    assert plan(attention).of(name).input.granularity == "channel"
    assert plan(attention, target="openvino-cpu").of(name).input.granularity == "tensor"


def test_the_readme_of_recipes_shows_rules_that_work() -> None:
    text = (RECIPES_DIR / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(quantize:.*?)```", text, flags=re.S)
    shown = QuantizeSection.model_validate_json(json.dumps(yaml.safe_load(block)["quantize"]))
    model = rewrite(care_compress.build_model("care_s0"))
    assert any("4" in d.precision for d in planned(model, shown, 224)[1].decisions)


@pytest.mark.parametrize("rewrites", [{}, {"pool_last_depthwise": False}, {"merge_heads": False}])
def test_the_simulation_goes_to_any_device(rewrites: dict[str, bool]) -> None:
    # A graph that kept the device it was traced on would mix two of them on a GPU.
    elsewhere = torch.device("meta")
    start = network(**rewrites)
    model = simulate(*planned(start, section(), SIZE)).to(elsewhere)
    model.enable(False)  # rounding is not written for this device
    assert model(images(2).to(elsewhere)).device == elsewhere
