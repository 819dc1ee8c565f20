"""An engine ready to run: buffers on the device, one batch at a time, as a CUDA graph if wanted."""

# numpy 1.21 of JetPack 6 cannot evaluate our annotations.
from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from care_compress.device.cuda import Cuda
from care_compress.device.images import FloatArray
from care_compress.device.library import (
    Library,
    Log,
    make_logger,
    make_profiler,
    open_runtime,
)
from care_compress.device.problems import EngineMismatchError, NoGpuError


class Session:
    """One engine with its context, stream and buffers; use it in a ``with``, which frees them."""

    def __init__(
        self, library: Library, cuda: Cuda, plan: bytes, refit_from: Path | None = None
    ) -> None:
        self._library, self._cuda = library, cuda
        self._addresses: dict[str, int] = {}
        self._stream = 0
        self._graph = 0
        self._log = Log()
        self._logger = make_logger(library, self._log)
        # The runtime has to outlive the engine, and the engine the context.
        self._runtime = open_runtime(library, self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise EngineMismatchError(
                f"the engine does not load: {self._log.reason()}.", "build it again on this machine"
            )
        if refit_from is not None:
            # A stripped engine gets its weights back.
            module = library.module
            refitter = module.Refitter(self._engine, self._logger)
            parser = module.OnnxParserRefitter(refitter, self._logger)
            if not parser.refit_from_file(str(refit_from)) or not refitter.refit_cuda_engine():
                raise EngineMismatchError(
                    f"the weights of {refit_from.name} do not go back into the engine:"
                    f" {self._log.reason()}.",
                    "build it again without --strip-plan",
                )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise NoGpuError(
                f"no memory to run the engine: {self._log.reason()}.", "close other programs"
            )
        self._name_tensors()
        try:
            self._stream = cuda.new_stream()
            for name, array in ((self._input, self._in), (self._output, self._out)):
                self._addresses[name] = cuda.allocate(array.nbytes)
                self._context.set_tensor_address(name, self._addresses[name])
            # A graph captured before the first run would contain TensorRT's lazy initialization.
            self.enqueue()
            cuda.wait(self._stream)
        except BaseException:
            self.close()
            raise

    def _name_tensors(self) -> None:
        engine, module = self._engine, self._library.module
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [
            name for name in names if engine.get_tensor_mode(name) == module.TensorIOMode.INPUT
        ]
        outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise EngineMismatchError(
                f"the engine has {len(inputs)} inputs and {len(outputs)} outputs, not one of each.",
                "build it from an exported graph",
            )
        self._input, self._output = inputs[0], outputs[0]
        shape: tuple[int, ...] = tuple(engine.get_tensor_shape(self._input))
        if shape[0] == -1:
            # The usual batch of the profile: what the kernels were chosen for.
            shape = tuple(engine.get_tensor_profile_shape(self._input, 0)[1])
            self._context.set_input_shape(self._input, shape)
        self.shape = shape
        self._in = self._host_array(self._input, shape)
        self._out = self._host_array(
            self._output, tuple(self._context.get_tensor_shape(self._output))
        )

    def _host_array(self, name: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        dtype = self._library.module.nptype(self._engine.get_tensor_dtype(name))
        return np.zeros(shape, dtype=dtype)

    @property
    def classes(self) -> int:
        """Numbers for one image, or for each of its places."""
        return int(self._out.shape[1])

    @property
    def takes_bytes(self) -> bool:
        """Whether images are pixels (N, H, W, 3) in uint8, and not normalized."""
        return bool(self._in.dtype == np.uint8)

    @property
    def batch(self) -> int:
        """Images in one run of the engine."""
        return self.shape[0]

    def run(self, images_NCHW: FloatArray) -> FloatArray:
        """Outputs (N, ...) of any number of images.

        The rest of the last batch is whatever was in the buffer; images do not see each other.
        """
        if images_NCHW.shape[1:] != self.shape[1:]:
            raise EngineMismatchError(
                f"the engine takes images of {self.shape[1:]}, not {images_NCHW.shape[1:]}.",
                "use the samples and the resolution of this bundle",
            )
        results = []
        for first in range(0, len(images_NCHW), self.batch):
            part = images_NCHW[first : first + self.batch]
            self._in[: len(part)] = part
            self._run_batch()
            results.append(self._out[: len(part)].astype(np.float32))
        return np.concatenate(results)

    def _run_batch(self) -> None:
        self._cuda.upload(self._addresses[self._input], self._in, self._stream)
        self.enqueue()
        self._cuda.download(self._out, self._addresses[self._output], self._stream)
        self._cuda.wait(self._stream)

    def enqueue(self) -> None:
        """Queue one run on what lies in the input buffer, without any copy."""
        if self._graph:
            self._cuda.launch(self._graph, self._stream)
        elif not self._context.execute_async_v3(self._stream):
            raise NoGpuError(
                f"the engine does not run: {self._log.reason()}.", "build it again on this machine"
            )

    def queue_between(self, start: int, end: int) -> float:
        """Queue one run between two events; the milliseconds that queueing it took."""
        self._cuda.record(start, self._stream)
        began = time.perf_counter()
        self.enqueue()
        passed = time.perf_counter() - began
        self._cuda.record(end, self._stream)
        return 1000 * passed

    def timed_run(self) -> float:
        """Milliseconds from the copy of a batch to the device to its answers in host memory.

        Nothing else is queued: it is what a program waits that answers one batch after another.
        """
        began = time.perf_counter()
        self._run_batch()
        return 1000 * (time.perf_counter() - began)

    def layer_milliseconds(self, runs: int) -> dict[str, float]:
        """Mean time of each layer, by the name that the engine gives it.

        In a context of its own: a profiler makes every run wait, and a graph would hide it.
        """
        context = self._engine.create_execution_context()
        if context is None:
            raise NoGpuError(
                f"no memory to profile the engine: {self._log.reason()}.", "close other programs"
            )
        context.set_input_shape(self._input, self.shape)
        for name, address in self._addresses.items():
            context.set_tensor_address(name, address)
        sums: dict[str, float] = {}
        profiler = make_profiler(self._library, sums)
        context.profiler = profiler
        for run in range(-1, runs):
            if run == 0:
                sums.clear()  # the first run loads kernels
            if not context.execute_async_v3(self._stream):
                raise NoGpuError(
                    f"the engine does not run: {self._log.reason()}.", "build it again"
                )
            self._cuda.wait(self._stream)
        return {name: milliseconds / runs for name, milliseconds in sums.items()}

    def capture(self) -> None:
        """Make one CUDA graph of the run: one launch for it instead of one for each layer."""
        try:
            self._cuda.begin_capture(self._stream)
            try:
                self.enqueue()
            except BaseException:
                # The stream would stay in capture, and every later call fail for that reason.
                self._cuda.drop_graph(self._cuda.end_capture(self._stream))
                raise
            self._graph = self._cuda.end_capture(self._stream)
        except NoGpuError as error:
            raise NoGpuError(
                f"the engine does not become a CUDA graph: {error.message}", "run it without one"
            ) from error

    def close(self) -> None:
        """Give everything on the device back; safe to call twice."""
        if self._graph:
            self._cuda.drop_graph(self._graph)
            self._graph = 0
        while self._addresses:
            self._cuda.free(self._addresses.popitem()[1])
        if self._stream:
            self._cuda.drop_stream(self._stream)
            self._stream = 0
        self._context = self._engine = None

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
