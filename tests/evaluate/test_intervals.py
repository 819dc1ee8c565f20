"""Intervals that are printed cover the truth as often as they say: drawn, not believed."""

import math

import numpy as np
import pytest

from care_compress.tasks.intervals import (
    centre_interval,
    drop_interval,
    mcnemar_p,
    ratio_interval,
    unpaired_interval,
    wilson,
)

TURNS = 24


@pytest.mark.parametrize("images", [470, 1000, 10_000])
@pytest.mark.parametrize("changing", [0.0, 2.0, 20.0])  # images that also turn right, of `images`
def test_the_interval_of_a_drop_covers_it(images: int, changing: float) -> None:
    """At no drop, at drops of 1.5 and 5 images, and at 1 point: at least 94 times in a hundred."""
    rng = np.random.default_rng(images)
    for drop in (0.0, 1.5 / images, 5 / images, 0.01):
        gain = changing / images
        drawn = rng.multinomial(images, [drop + gain, gain, 1 - drop - 2 * gain], size=4000)
        known = {
            (int(lost), int(gained)): drop_interval(int(lost), int(gained), images)
            for lost, gained, _ in np.unique(drawn, axis=0)
        }
        covered = [
            known[int(lost), int(gained)][0] <= 100 * drop <= known[int(lost), int(gained)][1]
            for lost, gained, _ in drawn
        ]
        print(f"{images} images, true drop {100 * drop:.3f}: covered {np.mean(covered):.3f}")
        assert np.mean(covered) >= 0.94


def test_less_evidence_never_looks_surer() -> None:
    """No flip among n images leaves a true drop of 3 / n possible, and one flip no less."""
    for images in (100, 1000, 10_000):
        none, one = drop_interval(0, 0, images), drop_interval(1, 0, images)
        assert none == pytest.approx((-none[1], none[1]))
        assert none[1] >= 100 * 3 / images
        assert one[1] > none[1] and one[1] - one[0] > none[1] - none[0]


def test_a_drop_and_its_mirror_have_mirrored_intervals() -> None:
    low, high = drop_interval(30, 12, 1000)
    assert drop_interval(12, 30, 1000) == pytest.approx((-high, -low))
    assert low < 1.8 < high


def test_many_flips_give_the_normal_interval() -> None:
    """sqrt(lost + gained) images is the deviation of the difference."""
    low, high = drop_interval(2500, 2000, 100_000)
    half = 1.96 * math.sqrt(4500) / 1000
    assert (low, high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.006)


def slowed(rng: np.random.Generator, correlation: float, spread: float = 0.1) -> np.ndarray:
    """Times of one model, turn by turn, on a machine that stays slow for a while."""
    drawn = rng.normal(size=TURNS)
    for turn in range(1, TURNS):
        drawn[turn] = correlation * drawn[turn - 1] + math.sqrt(1 - correlation**2) * drawn[turn]
    return np.exp(spread * drawn)


@pytest.mark.parametrize("correlation", [0.0, 0.4, 0.7])
def test_the_interval_of_a_speedup_covers_it(correlation: float) -> None:
    rng, covered, tries = np.random.default_rng(1), 0, 600
    for _ in range(tries):
        slow, fast = 1.5 * slowed(rng, correlation), slowed(rng, correlation)
        _, low, high = ratio_interval(slow, fast)
        covered += low <= 1.5 <= high
    print(f"turns with an autocorrelation of {correlation}: covered {covered / tries:.3f}")
    assert covered / tries >= 0.93


def test_what_slows_both_of_a_pair_is_no_difference() -> None:
    load = np.random.default_rng(0).uniform(1, 3, 30)
    assert ratio_interval(2 * load, load) == (2.0, 2.0, 2.0)


def test_one_turn_that_another_program_spoiled_decides_nothing() -> None:
    rng = np.random.default_rng(2)
    times = 1 + 0.01 * rng.normal(size=TURNS)
    quiet = ratio_interval(times, np.ones(TURNS))
    times[7] *= 3
    value, low, high = ratio_interval(times, np.ones(TURNS))
    assert value == pytest.approx(quiet[0], rel=0.003)
    assert high - low < 1.5 * (quiet[2] - quiet[1])


def test_a_ratio_turned_round_is_its_inverse() -> None:
    rng = np.random.default_rng(3)
    first, second = slowed(rng, 0.3), slowed(rng, 0.3)
    value, low, high = ratio_interval(first, second)
    assert ratio_interval(second, first) == pytest.approx((1 / value, 1 / high, 1 / low), rel=1e-4)


def test_neighbours_that_are_alike_say_less() -> None:
    rng = np.random.default_rng(4)
    mixed = rng.normal(size=TURNS)
    _, low, high = centre_interval(mixed)
    _, wider_low, wider_high = centre_interval(np.sort(mixed))
    assert wider_high - wider_low > 2 * (high - low)


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar_p(0, 0) == 1.0
    assert mcnemar_p(5, 0) == pytest.approx(2 / 32)
    assert mcnemar_p(8, 2) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar_p(3, 3) == 1.0
    assert 0 < mcnemar_p(3000, 2700) < 1e-3


def test_wilsons_interval_is_the_textbooks() -> None:
    """9 of 10: 59.6 to 98.2 %."""
    assert wilson(90.0, 10) == pytest.approx((59.58, 98.21), abs=0.01)
    assert wilson(100.0, 10)[1] == pytest.approx(100.0) and wilson(0.0, 10)[0] == 0.0


def test_newcombes_interval_is_the_textbooks() -> None:
    """56 of 70 and 48 of 80: a difference of 20 points, 5.2 to 33.4 (Newcombe 1998, method 10)."""
    assert unpaired_interval(80.0, 70, 60.0, 80) == pytest.approx((5.24, 33.39), abs=0.02)
