"""What TensorRT's builder is doing, passed on while it does it."""

from collections.abc import Callable
from typing import Any

from care_compress.device.library import Library

# A phase, and the part of it that is done (None: not known).
Notify = Callable[[str, float | None], None]


class BuildMonitor:
    """Passes phases on; an interruption waits here until TensorRT has unwound."""

    def __init__(self, notify: Notify) -> None:
        self.interruption: BaseException | None = None
        self._notify = notify
        self._steps: dict[str, int] = {}

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """A phase begins; those inside another one are too many to show."""
        if parent is None:
            self._steps[phase] = steps
            self._tell(phase, 0.0)

    def step(self, phase: str, step: int) -> bool:
        """A step is done; False asks TensorRT to stop."""
        if phase in self._steps:
            self._tell(phase, (step + 1) / max(1, self._steps[phase]))
        return self.interruption is None

    def _tell(self, phase: str, done: float) -> None:
        # An exception cannot cross TensorRT; Ctrl-C would be printed and the build go on.
        try:
            self._notify(phase, done)
        except BaseException as error:
            self.interruption = error


def watch_build(library: Library, config: Any, notify: Notify) -> BuildMonitor:
    """Report progress, where this version can and lets it be set."""
    monitor = BuildMonitor(notify)
    base = getattr(library.module, "IProgressMonitor", None)
    if base is None or not hasattr(config, "progress_monitor"):
        return monitor

    def start(self: Any) -> None:
        base.__init__(self)

    def phase_start(self: Any, phase: str, parent: str | None, steps: int) -> None:
        monitor.start(phase, parent, steps)

    def phase_finish(self: Any, phase: str) -> None:
        """Nothing: the next phase says it."""

    def step_complete(self: Any, phase: str, step: int) -> bool:
        return monitor.step(phase, step)

    # As with the logger, the base class is known only now.
    methods = {
        "__init__": start,
        "phase_start": phase_start,
        "phase_finish": phase_finish,
        "step_complete": step_complete,
    }
    config.progress_monitor = type("CareProgress", (base,), methods)()
    return monitor
