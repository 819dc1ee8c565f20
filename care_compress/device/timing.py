"""Latency of engines, measured so that two of them can be compared.

The engines take turns in slices of a second, so that a board that warms up or slows down does so
for all of them. Each run is timed on the device from its start to its end, inputs already there;
the processor spins while it waits; the first runs are thrown away.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from care_compress.device.cuda import Cuda
from care_compress.device.session import Session

# A GPU that has just run another network starts with that one's data in its caches.
_RUNS_AFTER_A_TURN = 5


@dataclass(frozen=True)
class BenchPlan:
    """How long to measure."""

    seconds: float = 10.0  # for each engine
    warmup: float = 0.5
    turn: float = 1.0
    least_runs: int = 50
    cuda_graph: bool = True


@dataclass
class Timing:
    """What was measured of one engine."""

    batch: int
    cuda_graph: bool
    milliseconds: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def percentile(self, percent: float) -> float:
        """Milliseconds that `percent` of the runs did not exceed."""
        return float(np.percentile(self.milliseconds, percent))

    @property
    def throughput(self) -> float:
        """Images per second, one batch after the other."""
        return len(self.milliseconds) * self.batch / self.seconds


def measure(
    cuda: Cuda,
    sessions: Mapping[str, Session],
    plan: BenchPlan,
    notify: Callable[[str], None],
) -> dict[str, Timing]:
    """Time every engine, in turns."""
    timings = {}
    for name, session in sessions.items():
        if plan.cuda_graph:
            session.capture()
        timings[name] = Timing(session.batch, plan.cuda_graph)
    start, end = cuda.new_event(), cuda.new_event()
    try:
        for name, session in sessions.items():
            notify(f"warming up {name}")
            _turn(cuda, session, (start, end), plan.warmup, Timing(1, False))
        while waiting := [name for name in sessions if not _is_done(timings[name], plan)]:
            for name in waiting:
                notify(f"measuring {name}: {min(timings[name].seconds, plan.seconds):.0f} s")
                for _ in range(_RUNS_AFTER_A_TURN):
                    sessions[name].enqueue()
                cuda.wait(sessions[name].stream)
                length = min(plan.turn, plan.seconds)
                _turn(cuda, sessions[name], (start, end), length, timings[name])
    finally:
        cuda.drop_event(start)
        cuda.drop_event(end)
    return timings


def _is_done(timing: Timing, plan: BenchPlan) -> bool:
    return timing.seconds >= plan.seconds and len(timing.milliseconds) >= plan.least_runs


def _turn(
    cuda: Cuda, session: Session, events: tuple[int, int], length: float, timing: Timing
) -> None:
    start, end = events
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < length:
        cuda.record(start, session.stream)
        session.enqueue()
        cuda.record(end, session.stream)
        cuda.wait_event(end)
        timing.milliseconds.append(cuda.milliseconds(start, end))
    timing.seconds += passed


def verdict(timings: Mapping[str, Timing]) -> str:
    """INT8 against FP16 in one sentence, empty if there are not both."""
    if not {"int8", "fp16"} <= timings.keys():
        return ""
    ratio = timings["fp16"].percentile(50) / timings["int8"].percentile(50)
    # The medians of two measurements of one engine differ by about as much.
    if abs(ratio - 1) < 0.03:
        return f"INT8 and FP16 are equally fast (ratio {ratio:.2f}): choose by accuracy and size."
    if ratio > 1:
        return f"INT8 is {ratio:.2f} times as fast as FP16."
    return f"INT8 is slower than FP16 (ratio {ratio:.2f}): use fp16.engine on this board."
