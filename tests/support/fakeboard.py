"""A board without a GPU: a libcudart of Python functions and a TensorRT that runs ONNX Runtime.

The fake TensorRT has the names of a given version and no others, so code that reaches for
something a version does not have fails here as it would on that board. Enum members get other
numbers than the real ones: only code that asks for them by name is right.
"""

import contextlib
import ctypes
import enum
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime

from care_compress.device.cuda import Cuda
from care_compress.device.deploy import Host
from care_compress.device.library import Library, wrap_library
from care_compress.device.manifest import version_numbers

# Recorded from the API references of these versions: the names that differ, and those we use.
_FLAGS_EVERYWHERE = (
    "DEBUG GPU_FALLBACK REFIT DISABLE_TIMING_CACHE TF32 SPARSE_WEIGHTS SAFETY_SCOPE"
    " VERSION_COMPATIBLE EXCLUDE_LEAN_RUNTIME ERROR_ON_TIMING_CACHE_MISS DISABLE_COMPILATION_CACHE"
    " STRIP_PLAN REFIT_IDENTICAL WEIGHT_STREAMING"
).split()
_FLAGS_10 = (
    "FP16 INT8 BF16 FP8 INT4 OBEY_PRECISION_CONSTRAINTS PREFER_PRECISION_CONSTRAINTS DIRECT_IO"
    " REJECT_EMPTY_ALGORITHMS"
).split()
_LATER_FLAGS = "REFIT_INDIVIDUAL STRICT_NANS MONITOR_MEMORY DISTRIBUTIVE_INDEPENDENCE".split()
_CONFIG_EVERYWHERE = (
    "profiling_verbosity builder_optimization_level progress_monitor set_flag avg_timing_iterations"
    " set_memory_pool_limit add_optimization_profile create_timing_cache set_timing_cache"
    " get_timing_cache hardware_compatibility_level runtime_platform max_aux_streams"
).split()
_CONFIG_10 = "int8_calibrator set_calibration_profile set_quantization_flag quantization_flags"
_AOT_FLAGS = ["PREFER_AOT_PYTHON_PLUGINS", "PREFER_JIT_PYTHON_PLUGINS"]

SURFACES: dict[str, dict[str, list[str]]] = {
    "10.3.0.30": {
        "BuilderFlag": [*_FLAGS_10, *_FLAGS_EVERYWHERE],
        "NetworkDefinitionCreationFlag": ["EXPLICIT_BATCH", "STRONGLY_TYPED"],
        "IBuilderConfig": [*_CONFIG_EVERYWHERE, *_CONFIG_10.split()],
        "ParserError": ["code", "desc", "file", "func", "line", "node"],
    },
    "10.13.3.9": {
        "BuilderFlag": [*_FLAGS_10, "FP4", *_FLAGS_EVERYWHERE, *_LATER_FLAGS],
        "NetworkDefinitionCreationFlag": ["EXPLICIT_BATCH", "STRONGLY_TYPED", *_AOT_FLAGS],
        "IBuilderConfig": [*_CONFIG_EVERYWHERE, *_CONFIG_10.split(), "tiling_optimization_level"],
        "ParserError": ["code", "desc", "node", "node_name", "node_operator"],
    },
    "10.16.1.11": {
        "BuilderFlag": [*_FLAGS_10, "FP4", *_FLAGS_EVERYWHERE, *_LATER_FLAGS],
        "NetworkDefinitionCreationFlag": ["EXPLICIT_BATCH", "STRONGLY_TYPED", *_AOT_FLAGS],
        "IBuilderConfig": [*_CONFIG_EVERYWHERE, *_CONFIG_10.split(), "tiling_optimization_level"],
        "ParserError": ["code", "desc", "node", "node_name", "node_operator"],
    },
    "11.4.1.5": {
        "BuilderFlag": [*_FLAGS_EVERYWHERE, *_LATER_FLAGS, "REQUIRE_USER_ALLOCATION"],
        "NetworkDefinitionCreationFlag": ["STRONGLY_TYPED", *_AOT_FLAGS],
        "IBuilderConfig": [*_CONFIG_EVERYWHERE, "build_route", "tiling_optimization_level"],
        "ParserError": ["code", "desc", "node", "node_name", "node_operator"],
    },
}

