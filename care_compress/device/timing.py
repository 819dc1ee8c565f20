"""Latency of several models, measured so that two of them can be compared.

The models take turns in slices of a second, so that a machine that warms up or slows down does so
for all of them. Inputs are already where they are read; the first runs of every turn are thrown
away.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# What has just run another network starts with that one's data in its caches.
_RUNS_AFTER_A_TURN = 5


@dataclass(frozen=True)
class BenchPlan:
    """How long to measure."""

    seconds: float = 10.0  # for each model
    warmup: float = 0.5
    turn: float = 1.0
    least_runs: int = 50


@dataclass(frozen=True)
class Timed:
    """A model that can be run again and again; `run` gives the milliseconds of one run."""

    batch: int
    run: Callable[[], float]


@dataclass
class Timing:
    """What was measured of one model."""

    batch: int
    milliseconds: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def percentile(self, percent: float) -> float:
        """Milliseconds that `percent` of the runs did not exceed."""
        return float(np.percentile(self.milliseconds, percent))

    @property
    def throughput(self) -> float:
        """Images per second, one batch after the other."""
        return len(self.milliseconds) * self.batch / self.seconds


@dataclass(frozen=True)
class Measured:
    """Timings, and how the machine was before and after them."""

    timings: dict[str, Timing]
    before: dict[str, Any]
    after: dict[str, Any]

    def as_records(self, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The measurements as they stand in results.json, with the settings they were made in."""
        return {
            model: {
                "batch": timing.batch,
                **settings,
                "runs": len(timing.milliseconds),
                "seconds": round(timing.seconds, 3),
                "latency_ms": {f"p{p}": timing.percentile(p) for p in (50, 90, 99)},
                "throughput": timing.throughput,
                "before": self.before,
                "after": self.after,
            }
            for model, timing in self.timings.items()
        }


def measure(
    models: Mapping[str, Timed], plan: BenchPlan, notify: Callable[[str], None]
) -> dict[str, Timing]:
    """Time every model, in turns."""
    timings = {name: Timing(model.batch) for name, model in models.items()}
    for name, model in models.items():
        notify(f"warming up {name}")
        _turn(model, plan.warmup, Timing(model.batch))
    while waiting := [
        name
        for name, timing in timings.items()
        if timing.seconds < plan.seconds or len(timing.milliseconds) < plan.least_runs
    ]:
        for name in waiting:
            notify(f"measuring {name}: {min(timings[name].seconds, plan.seconds):.0f} s")
            for _ in range(_RUNS_AFTER_A_TURN):
                models[name].run()
            _turn(models[name], min(plan.turn, plan.seconds), timings[name])
    return timings


def _turn(model: Timed, length: float, timing: Timing) -> None:
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < length:
        timing.milliseconds.append(model.run())
    timing.seconds += passed


def verdict(timings: Mapping[str, Timing], model: str, plain: str, fallback: str) -> str:
    """A quantized model against the float one in one sentence; empty if there are not both."""
    if not {model, plain} <= timings.keys():
        return ""
    ratio = timings[plain].percentile(50) / timings[model].percentile(50)
    names = model.upper(), plain.upper()
    # The medians of two measurements of one model differ by about as much.
    if abs(ratio - 1) < 0.03:
        return (
            f"{names[0]} and {names[1]} are equally fast (ratio {ratio:.2f}): choose by accuracy"
            " and size."
        )
    if ratio > 1:
        return f"{names[0]} is {ratio:.2f} times as fast as {names[1]}."
    return f"{names[0]} is slower than {names[1]} (ratio {ratio:.2f}): {fallback}."
