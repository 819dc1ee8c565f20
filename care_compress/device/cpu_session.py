"""A file of a CPU bundle, opened in ONNX Runtime or OpenVINO and ready to run.

Files run as they are. A file with a free batch takes one image at a time here.
"""

import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from care_compress.device.images import FloatArray
from care_compress.device.manifest import required_module, satisfies, version_numbers
from care_compress.device.problems import ModelError, RuntimeMissingError

LIBRARIES = ("onnxruntime", "openvino")
# It sends usage to a statistics server from its import on, unasked.
_REPORTER = "openvino_telemetry"


@dataclass(frozen=True)
class CpuRuntime:
    """An imported runtime; `core` is OpenVINO's, one for a process."""

    module: Any
    name: str
    version: str
    core: Any = None

    @property
    def floats_in(self) -> str:
        """What the operations left unquantized run in.

        bfloat16 where a CPU has it, as OpenVINO does unasked. Never float16, which OpenVINO takes
        on Arm: it holds neither exp(t) of attention nor the 1e-6 that guards its division.
        """
        if self.core is None:
            return "f32"
        able = self.core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return "bf16" if "BF16" in able else "f32"


def load_cpu_runtime(requirement: str) -> CpuRuntime:
    """Import the runtime that a bundle requires, in a version it allows."""
    name = required_module(requirement)
    if name not in LIBRARIES:  # it comes from a file, and importing a module runs it
        raise RuntimeMissingError(f"{name!r:.60} is no runtime.", "unpack the bundle again")
    install = f"python3 -m pip install '{requirement}'"
    try:
        sys.modules.setdefault(_REPORTER, None)  # type: ignore[arg-type]  # importing it now fails
        module = importlib.import_module(name)
        version = str(module.__version__).partition("-")[0]
        core = module.Core() if name == "openvino" else None
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        # An OSError or RuntimeError is the package whose own libraries are missing.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RuntimeMissingError(f"{name} cannot be imported ({reason}).", install) from error
    if not satisfies(version_numbers(version), requirement):
        raise RuntimeMissingError(
            f"here is {name} {version}; this bundle needs {requirement}.", install
        )
    return CpuRuntime(module, name, version, core)


class CpuSession:
    """One opened file; `compute` takes what lies in `images` and gives the output."""

    def __init__(
        self, path: Path, images: "np.ndarray[Any, Any]", compute: Callable[[], FloatArray]
    ) -> None:
        self._path, self._images, self._compute = path, images, compute
        self.run(images[:1])  # a file that loads may still not run

    @property
    def takes_bytes(self) -> bool:
        """Whether images are pixels (N, H, W, 3) in uint8, and not normalized."""
        return bool(self._images.dtype == np.uint8)

    @property
    def batch(self) -> int:
        """Images in one run."""
        return len(self._images)

    def run(self, images_NCHW: FloatArray) -> FloatArray:
        """Outputs (N, ...) of any number of images.

        The rest of the last batch is whatever was there before; images do not see each other.
        """
        if images_NCHW.shape[1:] != self._images.shape[1:]:
            raise ModelError(
                f"{self._path.name} takes images of {self._images.shape[1:]}, not"
                f" {images_NCHW.shape[1:]}.",
                "use the samples and the resolution of this bundle",
            )
        results = []
        for first in range(0, len(images_NCHW), self.batch):
            part = images_NCHW[first : first + self.batch]
            self._images[: len(part)] = part
            try:
                output = self._compute()
            except Exception as error:  # ONNX Runtime has one for each status, OpenVINO only one
                raise _failed(self._path, "run", error) from error
            results.append(np.array(output[: len(part)], dtype=np.float32))
        return np.concatenate(results)

    def timed_run(self) -> float:
        """Milliseconds of one run on the images that were run last."""
        began = time.perf_counter()
        self._compute()
        return 1000 * (time.perf_counter() - began)


def open_file(
    runtime: CpuRuntime, path: Path, shape: "tuple[int | str, ...]", threads: int
) -> CpuSession:
    """Open a file for a batch of its own, or of one image where it leaves the batch open."""
    sizes = [size if isinstance(size, int) else 1 for size in shape]
    try:
        if runtime.name == "openvino":
            settings = {
                "INFERENCE_NUM_THREADS": threads,
                "INFERENCE_PRECISION_HINT": runtime.floats_in,
                "PERFORMANCE_HINT": "LATENCY",
            }
            model = runtime.core.read_model(str(path))
            model.reshape(sizes)
            kind = np.uint8 if model.input(0).element_type.to_string() == "u8" else np.float32
            images = np.zeros(sizes, dtype=kind)
            request = runtime.core.compile_model(model, "CPU", settings).create_infer_request()
            request.set_input_tensor(runtime.module.Tensor(images, shared_memory=True))

            def compute() -> FloatArray:
                request.infer()
                return request.get_output_tensor(0).data  # type: ignore[no-any-return]
        else:
            options = runtime.module.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = threads
            for name, size in zip(shape, sizes, strict=True):
                if isinstance(name, str):
                    options.add_free_dimension_override_by_name(name, size)
            providers = ["CPUExecutionProvider"]
            session = runtime.module.InferenceSession(str(path), options, providers=providers)
            given = session.get_inputs()[0]
            images = np.zeros(
                sizes, dtype=np.uint8 if given.type == "tensor(uint8)" else np.float32
            )
            feed = {given.name: images}

            def compute() -> FloatArray:
                (output,) = session.run(None, feed)
                return output  # type: ignore[no-any-return]
    except Exception as error:  # as above
        raise _failed(path, "load", error) from error
    return CpuSession(path, images, compute)


def _failed(path: Path, what: str, error: Exception) -> ModelError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[-1][:200] if lines else type(error).__name__
    return ModelError(
        f"{path.name} does not {what}: {reason}.",
        "install the runtime in a version that the bundle names, from its own packages",
    )