_LAYER_TYPES = {
    "Cast": "CAST",
    "QuantizeLinear": "QUANTIZE",
    "DequantizeLinear": "DEQUANTIZE",
    "Conv": "CONVOLUTION",
    "Relu": "ACTIVATION",
    "ReduceMean": "REDUCE",
    "MatMul": "MATRIX_MULTIPLY",
}
_DTYPES = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.FLOAT8E4M3FN: "FP8",
}
# What a profiled run reports: milliseconds of each layer.
PROFILE = {"stem + relu": 0.25, "head": 1.5, "reformat": 0.125}
_ADDRESSES = itertools.count(0x1000)


def _enum(name: str, members: list[str]) -> Any:
    return enum.IntEnum(name, {member: 40 + 3 * i for i, member in enumerate(members)})


class FakeGpu:
    """A libcudart; what was allocated and not given back stays in `alive`."""

    def __init__(self, name: str = "Orin", capability: tuple[int, int] = (8, 7)) -> None:
        self.alive: dict[int, Any] = {}
        self.failing: dict[str, int] = {}
        self.calls: list[str] = []
        self.captured: list[Callable[[], None]] | None = None
        # Seconds of the kernels of one run, of the host before it launches them, and until when
        # the device is busy.
        self.kernels = self.launch = self.busy_until = 0.0
        self._name, self._capability = name, capability
        self._functions: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cuda") or name == "cudaGetDeviceProperties_v2":
            raise AttributeError(name)
        if name not in self._functions:
            implementation = getattr(self, "_" + name)

            def call(*arguments: Any) -> Any:
                self.calls.append(name)
                if name in self.failing:
                    return self.failing[name]
                return implementation(*arguments) or 0

            self._functions[name] = call
        return self._functions[name]

    def _new(self, pointer: Any, value: Any = None) -> None:
        pointer._obj.value = next(_ADDRESSES)
        self.alive[pointer._obj.value] = value

    def _drop(self, address: Any) -> None:
        del self.alive[getattr(address, "value", address)]

    def _cudaGetErrorString(self, status: int) -> bytes:
        return f"made-up error {status}".encode()

    def _cudaSetDeviceFlags(self, flags: int) -> None:
        pass

    def _cudaSetDevice(self, device: int) -> None:
        pass

    def _cudaGetDeviceProperties(self, properties: Any, device: int) -> None:
        properties.value = self._name.encode()

    def _cudaDeviceGetAttribute(self, value: Any, which: int, device: int) -> None:
        value._obj.value = self._capability[which - 75]

    def _cudaRuntimeGetVersion(self, value: Any) -> None:
        value._obj.value = 12060

    _cudaDriverGetVersion = _cudaRuntimeGetVersion

    def _cudaMalloc(self, pointer: Any, size: int) -> None:
        memory = ctypes.create_string_buffer(size)
        pointer._obj.value = ctypes.addressof(memory)
        self.alive[pointer._obj.value] = memory

    def _cudaMemcpyAsync(self, target: int, source: int, size: int, kind: int, stream: int) -> None:
        assert stream in self.alive
        ctypes.memmove(target, source, size)

    def _cudaStreamCreateWithFlags(self, pointer: Any, flags: int) -> None:
        self._new(pointer)

    _cudaEventCreateWithFlags = _cudaStreamCreateWithFlags

    def _cudaStreamSynchronize(self, stream: int) -> None:
        assert stream in self.alive
        self._wait(self.busy_until)

    def _cudaEventSynchronize(self, event: int) -> None:
        self._wait(self.alive[event])

    def _wait(self, until: float) -> None:
        time.sleep(max(0.0, until - time.perf_counter()))

    def _cudaEventRecord(self, event: int, stream: int) -> None:
        # It happens when the device has done what was queued before it.
        self.alive[event] = max(time.perf_counter(), self.busy_until)

    def run(self, action: Callable[[], None]) -> None:
        """Launch a run: what it computes is there at once, its time passes on the device."""
        time.sleep(self.launch)
        action()
        self.busy_until = max(time.perf_counter(), self.busy_until) + self.kernels

    def _cudaEventElapsedTime(self, value: Any, start: int, end: int) -> None:
        value._obj.value = 1000 * (self.alive[end] - self.alive[start])

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> None:
        self.captured = []

    def _cudaStreamEndCapture(self, stream: int, pointer: Any) -> None:
        self._new(pointer, self.captured)
        self.captured = None

    def _cudaGraphInstantiateWithFlags(self, pointer: Any, graph: Any, flags: int) -> None:
        self._new(pointer, self.alive[graph.value])

    def _cudaGraphLaunch(self, graph: int, stream: int) -> None:
        for action in self.alive[graph]:
            self.run(action)

    _cudaFree = _cudaStreamDestroy = _cudaEventDestroy = _drop
    _cudaGraphDestroy = _cudaGraphExecDestroy = _drop


