"""Latency of several models, measured so that they can be compared: in turns, on one machine.

Models take turns of a few runs each, so that whatever else the machine does hits all of them; a
ratio is the median over turns of paired ratios, with its interval. Absolute figures are this
machine's, now.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from care_compress.evaluate.significance import ratio_interval

NOISY = 0.25  # spread of one model's turns, quartile to quartile over median, that says too little


@dataclass(frozen=True)
class LatencyPlan:
    """How long to measure each model."""

    seconds: float = 1.5
    least_runs: int = 50
    warmup: int = 10
    turns: int = 15


@dataclass(frozen=True)
class Latency:
    """Runs of one model, turn by turn."""

    turns: tuple[NDArray[np.float64], ...]  # milliseconds
    batch: int

    @property
    def milliseconds(self) -> NDArray[np.float64]:
        """Every run."""
        return np.concatenate(self.turns)

    @property
    def medians(self) -> NDArray[np.float64]:
        """One figure for each turn."""
        return np.array([np.median(turn) for turn in self.turns])

    @property
    def throughput(self) -> float:
        """Images per second, one batch after the other."""
        return 1000 * self.batch / float(self.milliseconds.mean())

    @property
    def is_noisy(self) -> bool:
        """Whether the turns differ too much to say anything fine."""
        low, high = np.percentile(self.medians, [25, 75])
        return bool((high - low) > NOISY * np.median(self.medians))

    def percentiles(self) -> dict[str, float]:
        """p50, p90 and p99 in milliseconds."""
        return {f"p{p}": float(np.percentile(self.milliseconds, p)) for p in (50, 90, 99)}

    def speedup_over(self, other: "Latency") -> tuple[float, float, float]:
        """How many times faster than `other`, with the 95 % interval."""
        return ratio_interval(other.medians, self.medians)


def measure_latency(
    runs: Mapping[str, Callable[[], object]], batch: int, plan: LatencyPlan
) -> dict[str, Latency]:
    """Time every model in turns."""
    per_turn = {name: _runs_in_a_turn(run, plan) for name, run in runs.items()}
    turns: dict[str, list[NDArray[np.float64]]] = {name: [] for name in runs}
    for _ in range(plan.turns):
        for name, run in runs.items():
            run()  # another model's weights are in the caches
            turns[name].append(_timed(run, per_turn[name]))
    return {name: Latency(tuple(found), batch) for name, found in turns.items()}


def _runs_in_a_turn(run: Callable[[], object], plan: LatencyPlan) -> int:
    for _ in range(plan.warmup):
        run()
    once = float(np.median(_timed(run, 3))) / 1000
    wanted = max(plan.least_runs, min(int(plan.seconds / max(once, 1e-6)), 20 * plan.least_runs))
    return -(-wanted // plan.turns)


def _timed(run: Callable[[], object], count: int) -> NDArray[np.float64]:
    found = np.empty(count)
    for place in range(count):
        began = time.perf_counter()
        run()
        found[place] = 1000 * (time.perf_counter() - began)
    return found
