"""Latency of several models, measured so that two of them can be compared.

The models take turns in slices of a second, so that a machine that warms up or slows down does so
for all of them. The first runs of every turn are thrown away.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

# What has just run another network starts with that one's data in its caches.
RUNS_AFTER_A_TURN = 5
_PERCENTS = (50, 90, 99)


@dataclass(frozen=True)
class BenchPlan:
    """How long to measure."""

    seconds: float = 10.0  # for each model
    warmup: float = 0.5
    turn: float = 1.0
    least_runs: int = 50


class TakesTurns(Protocol):
    """A model that can be timed."""

    @property
    def batch(self) -> int:
        """Images in one run."""
        ...

    def turn(self, length: float, timing: "Timing") -> None:
        """Throw `RUNS_AFTER_A_TURN` away, then note each run for `length` seconds."""
        ...


@dataclass(frozen=True)
class Timed:
    """A model whose runs wait for one another; `run` gives the milliseconds of one."""

    batch: int
    run: Callable[[], float]

    def turn(self, length: float, timing: "Timing") -> None:
        """Run it again and again."""
        for _ in range(RUNS_AFTER_A_TURN):
            self.run()
        began = time.perf_counter()
        while (passed := time.perf_counter() - began) < length:
            timing.milliseconds.append(self.run())
        timing.seconds += passed


@dataclass
class Timing:
    """What was measured of one model."""

    batch: int
    milliseconds: list[float] = field(default_factory=list)
    seconds: float = 0.0
    enqueue_ms: list[float] = field(default_factory=list)  # of the host, where it queues runs

    def percentiles(self) -> dict[str, float]:
        """As they stand in results.json."""
        return {f"p{p}": self.percentile(p) for p in _PERCENTS}

    def enqueue_percentiles(self) -> dict[str, float]:
        """What the host took to queue a run: where it is more than the GPU's, the GPU waits."""
        return {f"p{p}": float(np.percentile(self.enqueue_ms, p)) for p in _PERCENTS}

    def percentile(self, percent: float) -> float:
        """Milliseconds that `percent` of the runs did not exceed."""
        return float(np.percentile(self.milliseconds, percent))

    @property
    def throughput(self) -> float:
        """Images per second of all runs that were noted."""
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
                "latency_ms": timing.percentiles(),
                "throughput": timing.throughput,
                "before": self.before,
                "after": self.after,
            }
            for model, timing in self.timings.items()
        }


def measure(
    models: Mapping[str, TakesTurns],
    plan: BenchPlan,
    notify: Callable[[str], None],
    during: Callable[[str], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> dict[str, Timing]:
    """Time every model, in turns; `during` a model's turn something else may be watched."""
    timings = {name: Timing(model.batch) for name, model in models.items()}
    for name, model in models.items():
        notify(f"warming up {name}")
        model.turn(min(plan.warmup, plan.seconds), Timing(model.batch))
    while waiting := [
        name
        for name, timing in timings.items()
        if timing.seconds < plan.seconds or len(timing.milliseconds) < plan.least_runs
    ]:
        for name in waiting:
            notify(f"measuring {name}: {min(timings[name].seconds, plan.seconds):.0f} s")
            with during(name):
                models[name].turn(min(plan.turn, plan.seconds), timings[name])
    return timings


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