class _Guarded:
    """A pybind object: setting or reading what it does not have is an AttributeError."""

    def __init__(self, names: list[str], done: dict[str, Any]) -> None:
        object.__setattr__(self, "_names", names)
        object.__setattr__(self, "done", done)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._names:
            raise AttributeError(name)
        self.done[name] = value

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(name)
        if name in ("progress_monitor",):
            return self.done.get(name)
        return lambda *arguments: self._called(name, arguments)

    def _called(self, name: str, arguments: Any) -> Any:
        if name == "create_timing_cache":
            return SimpleNamespace(serialize=lambda: b"timings", stored=arguments[0])
        if name == "get_timing_cache":
            return self.done.get("timing_cache")
        if name == "set_timing_cache":
            # As TensorRT: a cache that another version measured is refused.
            if arguments[0].stored not in (b"", b"timings"):
                return False
            self.done["timing_cache"] = arguments[0]
            return True
        self.done.setdefault(name, []).append(arguments)
        return True


class FakeTensorRt:
    """One version of the `tensorrt` module."""

    def __init__(self, version: str, gpu: FakeGpu) -> None:
        surface = SURFACES[version]
        self.__version__ = version
        self._gpu, self._surface = gpu, surface
        self.layers: list[Any] = []  # of the network that was built last
        self.done: dict[str, Any] = {}
        self.fails_with = ""  # what the builder says instead of building
        self.noise = 0.0  # added to the logits of every engine
        self.float32 = "float32"
        for name in ("BuilderFlag", "NetworkDefinitionCreationFlag"):
            setattr(self, name, _enum(name, surface[name]))
        self.ProfilingVerbosity = _enum("ProfilingVerbosity", ["DETAILED", "NONE"])
        self.MemoryPoolType = _enum("MemoryPoolType", ["WORKSPACE"])
        self.TensorIOMode = _enum("TensorIOMode", ["NONE", "INPUT", "OUTPUT"])
        self.LayerInformationFormat = _enum("LayerInformationFormat", ["ONELINE", "JSON"])
        self.Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO"])
        self.ILogger = type("ILogger", (), {})
        self.IProgressMonitor = type("IProgressMonitor", (), {})
        self.IProfiler = type("IProfiler", (), {})

    def nptype(self, name: str) -> Any:
        return np.float32

    def Builder(self, logger: Any) -> Any:
        flags = self.done
        return SimpleNamespace(
            create_network=lambda flag=0: flags.update(network=flag) or SimpleNamespace(),
            create_builder_config=self._configure,
            create_optimization_profile=lambda: _Guarded(["set_shape"], self.done),
            build_serialized_network=lambda network, config: self._build(network, config, logger),
        )

    def _configure(self) -> Any:
        for name in ("set_flag", "set_shape"):
            self.done.pop(name, None)  # of the build before
        return _Guarded(self._surface["IBuilderConfig"], self.done)

    def _build(self, network: Any, config: Any, logger: Any) -> Any:
        self.layers = [network.get_layer(index) for index in range(network.num_layers)]
        monitor = config.progress_monitor
        monitor.phase_start("Building engine", None, 4)
        monitor.phase_start("Timing", "Building engine", 2)
        going_on = True
        # An exception of a Python callback is printed by the real one, and the build goes on.
        with contextlib.suppress(BaseException):
            going_on = all(monitor.step_complete("Building engine", step) for step in range(4))
        monitor.phase_finish("Building engine")
        logger.log(self.Severity.WARNING, "a warning")
        if self.fails_with or not going_on:
            logger.log(self.Severity.ERROR, self.fails_with)
            return None
        flags = {flag.name for (flag,) in self.done.get("set_flag", ())}
        plan = {
            "version": self.__version__,
            "compatible": "VERSION_COMPATIBLE" in flags,
            "onnx": network.path,
            "noise": self.noise,
            "stripped": "STRIP_PLAN" in flags,
            "profile": [shapes[1:] for shapes in self.done.get("set_shape", ())][-1:],
        }
        return json.dumps(plan).encode()

    def OnnxParser(self, network: Any, logger: Any) -> Any:
        errors: list[Any] = []

        def parse_from_file(path: str) -> bool:
            try:
                _fill(network, path)
            except Exception as error:
                texts = {"desc": str(error) or "cannot read", "node_name": "n"}
                names = self._surface["ParserError"]
                known = {name: (lambda t=text: t) for name, text in texts.items() if name in names}
                errors.append(SimpleNamespace(**known))
                parser.num_errors = 1
                return False
            return True

        parser = SimpleNamespace(
            parse_from_file=parse_from_file, num_errors=0, get_error=lambda index: errors[index]
        )
        return parser

    def Refitter(self, engine: Any, logger: Any) -> Any:
        def refit() -> bool:
            engine.stripped = False
            return True

        return SimpleNamespace(refit_cuda_engine=refit)

    def OnnxParserRefitter(self, refitter: Any, logger: Any) -> Any:
        return SimpleNamespace(refit_from_file=lambda path: Path(path).is_file())

    def Runtime(self, logger: Any) -> Any:
        def load(plan: bytes) -> Any:
            value = json.loads(plan)
            built, here = (version_numbers(v) for v in (value["version"], self.__version__))
            later = value["compatible"] and built <= here and here[0] - built[0] <= 1
            if built != here and not later:
                logger.log(self.Severity.ERROR, "serialization version mismatch")
                return None
            return _FakeEngine(self, value, self._gpu)

        return SimpleNamespace(deserialize_cuda_engine=load, engine_host_code_allowed=False)


