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
_TO_DEVICE = 1
_TO_HOST = 2
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

# ctypes would cut a pointer that has no type to 32 bits.
_POINTER = ctypes.c_void_p
_ARGUMENTS: dict[str, list[Any]] = {
    "cudaFree": [_POINTER],
    "cudaMalloc": [_POINTER, ctypes.c_size_t],
    "cudaMemcpyAsync": [_POINTER, _POINTER, ctypes.c_size_t, ctypes.c_int, _POINTER],
    "cudaStreamSynchronize": [_POINTER],
    "cudaStreamDestroy": [_POINTER],
    "cudaStreamBeginCapture": [_POINTER, ctypes.c_int],
    "cudaStreamEndCapture": [_POINTER, _POINTER],
    "cudaEventRecord": [_POINTER, _POINTER],
    "cudaEventSynchronize": [_POINTER],
    "cudaEventElapsedTime": [_POINTER, _POINTER, _POINTER],
    "cudaEventDestroy": [_POINTER],
    "cudaGraphInstantiateWithFlags": [_POINTER, _POINTER, ctypes.c_ulonglong],
    "cudaGraphLaunch": [_POINTER, _POINTER],
    "cudaGraphDestroy": [_POINTER],
    "cudaGraphExecDestroy": [_POINTER],
}


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
        for name, types in _ARGUMENTS.items():
            getattr(runtime, name).argtypes = types
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

    def _number(self, name: str, *arguments: Any) -> int:
        value = ctypes.c_int()
        self._call(name, ctypes.byref(value), *arguments)
        return value.value

    def _handle(self, name: str, *arguments: Any) -> int:
        """The address that a call gives back through its first argument."""
        pointer = ctypes.c_void_p()
        self._call(name, ctypes.byref(pointer), *arguments)
        return pointer.value or 0

    def gpu(self) -> CudaGpu:
        """Name and compute capability of the device."""
        properties = ctypes.create_string_buffer(_PROPERTIES_BYTES)
        # CUDA 12 calls the present layout _v2, CUDA 11 and 13 have the plain name only.
        newer = hasattr(self._runtime, "cudaGetDeviceProperties_v2")
        self._call(
            "cudaGetDeviceProperties_v2" if newer else "cudaGetDeviceProperties", properties, 0
        )
        name = properties.raw[:_NAME_BYTES].split(b"\0", 1)[0].decode(errors="replace")
        major, minor = (
            self._number("cudaDeviceGetAttribute", which, 0)
            for which in (_MAJOR_ATTRIBUTE, _MINOR_ATTRIBUTE)
        )
        return CudaGpu(name=name, compute_capability=f"{major}.{minor}")

    def versions(self) -> dict[str, str]:
        """CUDA's version, of the runtime here and the newest the driver can serve."""
        calls = {"runtime": "cudaRuntimeGetVersion", "driver": "cudaDriverGetVersion"}
        numbers = {key: self._number(name) for key, name in calls.items()}
        return {key: f"{n // 1000}.{n % 1000 // 10}" for key, n in numbers.items()}

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the device; give it back with `free`."""
        return self._handle("cudaMalloc", size)

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cudaFree", address)

    def upload(self, address: int, values: np.ndarray[Any, Any], stream: int) -> None:
        """Queue a copy of an array to the device; keep the array until the stream is through."""
        source, size = values.ctypes.data, values.nbytes
        self._call("cudaMemcpyAsync", address, source, size, _TO_DEVICE, stream)

    def download(self, values: np.ndarray[Any, Any], address: int, stream: int) -> None:
        """Queue a copy from the device into an array."""
        target, size = values.ctypes.data, values.nbytes
        self._call("cudaMemcpyAsync", target, address, size, _TO_HOST, stream)

    def new_stream(self) -> int:
        """A stream that does not wait for the default one (a graph cannot be captured on that)."""
        return self._handle("cudaStreamCreateWithFlags", _NON_BLOCKING)

    def wait(self, stream: int) -> None:
        """Return when everything queued is done."""
        self._call("cudaStreamSynchronize", stream)

    def drop_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", stream)

    def new_event(self) -> int:
        """An event that can be timed."""
        return self._handle("cudaEventCreateWithFlags", 0)

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
        graph = ctypes.c_void_p()
        self._call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        try:
            # The plain cudaGraphInstantiate takes five arguments in CUDA 11 and three in CUDA 12.
            return self._handle("cudaGraphInstantiateWithFlags", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

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
