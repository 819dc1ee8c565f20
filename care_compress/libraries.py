"""OpenVINO and NNCF, Ray and Optuna, loaded only when a recipe, a file or a sweep asks for them.

They are optional extras, and importing them takes seconds. And how every run sets the libraries
below torch.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from care_compress.errors import TargetError
from care_compress.shipped import install_command

REPORTER = "openvino_telemetry"
# glibc's names of settings in mallopt.h, and their values: the largest block that is taken from
# what was freed before (more it does not allow), and how much of that is kept.
_MALLOPT = ((-3, 32 << 20), (-1, (1 << 31) - 1))


def settle_libraries() -> None:
    """Set what OpenMP and glibc read when torch loads; what the user set stays.

    OpenMP's threads wait by spinning for milliseconds, and hold the cores that decoding workers
    need. glibc gives freed memory back, and the system clears it anew for every batch: half of the
    time in which builtin:shapes is drawn (both measured in LOG.md).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let this process use freed memory again, and no other program that it starts."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and not any(name.startswith("MALLOC_") for name in os.environ):
        for setting, value in _MALLOPT:
            mallopt(setting, value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the warnings of exporting and copying graphs: no user can change those internals."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Be `quiet` about libraries that also draw progress bars of their own on standard output."""
    with quiet(), contextlib.redirect_stdout(io.StringIO()):
        yield


def load_openvino() -> Any:
    """The `openvino` module."""
    return _load("openvino")


@functools.cache
def openvino_core() -> Any:
    """The one `Core` of this process; it stays until the process ends.

    The CPU plugin of every Core gives the process a stack for signal handlers, and frees it when it
    goes. Of two that go in the order they came, the second puts the first one's freed stack back,
    and the next handled signal, such as the end of a decoding worker, kills the process (LOG.md).
    """
    core = load_openvino().Core()
    core.get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin
    return core


class _SignalStack(ctypes.Structure):
    _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextlib.contextmanager
def signal_stack_kept() -> Iterator[None]:
    """Keep the stack over code that makes Cores of its own, as NNCF does; see `openvino_core`."""
    openvino_core()
    if sys.platform != "linux":
        yield
        return
    system, before = ctypes.CDLL(None), _SignalStack()
    system.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        gc.collect()  # Cores that go now, not after the stack was put back
        system.sigaltstack(ctypes.byref(before), None)


def load_nncf() -> Any:
    """The `nncf` module."""
    load_openvino()
    return _load("nncf")


def load_ray() -> Any:
    """The `ray` module; it sends no reports of its use unless its user said so."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    return _load("ray", "ray")


def load_optuna() -> Any:
    """The `optuna` module."""
    return _load("optuna", "ray")


def _load(name: str, extra: str = "openvino") -> Any:
    """Import an optional module, without the reports of its use.

    OpenVINO and NNCF send usage to a statistics server from their import on, unasked; without it
    they run.
    """
    reports = REPORTER in sys.modules
    if not reports:
        sys.modules[REPORTER] = None  # type: ignore[assignment]  # importing it now fails
    try:
        with silent():
            return importlib.import_module(name)
    except ImportError as error:
        raise TargetError(f"{name} is not installed here.", install_command(extra)) from error
    finally:
        if not reports:
            del sys.modules[REPORTER]