def _fill(network: Any, path: str) -> None:
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True)
    onnx.checker.check_model(model)
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    types |= {v.name: v.type.tensor_type.elem_type for v in model.graph.output}
    types |= {constant.name: constant.data_type for constant in model.graph.initializer}
    tensor = {
        name: SimpleNamespace(name=name, dtype=SimpleNamespace(name=_DTYPES.get(kind, "INT8")))
        for name, kind in types.items()
    }
    layers = []
    for node in model.graph.node:
        inputs = [tensor.get(name) for name in node.input]
        outputs = [tensor[name] for name in node.output]
        types: dict[int, Any] = {}  # as they are set
        layers.append(
            SimpleNamespace(
                name=node.name,
                type=SimpleNamespace(name=_LAYER_TYPES.get(node.op_type, "OTHER")),
                num_inputs=len(inputs),
                num_outputs=1,
                precision=None,
                output_types=types,
                set_output_type=types.__setitem__,
                get_input=lambda i, inputs=inputs: inputs[i],
                get_output=lambda i, outputs=outputs: outputs[i],
            )
        )
    image = model.graph.input[0]
    shape = [dim.dim_value or -1 for dim in image.type.tensor_type.shape.dim]
    network.path = path
    network.num_layers = len(layers)
    network.get_layer = lambda index: layers[index]
    network.get_input = lambda index: SimpleNamespace(name=image.name, shape=shape)


