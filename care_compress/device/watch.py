"""The state of a board while models are timed, read by a thread beside them.

Clocks fall and temperatures rise with the load, and both are back a moment after it: what is read
before and after says nothing about the time between.
"""

import contextlib
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from care_compress.device.power import Rail, read_watts
from care_compress.device.sensors import (
    read_cpu_clock,
    read_gpu_clock,
    read_temperatures,
    read_throttles,
)

EVERY = 0.1  # seconds: some ten moments in each turn, at no cost for what is timed
IDLE = ""  # stands for no model


@dataclass(frozen=True)
class Moment:
    """What was read at once."""

    gpu_mhz: float | None
    cpu_mhz: float | None
    temperatures_c: dict[str, float]
    throttles: tuple[str, ...]
    watts: float | None


def read_moment(root: Path, rails: Sequence[Rail]) -> Moment:
    """Read the sensors of a machine."""
    return Moment(
        gpu_mhz=read_gpu_clock(root),
        cpu_mhz=read_cpu_clock(root),
        temperatures_c=read_temperatures(root),
        throttles=read_throttles(root),
        watts=read_watts(rails),
    )


class Watch:
    """Collects moments of each model's turns; use it in a ``with``, which ends its thread."""

    def __init__(self, read: Callable[[], Moment], every: float = EVERY) -> None:
        self.moments: dict[str, list[Moment]] = {}
        self._read, self._every = read, every
        self._running: str | None = None
        self._wanted, self._ended = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._collect, daemon=True)

    @contextlib.contextmanager
    def during(self, model: str) -> Iterator[None]:
        """What is read inside belongs to `model`; at least one moment is."""
        before = len(self.moments.setdefault(model, []))
        self._running = model
        self._wanted.set()
        try:
            yield
            if len(self.moments[model]) == before:
                self._keep(model, self._read())
        finally:
            self._wanted.clear()
            with self._lock:
                self._running = None

    def _collect(self) -> None:
        while not self._ended.is_set():
            if not self._wanted.wait(self._every):
                continue
            model = self._running
            moment = self._read()
            with self._lock:
                # Not what was read while one turn ended and another began.
                if model is not None and model == self._running:
                    self._keep(model, moment)
            self._ended.wait(self._every)

    def _keep(self, model: str, moment: Moment) -> None:
        self.moments[model].append(moment)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()


def summarize(moments: Sequence[Moment]) -> dict[str, Any]:
    """Ranges of the clocks, the highest temperature of each zone, and whatever throttled."""
    zones: dict[str, float] = {}
    for moment in moments:
        for zone, degrees in moment.temperatures_c.items():
            zones[zone] = max(degrees, zones.get(zone, degrees))
    return {
        "moments": len(moments),
        "gpu_mhz": _range([moment.gpu_mhz for moment in moments]),
        "cpu_mhz": _range([moment.cpu_mhz for moment in moments]),
        "temperatures_c": zones,
        "throttled": sorted({name for moment in moments for name in moment.throttles}),
    }


def mean_watts(moments: Sequence[Moment]) -> float | None:
    """Mean power; None where no moment has it."""
    known = [moment.watts for moment in moments if moment.watts is not None]
    return statistics.fmean(known) if known else None


def _range(values: Sequence[float | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"least": min(known), "median": statistics.median(known), "most": max(known)}
