"""The numbers that plans, distances and health are made of, by hand."""

import math
from dataclasses import replace

import pytest
import torch

from care_compress.data.loader import Batch
from care_compress.quantize.health import Health, channel_health
from care_compress.quantize.plan_table import plan_as_json
from care_compress.quantize.ptq import Tuning, first_images
from care_compress.quantize.sensitivity import Answered, effect
from care_compress.quantize.spec import FLOAT, Decision, Kept, Plan, Site, TensorSpec
from care_compress.quantize.statistics import ChannelRange
from care_compress.tasks.distance import EXACT_DB, Distance, sqnr_db
from care_compress.tasks.known import task_called


@pytest.mark.parametrize(
    ("spec", "limits", "dtype"),
    [
        (TensorSpec(8), (-128, 127), torch.int8),
        (TensorSpec(8, reduced=True), (-64, 63), torch.int8),
        (TensorSpec(8, symmetric=False), (0, 255), torch.uint8),
        (TensorSpec(4), (-8, 7), torch.int8),
        (TensorSpec(4, symmetric=False), (0, 15), torch.uint8),
    ],
)
def test_integers_have_the_limits_of_their_type(
    spec: TensorSpec, limits: tuple[int, int], dtype: torch.dtype
) -> None:
    assert (spec.quant_min, spec.quant_max) == limits and spec.dtype == dtype


def site(name: str = "a", macs: int = 1000, weighted: bool = True) -> Site:
    role = "pointwise" if weighted else "attention.kv"
    return Site(name, role, 0, 0, "inter1", macs, 10, 4, False, weighted)


def decision(
    input_: TensorSpec, weight: TensorSpec | None, macs: int = 1000, name: str = "a"
) -> Decision:
    return Decision(site(name, macs, weight is not None), input_, weight, 1, 1)


INT8, INT4, HALF = TensorSpec(8), TensorSpec(4), TensorSpec("fp16")


@pytest.mark.parametrize(
    ("input_", "weight", "picojoules", "bits", "precision"),
    [
        (INT8, INT8, 0.3, 64, "w8a8"),
        (INT4, INT4, 0.15, 16, "w4a4"),
        (INT8, INT4, 0.2, 32, "w4a8"),
        (INT8, None, 0.3, 64, "a8"),
        (FLOAT, FLOAT, 4.6, 1024, "float"),
        (HALF, HALF, 1.5, 256, "fp16"),
        (FLOAT, INT4, 4.6, 128, "w4a32"),  # expanded first: a product of floats
    ],
)
def test_a_product_costs_what_its_types_cost(
    input_: TensorSpec, weight: TensorSpec | None, picojoules: float, bits: int, precision: str
) -> None:
    found = decision(input_, weight)
    assert found.energy_pj == pytest.approx(1000 * picojoules)
    assert found.bit_operations == 1000 * bits
    assert found.precision == precision


def test_a_plan_adds_up_sites_and_what_stays_in_float() -> None:
    decisions = (decision(INT8, INT8, 3000), decision(FLOAT, FLOAT, 1000, "b"))
    plan = Plan(decisions, (Kept("rotation", 1, "", 500),), None, 32)
    assert plan.macs == 4500
    assert plan.energy_mj == pytest.approx((3000 * 0.3 + 1500 * 4.6) * 1e-9)
    assert plan.macs_by_precision() == {"w8a8": 3000, "float": 1500}
    assert list(plan.macs_by_precision()) == ["w8a8", "float"], "most first"
    shares = [one["share"] for one in plan_as_json(plan)["sites"]]
    assert shares == pytest.approx([3000 / 4500, 1000 / 4500])


def test_decibels_are_ten_per_factor_of_ten_in_power() -> None:
    assert sqnr_db(torch.tensor([10.0]), torch.tensor([9.0])) == pytest.approx(20.0)
    assert Distance(1.0, 1.0).sqnr_db == 0.0
    assert Distance(1.0, 0.0).sqnr_db == math.inf and Distance(1.0, 0.0).known_db is None
    assert Distance(1.0, math.nan).sqnr_db == -math.inf
    assert Distance(0.0, 5.0).shown_db == Distance(1.0, 0.0).shown_db == EXACT_DB
    assert Distance(1.0, math.inf).shown_db == -EXACT_DB


def test_signal_and_noise_add_up_over_batches() -> None:
    """A hard image among easy ones shows."""
    wanted, found = torch.tensor([3.0, 4.0, 5.0]), torch.tensor([3.0, 5.0, 3.0])
    together = Distance()
    together.add(wanted[:2], found[:2])
    rest = Distance()
    rest.add(wanted[2:], found[2:])
    assert together + rest == Distance(50.0, 5.0)
    together.add(wanted[2:], found[2:])
    assert together.sqnr_db == pytest.approx(10.0)


def test_an_effect_is_points_lost_and_the_float_answers_told_by_the_others() -> None:
    float_ = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 2.0]])
    quantized = torch.tensor([[1.0, 0.0], [0.5, 0.0], [3.0, 0.0], [0.0, 2.0]])
    task = task_called("classification")
    batch = Batch(torch.zeros(4, 3, 1, 1), torch.tensor([0, 1, 0, 0]), torch.arange(4))
    found = effect(task, *(Answered.of(task, one, [batch]) for one in (quantized, float_)))
    assert found.drop == 25.0, "three right before, two after"
    divergence = 0.0
    for p, q in zip(float_.double().softmax(1), quantized.double().softmax(1), strict=True):
        divergence += float((p * (p / q).log()).sum()) / 4
    assert found.kl == pytest.approx(divergence)
    assert found.sqnr_db == pytest.approx(10 * math.log10(18 / 2.25))


def test_ranges_that_cut_off_signal_are_named_worst_first() -> None:
    health = Health(8, {}, {}, 8, {"a": 0.03, "b": 0.5, "c": 0.019})
    ranges, channels = health.checks()
    assert ranges.items == ("b 50.0 %", "a 3.0 %") and ranges.text.startswith("2 of 3 sites")
    assert channels.status == "fine"
    (fine, _) = Health(8, {}, {}, 8, {"a": 0.004, "b": 0.015}).checks()
    assert fine.status == "fine" and "b most, 1.5 %" in fine.text


def test_channels_of_one_value_are_dead_and_named_by_share() -> None:
    low, high = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.0, 2.0, -1.0])
    seen = {"a": ChannelRange(low, high), "b": ChannelRange(low[:1], high[:1]), "c": ChannelRange()}
    health = channel_health(seen, 5)
    assert health == replace(Health(5), channels={"a": 3, "b": 1}, dead={"a": 2, "b": 1})
    _, channels = health.checks()
    assert channels.status == "warning" and channels.items == ("b 1 of 1", "a 2 of 3")
    assert channels.text.startswith("3 of 4, at 2 of 2 sites")


def test_the_first_images_are_as_many_as_asked_for_and_no_more_are_read() -> None:
    read = []

    def batches():
        for start in range(0, 40, 10):
            read.append(start)
            yield torch.arange(start, start + 10)

    assert first_images(batches, 25).tolist() == list(range(25))
    assert read == [0, 10, 20]
    read.clear()
    assert first_images(batches, 20).tolist() == list(range(20))
    assert read == [0, 10]
    assert len(first_images(batches, 100)) == 40, "all, if there are fewer"


def test_an_alpha_of_zero_is_a_rescaling() -> None:
    tuning = Tuning({"a": 0.0, "b": None, "c": 1.0}, {"d": True, "e": False})
    assert str(tuning) == "2 of 3 layers rescaled, learned rounding kept in 1 of 2 halves"