class _FakeEngine:
    num_io_tensors = 2

    def __init__(self, module: FakeTensorRt, plan: dict[str, Any], gpu: FakeGpu) -> None:
        self._module, self._gpu, self._noise = module, gpu, plan["noise"]
        self.stripped, self._profile = plan["stripped"], plan["profile"]
        self._session = onnxruntime.InferenceSession(plan["onnx"])
        self._in, self._out = self._session.get_inputs()[0], self._session.get_outputs()[0]
        # 11 writes Datatype where 10 writes Format/Datatype, and I/O Tensors for Bindings.
        self._newer = module.__version__.startswith("11")

    def get_tensor_name(self, index: int) -> str:
        return [self._in.name, self._out.name][index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._module.TensorIOMode
        return modes.INPUT if name == self._in.name else modes.OUTPUT

    def get_tensor_shape(self, name: str) -> list[int]:
        shape = self._in.shape if name == self._in.name else self._out.shape
        return [size if isinstance(size, int) else -1 for size in shape]

    def get_tensor_profile_shape(self, name: str, index: int) -> list[list[int]]:
        return self._profile[index]

    def get_tensor_dtype(self, name: str) -> str:
        return "float32"

    def create_engine_inspector(self) -> Any:
        key = "Datatype" if self._newer else "Format/Datatype"
        layers = [
            {
                "Name": "stem + relu",
                "LayerType": "CaskConvolution",
                "Inputs": [{"Name": "x", key: "Row major Int8 format"}],
                "Outputs": [{"Name": "y", key: "Half"}],
                "Metadata": "[ONNX Layer: stem]\x1f[ONNX Layer: relu]",
            },
            {
                "Name": "head",
                "LayerType": "gemm",
                "Inputs": [{"Name": "y", key: "Half"}],
                "Outputs": [{"Name": "z", key: "Half"}],
                "Metadata": "[ONNX Layer: head]",
            },
        ]
        text = json.dumps({"Layers": layers, "I/O Tensors" if self._newer else "Bindings": []})
        return SimpleNamespace(get_engine_information=lambda form: text)

    def create_execution_context(self) -> Any:
        addresses: dict[str, int] = {}
        shapes = {name: self.get_tensor_shape(name) for name in (self._in.name, self._out.name)}

        def set_input_shape(name: str, shape: tuple[int, ...]) -> None:
            shapes[name] = list(shape)
            shapes[self._out.name][0] = shape[0]

        def compute() -> None:
            assert not self.stripped, "the weights are not back"
            given = _view(addresses[self._in.name], shapes[self._in.name])
            logits = self._session.run(None, {self._in.name: given})[0]
            spread = np.random.default_rng(0).normal(size=logits.shape) * self._noise
            _view(addresses[self._out.name], shapes[self._out.name])[...] = logits + spread

        def execute_async_v3(stream: int) -> bool:
            assert stream in self._gpu.alive
            if self._gpu.captured is not None:
                assert context.profiler is None, "a profiled run cannot be captured"
                self._gpu.captured.append(compute)
            else:
                self._gpu.run(compute)
            if context.profiler is not None:
                for name, ms in PROFILE.items():
                    context.profiler.report_layer_time(name, ms)
            return True

        context = SimpleNamespace(
            profiler=None,
            set_tensor_address=addresses.__setitem__,
            set_input_shape=set_input_shape,
            get_tensor_shape=lambda name: shapes[name],
            execute_async_v3=execute_async_v3,
        )
        return context


def _view(address: int, shape: list[int]) -> Any:
    memory = (ctypes.c_float * int(np.prod(shape))).from_address(address)
    return np.frombuffer(memory, dtype=np.float32).reshape(shape)


def fake_library(version: str, gpu: FakeGpu) -> Library:
    """The library of one version."""
    return wrap_library(FakeTensorRt(version, gpu), "tensorrt", version)


def fake_host(root: Path, version: str = "10.3.0.30", gpu: FakeGpu | None = None) -> Host:
    """A board with one version of TensorRT and one GPU."""
    gpu = gpu or FakeGpu()
    library = fake_library(version, gpu)
    return Host(lambda name: library, lambda: Cuda(gpu), root)
