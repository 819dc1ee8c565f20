"""What sections and targets say about themselves, and where their limits are."""

import json

import pytest

from care_compress.recipe.quantize import CalibrateSection, NncfSection, QuantizeSection
from care_compress.recipe.reading import MOST_VALUES, parse_yaml
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import AugmentSection, DataSection, TrainSection
from care_compress.recipe.slim import SlimBudgetSection, SlimRuleSection
from care_compress.recipe.target import AS_SHIPPED, Target, load_target

PLAN = {"epochs": 4, "batch_size": 8, "learning_rate": 1e-3}


def test_a_warm_up_ends_before_the_training() -> None:
    assert TrainSection.model_validate({**PLAN, "warmup_epochs": 3.9}).warmup_epochs == 3.9
    with pytest.raises(ValueError, match="smaller than epochs"):
        TrainSection.model_validate({**PLAN, "warmup_epochs": 4})


@pytest.mark.parametrize(
    "bad", [{"scale": (0.5, 0.4)}, {"scale": (0.5, 1.1)}, {"ratio": (2.0, 1.0)}, {"flip": 1.0}]
)
def test_crops_are_parts_of_an_image_from_least_to_most(bad: dict[str, object]) -> None:
    assert AugmentSection(scale=(0.4, 0.4), ratio=(1.0, 1.0)).scale == (0.4, 0.4)
    with pytest.raises(ValueError):
        AugmentSection.model_validate(bad)


def test_images_are_prepared_as_imagenets_are_unless_said_otherwise() -> None:
    data = DataSection()
    assert (data.resolution, data.crop_pct) == (224, 0.875)
    assert data.mean == (0.485, 0.456, 0.406) and data.std == (0.229, 0.224, 0.225)


@pytest.mark.parametrize("percentile", [50, 100.1, 0.9999])
def test_a_percentile_is_given_in_percent(percentile: float) -> None:
    assert CalibrateSection(percentile=100).percentile == 100
    with pytest.raises(ValueError):
        CalibrateSection(percentile=percentile)


def test_validation_images_have_a_say_where_something_is_searched() -> None:
    def searches(**more: object) -> bool:
        return QuantizeSection.model_validate_json(json.dumps(more)).searches

    rules = [{"weight": 8}]
    assert not searches(rules=rules)
    assert searches(rules=rules, search={})
    assert not searches(backend="nncf", nncf={})
    assert searches(backend="nncf", nncf={"accuracy_control": True})


def test_attention_multiplies_symmetric_values_in_one_preset_unless_it_is_left_out() -> None:
    assert NncfSection(preset="performance").multiplies_symmetric
    assert not NncfSection(preset="mixed").multiplies_symmetric
    kept = NncfSection(preset="performance", ignored_types=("MatMul",))
    assert not kept.multiplies_symmetric


def test_a_slim_budget_is_a_share_of_one_thing() -> None:
    for kind in ("macs", "parameters", "latency"):
        budget = SlimBudgetSection.model_validate({kind: 0.7})
        assert (budget.kind, budget.share) == (kind, 0.7)
        for all_or_nothing in (0.0, 1.0):
            with pytest.raises(ValueError, match=kind):
                SlimBudgetSection.model_validate({kind: all_or_nothing})
    assert SlimBudgetSection(macs=None, latency=0.5).kind == "latency", "a base's was taken away"
    for bad in ({}, {"macs": None}, {"macs": 0.5, "latency": 0.5}):
        with pytest.raises(ValueError, match="name one of macs, parameters, latency"):
            SlimBudgetSection.model_validate(bad)


def test_a_slim_rule_reaches_every_stage_and_leaves_from_nothing_to_all() -> None:
    for stage in range(4):
        for least in (0.0, 1.0):
            rule = SlimRuleSection(stage=stage, least=least)
            assert (rule.stage, rule.least) == (stage, least)
    for bad in ({"stage": 4}, {"stage": -1}, {"least": 1.1}, {"least": -0.1}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SlimRuleSection.model_validate({"least": 0.5, **bad})


def test_aliases_count_as_often_as_they_stand() -> None:
    line = "a: &a [" + ", ".join("1" for _ in range(100)) + "]\n"
    assert parse_yaml(line + "b: [*a, *a]")["b"] == [[1] * 100] * 2
    many = ", ".join("*a" for _ in range(MOST_VALUES // 100))
    with pytest.raises(Exception, match="aliases stand for more"):
        parse_yaml(line + f"b: [{many}]")


def test_the_full_range_is_a_choice_of_the_recipe() -> None:
    assert not load_recipe("fp32").full_range and not load_recipe("int8_ptq").full_range
    assert load_recipe("int8_ptq", ["quantize.full_range=true"]).full_range


def test_all_8_bits_need_dot_products_and_leave_other_targets_as_they_are() -> None:
    cpu, gpu = load_target("openvino-cpu"), load_target("tensorrt-gpu")
    assert cpu.weights.reduce_range and cpu.file_needs is None
    full = load_target("openvino-cpu", full_range=True)
    assert not full.weights.reduce_range and full.file_needs is not None
    assert gpu.at_full_range() == gpu and gpu.file_needs is None


def test_a_placement_goes_with_what_is_known_of_the_processor() -> None:
    target = load_target("openvino-cpu")
    assert target.without_dot_products is not None
    assert target.placement_for(False) == target.without_dot_products
    assert target.placement_for(True) == target.placement_for(None) == AS_SHIPPED
    placed = target.placed(target.without_dot_products)
    chosen = target.placements[target.without_dot_products]
    assert (placed.rules, placed.gelu) == (chosen.rules, chosen.gelu)
    assert placed.gelu != target.gelu
    assert placed.placement == target.without_dot_products
    assert target.placed(AS_SHIPPED).rules == target.rules


@pytest.mark.parametrize(
    ("name", "engine", "bundled"),
    [
        ("openvino-cpu", False, True),
        ("openvino-gpu", False, False),
        ("onnxruntime-cpu", False, True),
        ("tensorrt-jetson-orin", True, True),
        ("tensorrt-rtx", True, True),
    ],
)
def test_engines_are_built_and_bundles_are_for_them_and_for_processors(
    name: str, engine: bool, bundled: bool
) -> None:
    target: Target = load_target(name)
    assert (target.is_engine, target.is_bundled) == (engine, bundled)
    assert target.is_typed == (engine and target.float_type == "fp16")
