"""The few CUDA calls that inference needs, through ctypes: a board has no cuda-python.

Every call is checked; a status other than 0 becomes a `NoGpuError` with CUDA's own words.
"""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from care_compress.device.problems import NoGpuError

# Values of CUDA's public C headers, part of its ABI.
TO_DEVICE = 1
TO_HOST = 2
_SCHEDULE_SPIN = 1
_NON_BLOCKING = 1
_CAPTURE_RELAXED = 2
_MAJOR_ATTRIBUTE = 75
_MINOR_ATTRIBUTE = 76
_ALREADY_ACTIVE = 708
_SET_ON_ACTIVE = 36
# cudaDeviceProp grew with every version (about 1 kB now); only its first field, the name, is read.
_PROPERTIES_BYTES = 1 << 16
_NAME_BYTES = 256

_POINTER_CALLS = (
    "cudaStreamSynchronize",
    "cudaStreamDestroy",
    "cudaEventDestroy",
    "cudaEventSynchronize",
    "cudaGraphDestroy",
    "cudaGraphExecDestroy",
    "cudaFree",
)


@dataclass(frozen=True)
class CudaGpu:
    """The GPU an engine is built for and runs on."""

    name: str
    compute_capability: str


class Cuda:
    """The CUDA runtime on device 0."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        for name in _POINTER_CALLS:
            getattr(runtime, name).argtypes = [ctypes.c_void_p]
        runtime.cudaMalloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        runtime.cudaMemcpyAsync.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_void_p,
        ]
        runtime.cudaEventRecord.argtypes = [ctypes.c_void_p] * 2
        runtime.cudaEventElapsedTime.argtypes = [ctypes.c_void_p] * 3
        runtime.cudaStreamBeginCapture.argtypes = [ctypes.c_void_p, ctypes.c_int]
        runtime.cudaStreamEndCapture.argtypes = [ctypes.c_void_p] * 2
        runtime.cudaGraphInstantiateWithFlags.argtypes = [
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_ulonglong,
        ]
        runtime.cudaGraphLaunch.argtypes = [ctypes.c_void_p] * 2
        # A waiting core that sleeps wakes up late, and the delay would be measured as latency.
        status = runtime.cudaSetDeviceFlags(_SCHEDULE_SPIN)
        if status not in (0, _SET_ON_ACTIVE, _ALREADY_ACTIVE):
            self._fail("cudaSetDeviceFlags", status)
        self._call("cudaSetDevice", 0)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._runtime, name)(*arguments)
        if status != 0:
            self._fail(name, status)

    def _fail(self, name: str, status: int) -> None:
        text = self._runtime.cudaGetErrorString(status).decode(errors="replace")
        raise NoGpuError(
            f"CUDA: {text} ({name}, error {status}).",
            "check that this machine has an NVIDIA GPU, that its driver is as new as CUDA, and that"
            " no other program fills its memory",
        )

    def gpu(self) -> CudaGpu:
        """Name and compute capability of the device."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        # CUDA 12 calls the present layout _v2, CUDA 11 and 13 have the plain name only.
        newer = hasattr(self._runtime, "cudaGetDeviceProperties_v2")
        self._call(
            "cudaGetDeviceProperties_v2" if newer else "cudaGetDeviceProperties", properties, 0
        )
        name = properties.raw[:_NAME_BYTES].split(b"\0", 1)[0].decode(errors="replace")
        major, minor = (self._attribute(which) for which in (_MAJOR_ATTRIBUTE, _MINOR_ATTRIBUTE))
        return CudaGpu(name=name, compute_capability=f"{major}.{minor}")

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), which, 0)
        return value.value

    def versions(self) -> dict[str, str]:
        """CUDA's version, of the runtime here and the newest the driver can serve."""
        found = {}
        for key, name in (
            ("runtime", "cudaRuntimeGetVersion"),
            ("driver", "cudaDriverGetVersion"),
        ):
            number = ctypes.c_int()
            self._call(name, ctypes.byref(number))
            found[key] = f"{number.value // 1000}.{number.value % 1000 // 10}"
        return found

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the device; give it back with `free`."""
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), size)
        return pointer.value or 0

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cudaFree", address)

    def copy(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        """Queue a copy; `kind` is TO_DEVICE or TO_HOST."""
        self._call("cudaMemcpyAsync", target, source, size, kind, stream)

    def upload(self, address: int, values: np.ndarray[Any, Any], stream: int) -> None:
        """Queue a copy of an array to the device; keep the array until the stream is through."""
        self.copy(address, values.ctypes.data, values.nbytes, TO_DEVICE, stream)

    def download(self, values: np.ndarray[Any, Any], address: int, stream: int) -> None:
        """Queue a copy from the device into an array."""
        self.copy(values.ctypes.data, address, values.nbytes, TO_HOST, stream)

    def new_stream(self) -> int:
        """A stream that does not wait for the default one (a graph cannot be captured on that)."""
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), _NON_BLOCKING)
        return stream.value or 0

    def wait(self, stream: int) -> None:
        """Return when everything queued is done."""
        self._call("cudaStreamSynchronize", stream)

    def drop_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def new_event(self) -> int:
        """An event that can be timed."""
        event = ctypes.c_void_p()
        self._call("cudaEventCreateWithFlags", ctypes.byref(event), 0)
        return event.value or 0

    def record(self, event: int, stream: int) -> None:
        """Queue the event."""
        self._call("cudaEventRecord", event, stream)

    def wait_event(self, event: int) -> None:
        """Return when the event has happened, spinning until then."""
        self._call("cudaEventSynchronize", event)

    def milliseconds(self, start: int, end: int) -> float:
        """Device time between two events that have happened."""
        value = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(value), start, end)
        return value.value

    def drop_event(self, event: int) -> None:
        """Destroy an event."""
        self._call("cudaEventDestroy", event)

    def begin_capture(self, stream: int) -> None:
        """Record what is queued from now on instead of running it."""
        self._call("cudaStreamBeginCapture", stream, _CAPTURE_RELAXED)

    def end_capture(self, stream: int) -> int:
        """Stop recording; the graph that can be launched."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        try:
            # The plain cudaGraphInstantiate takes five arguments in CUDA 11 and three in CUDA 12.
            self._call("cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)
        return executable.value or 0

    def launch(self, graph: int, stream: int) -> None:
        """Queue a captured graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def drop_graph(self, graph: int) -> None:
        """Destroy a captured graph."""
        self._call("cudaGraphExecDestroy", graph)


def load_cuda() -> Cuda:
    """The CUDA runtime of this machine, with its first GPU selected."""
    failure: NoGpuError | None = None
    for name in runtime_candidates():
        try:
            runtime = ctypes.CDLL(name)
        except OSError:
            continue
        try:
            return Cuda(runtime)
        except NoGpuError as error:
            # Where two versions are installed, the driver may be new enough for the older one.
            failure = failure or error
    raise failure or NoGpuError(
        "the CUDA runtime (libcudart) is not on this machine.",
        "on a Jetson 'sudo apt install nvidia-jetpack'; elsewhere install CUDA 12 or later",
    )


def runtime_candidates() -> Iterator[str]:
    """Where libcudart may be, the loader's own path first."""
    if os.name == "nt":
        names = ("cudart64_13.dll", "cudart64_12.dll", "cudart64_110.dll")
        yield from names
        folders = [Path(os.environ["CUDA_PATH"]) / "bin"] if "CUDA_PATH" in os.environ else []
    else:
        names = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")
        yield from names
        if found := ctypes.util.find_library("cudart"):
            yield found
        folders = [Path("/usr/local/cuda/lib64"), *sorted(Path("/usr/local").glob("cuda-*/lib64"))]
    # pip's tensorrt brings a CUDA runtime, in nvidia/cuda_runtime (12) or nvidia/cu13.
    for entry in sys.path:
        folders += sorted(Path(entry).glob("nvidia/*/lib")) + sorted(
            Path(entry).glob("nvidia/*/bin")
        )
    for folder in folders:
        yield from (str(folder / name) for name in names if (folder / name).is_file())
