"""Runs of an engine, timed as trtexec does: one is always queued while another one runs.

Were the stream empty when a run is queued, the time until its first kernel is launched would count
as time of the GPU. So each run's events lie between those of two others, and what the device counts
between them are its kernels alone.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from care_compress.device.cuda import Cuda
from care_compress.device.session import Session
from care_compress.device.timing import RUNS_AFTER_A_TURN, Timing

# trtexec has two inference slots: one runs, one waits.
_SLOTS = 2


@dataclass(frozen=True)
class QueuedRuns:
    """One engine and an event at the start and the end of each slot."""

    session: Session
    cuda: Cuda
    events: tuple[tuple[int, int], ...]

    @property
    def batch(self) -> int:
        """Images in one run."""
        return self.session.batch

    def turn(self, length: float, timing: Timing) -> None:
        """Run for `length` seconds, from the end of one run to the end of another."""
        queued = 0

        def queue() -> float:
            nonlocal queued
            start, end = self.events[queued % _SLOTS]
            queued += 1
            return self.session.queue_between(start, end)

        host_ms = [queue()]
        finished, began, passed = 0, time.perf_counter(), 0.0
        while passed < length:
            host_ms.append(queue())
            start, end = self.events[finished % _SLOTS]
            self.cuda.wait_event(end)
            milliseconds = self.cuda.milliseconds(start, end)
            finished += 1
            if finished <= RUNS_AFTER_A_TURN:
                began = time.perf_counter()
                continue
            passed = time.perf_counter() - began
            timing.milliseconds.append(milliseconds)
            timing.enqueue_ms.append(host_ms[finished - 1])
        timing.seconds += passed
        # Of the run that is still queued nothing counts.
        self.cuda.wait_event(self.events[finished % _SLOTS][1])


@contextlib.contextmanager
def queued_runs(sessions: Mapping[str, Session], cuda: Cuda) -> Iterator["dict[str, QueuedRuns]"]:
    """What `measure` times of some engines; the events are given back at the end."""
    with contextlib.ExitStack() as stack:

        def new_event() -> int:
            event = cuda.new_event()
            stack.callback(cuda.drop_event, event)
            return event

        events = tuple((new_event(), new_event()) for _ in range(_SLOTS))
        yield {name: QueuedRuns(session, cuda, events) for name, session in sessions.items()}
