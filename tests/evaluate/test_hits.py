"""Counting by hand: top-1, top-5, latency percentiles, throughput, calibration error."""

import numpy as np
import pytest
import torch

from care_compress.data.loader import Batch
from care_compress.device.timing import Timing
from care_compress.evaluate.latency import Latency
from care_compress.tasks.classification import (
    Accuracy,
    calibration_error,
    collect_answers,
    count_pairs,
    hits_of,
)

LOGITS = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2]])


@pytest.mark.parametrize(
    ("label", "first", "in_top5"),
    [(0, True, True), (1, False, True), (4, False, True), (5, False, False), (6, False, False)],
)
def test_the_fifth_answer_counts_and_the_sixth_does_not(
    label: int, first: bool, in_top5: bool
) -> None:
    hits = hits_of(LOGITS, torch.tensor([label]))
    assert (bool(hits.first), bool(hits.in_top5)) == (first, in_top5)


def test_fewer_than_five_classes_have_no_wrong_top5() -> None:
    assert bool(hits_of(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([2])).in_top5)


def test_shares_are_of_all_images() -> None:
    both = Accuracy(6, 3, 4, 1) + Accuracy(2, 0, 1)
    assert (both.images, both.top1, both.top5, both.broken) == (8, 37.5, 62.5, 1)


def rows(*classes: int) -> torch.Tensor:
    return torch.eye(4)[list(classes)]


def test_a_pair_counts_what_was_lost_and_what_was_gained() -> None:
    labels = torch.tensor([0, 1, 2, 3, 0])
    batch = Batch(torch.zeros(5, 3, 1, 1), labels, torch.arange(5))
    before, after = rows(0, 1, 2, 0, 1), rows(0, 2, 3, 3, 2)
    pair = count_pairs(lambda x: before, lambda x: after, [batch])
    assert (pair.lost, pair.gained, pair.agreeing) == (2, 1, 1)
    assert pair.drop == pytest.approx(100 * (3 - 2) / 5) and pair.agreement == 20.0
    assert (pair + pair).images == 10 and (pair + pair).drop == pair.drop
    found = collect_answers(
        {"a": lambda x: before, "b": lambda x: after}, {"a": "a", "b": "a"}, [batch], lambda n: None
    )
    assert found.answers["b"].right.tolist() == [True, False, False, True, False]
    assert found.answers["b"].top1 == 40.0 and found.labels.tolist() == labels.tolist()


def test_the_same_wrong_answer_is_the_same_answer() -> None:
    batch = Batch(torch.zeros(3, 3, 1, 1), torch.tensor([0, 1, 2]), torch.arange(3))
    pair = count_pairs(lambda x: rows(0, 2, 1), lambda x: rows(0, 2, 3), [batch])
    assert (pair.agreeing, pair.lost, pair.gained) == (2, 0, 0)


def test_the_two_surest_bins_are_apart() -> None:
    """15 bins end at 0.867, 0.933 and 1: a gap of 0.9 down and one of 0.05 up."""
    found = calibration_error(np.array([0.9, 0.95], np.float32), np.array([False, True]))
    assert found == pytest.approx(100 * (0.9 + 0.05) / 2, abs=1e-4)


def test_calibration_error_is_a_gap_in_each_bin() -> None:
    """Confidence 0.9 right every time (a gap of 0.1) and 0.5 right half of the time (none)."""
    confidence = np.array([0.9] * 4 + [0.5] * 4, np.float32)
    right = np.array([True] * 4 + [True, False] * 2)
    assert calibration_error(confidence, right) == pytest.approx(100 * 0.1 / 2, abs=1e-4)
    # A gap up and a gap down do not cancel: they stand in bins of their own.
    mixed = np.array([0.9] * 4 + [0.5] * 4, np.float32)
    wrong = np.array([True, True, True, False] + [True, True, True, False])
    expected = 100 * (abs(0.75 - 0.9) / 2 + abs(0.75 - 0.5) / 2)
    assert calibration_error(mixed, wrong) == pytest.approx(expected, abs=1e-4)
    assert calibration_error(np.ones(3, np.float32), np.array([True] * 3)) == 0.0


def test_a_calibrated_model_has_no_calibration_error() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1.0, 50_000).astype(np.float32)
    right = rng.uniform(size=50_000) < confidence
    assert calibration_error(confidence, right) < 1.0
    assert calibration_error(np.full(1000, 0.9, np.float32), np.arange(1000) % 2 == 0) > 35


def test_latency_is_of_single_runs_and_throughput_of_images() -> None:
    runs = np.arange(1.0, 101.0)  # 1 to 100 ms
    latency = Latency((runs[:50], runs[50:]), batch=8)
    assert latency.percentiles() == pytest.approx({"p50": 50.5, "p90": 90.1, "p99": 99.01})
    assert latency.throughput == pytest.approx(1000 * 8 / 50.5)
    assert latency.medians.tolist() == [25.5, 75.5] and latency.is_noisy
    assert not Latency((runs[40:60], runs[40:60]), 1).is_noisy


def test_a_device_counts_images_too() -> None:
    timing = Timing(batch=8)
    timing.milliseconds += [5.0] * 90 + [9.0] * 10
    timing.seconds = 2.0
    assert timing.throughput == pytest.approx(100 * 8 / 2)
    assert timing.percentile(50) == 5.0 and timing.percentile(99) == pytest.approx(9.0)
