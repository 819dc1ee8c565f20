"""TensorRT, whichever one is installed: `tensorrt` 10.3 to 11, or `tensorrt_rtx`.

Versions differ in what they have, so everything that is not in all of them is asked for by name,
and no number of an enum is written down here: they changed between versions.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from care_compress.device.kernels import LISTING
from care_compress.device.manifest import required_module, version_numbers
from care_compress.device.problems import TensorRtMissingError

OLDEST_TENSORRT = (10, 3)

_INSTALL = {
    "tensorrt": "on a Jetson 'sudo apt install python3-libnvinfer' and use /usr/bin/python3 "
    "(a virtual environment needs --system-site-packages); elsewhere 'pip install tensorrt'",
    "tensorrt_rtx": "'pip install tensorrt-rtx'",
}


@dataclass(frozen=True)
class Library:
    """An imported TensorRT and what its version means."""

    module: Any
    name: str
    version: tuple[int, ...]

    @property
    def text(self) -> str:
        """The version as the library writes it; engines move between no two of these."""
        return str(self.module.__version__)

    @property
    def is_rtx(self) -> bool:
        """TensorRT for RTX: builds without a GPU and compiles for it when loading."""
        return self.name == "tensorrt_rtx"

    @property
    def network_flags(self) -> int:
        """What a network is created with: strong typing, wherever it can be asked for.

        10.3 of JetPack 6 has the flag, although one page of its makers says "from 10.12".
        """
        flag = self.member("NetworkDefinitionCreationFlag", "STRONGLY_TYPED")
        return 0 if flag is None else 1 << int(flag)

    @property
    def is_weakly_typed(self) -> bool:
        """Whether the graph's types are a permission here, which the builder need not use.

        Not in 11, where no flag permits a type: its networks know strong typing only.
        """
        return not self.network_flags and self.member("BuilderFlag", "FP16") is not None

    def member(self, enum: str, name: str) -> Any | None:
        """``module.enum.name``, or None where this version has no such thing."""
        return getattr(getattr(self.module, enum, None), name, None)


def load_library(name: str = "tensorrt") -> Library:
    """Import `tensorrt` or `tensorrt_rtx`."""
    if name not in _INSTALL:  # it may come from a file, and importing a module runs it
        raise TensorRtMissingError(f"{name!r:.60} is no TensorRT.", "build the engine again")
    try:
        module = importlib.import_module(name)
        version = str(module.__version__)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        # An OSError or RuntimeError is the package whose own libraries are missing.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TensorRtMissingError(
            f"{name} cannot be imported ({reason}).", _INSTALL[name]
        ) from error
    return wrap_library(module, name, version)


def wrap_library(module: Any, name: str, version: str) -> Library:
    """Put an imported module into a `Library`, refusing versions older than we support."""
    library = Library(module, name, version_numbers(version))
    if not library.is_rtx and library.version < OLDEST_TENSORRT:
        raise TensorRtMissingError(
            f"TensorRT {version} is too old.",
            "install TensorRT 10.3 or later (JetPack 6.1 has it)",
        )
    return library


def required_library(requirement: str) -> str:
    """The module that ``tensorrt>=10.3`` or ``tensorrt-rtx>=1.7`` names."""
    name = required_module(requirement)
    if name not in _INSTALL:
        raise TensorRtMissingError(
            f"{requirement!r} names no library this program knows.",
            "export the bundle again for a TensorRT target",
        )
    return name


class Log:
    """What TensorRT said: warnings to pass on, the reason of the last failure, the kernels."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.listing = ""  # of the finished engine (`care_compress.device.kernels`)
        self._errors: list[str] = []

    def add(self, severity: str, text: str) -> None:
        """Take one message; the same warning comes once for each layer and is kept once."""
        if severity in ("ERROR", "INTERNAL_ERROR"):
            self._errors.append(text.strip())
        elif severity == "WARNING" and text.strip() not in self.warnings:
            self.warnings.append(text.strip())
        elif text.startswith(LISTING):
            self.listing = text

    def reason(self) -> str:
        """The first error since the last call: those after it are usually its consequences."""
        first = self._errors[0] if self._errors else "TensorRT gave no reason"
        self._errors.clear()
        return " ".join(first.split())


def make_logger(library: Library, log: Log) -> Any:
    """A logger object of this TensorRT that fills `log` and keeps the terminal quiet."""
    base = library.module.ILogger
    # The base class is known only after the import, so the class cannot be written out.
    methods: dict[str, Callable[..., None]] = {
        "__init__": lambda self: base.__init__(self),
        "log": lambda self, severity, text: log.add(severity.name, text),
    }
    return type("CareLogger", (base,), methods)()


def make_profiler(library: Library, sums: dict[str, float]) -> Any:
    """A profiler object of this TensorRT that adds each layer's milliseconds to `sums`."""
    base = library.module.IProfiler

    def report(profiler: Any, layer: str, milliseconds: float) -> None:
        sums[layer] = sums.get(layer, 0.0) + milliseconds

    methods: dict[str, Callable[..., None]] = {
        "__init__": lambda self: base.__init__(self),
        "report_layer_time": report,
    }
    return type("CareProfiler", (base,), methods)()


def open_runtime(library: Library, logger: Any) -> Any:
    """A runtime that may load our engines, version-compatible ones included."""
    runtime = library.module.Runtime(logger)
    # Those carry a small runtime of their own, which is code; we load only engines whose digest is
    # the one their builder wrote down.
    runtime.engine_host_code_allowed = True
    return runtime
