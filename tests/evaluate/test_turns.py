"""Timing by a clock that stands still but for the runs themselves."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from care_compress.evaluate import latency
from care_compress.evaluate.latency import Latency, LatencyPlan, Setting, measure_latency


@pytest.fixture
def takes(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Callable[[], None]]:
    """A run that lasts so many milliseconds."""
    now = 0.0
    monkeypatch.setattr(latency, "time", SimpleNamespace(perf_counter=lambda: now))

    def of(milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            nonlocal now
            now += milliseconds / 1000

        return run

    return of


def test_a_run_is_told_in_milliseconds(takes: Callable[[float], Callable[[], None]]) -> None:
    plan = LatencyPlan(seconds=0.0, least_runs=10, warmup=2, turns=3)
    found = measure_latency({"slow": takes(8.0), "fast": takes(2.0)}, 4, plan)
    assert found["slow"].percentiles() == pytest.approx({"p50": 8.0, "p90": 8.0, "p99": 8.0})
    assert found["fast"].throughput == pytest.approx(2000)
    assert found["fast"].speedup_over(found["slow"])[0] == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("milliseconds", "least", "most"),
    [
        (100.0, 10, 12),  # never fewer than asked, in whole turns
        (1.0, 60, 62),  # 60 of them last as long as asked
        (0.01, 200, 202),  # 20 times the least is enough
    ],
)
def test_runs_divide_among_the_turns_and_last_as_long_as_asked(
    takes: Callable[[float], Callable[[], None]], milliseconds: float, least: int, most: int
) -> None:
    plan = LatencyPlan(seconds=0.0601, least_runs=10, warmup=1, turns=3)
    found = measure_latency({"one": takes(milliseconds)}, 1, plan)["one"]
    assert least <= len(found.milliseconds) <= most and len(found.turns) == 3


@pytest.mark.parametrize(
    ("slow", "noisy"), [([1.2] * 30, False), ([1.3] * 30, True), ([1.3] * 5, False)]
)
def test_a_file_with_many_slow_runs_is_noisy(slow: list[float], noisy: bool) -> None:
    """A tenth of the runs at most may take a quarter longer than the middle."""
    runs = np.array([1.0] * (100 - len(slow)) + slow)
    quiet = Setting(1, 1, 0.5, Latency(tuple(np.split(np.sort(runs).reshape(10, 10).T, 10)), 1))
    assert not quiet.latency.is_noisy, "its turns are alike"
    assert quiet.is_noisy is noisy
    told = quiet.as_json()
    assert told["seconds"] == pytest.approx(runs.sum() / 1000) and told["noisy"] is noisy
