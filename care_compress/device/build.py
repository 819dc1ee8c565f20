"""ONNX to engine with TensorRT 10.3 to 11 and with TensorRT-RTX, one function for all of them.

The graph carries every type: INT8 where QuantizeLinear and DequantizeLinear say so, FP16 where
tensors are FP16. A strongly typed network is run in exactly these; where TensorRT cannot be asked
for one, `hold_float32` binds it as far as it goes, and a warning says so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_compress.device.kernels import Traffic, parse_kernels, traffic
from care_compress.device.layers import MULTIPLYING, LayerRow, network_layers, parse_inspector
from care_compress.device.library import Library, Log, make_logger, open_runtime
from care_compress.device.problems import BuildFailedError, UntypedModelError
from care_compress.device.storage import write_whole
from care_compress.device.weak_typing import WARNING, hold_float32

# The GPUs that TensorRT-RTX builds for when it is told nothing; "8.0" serves 8.7 too.
RTX_COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")
OPEN_BATCH = (1, 1, 8)
# Each kernel is timed so often before it is chosen, as trtexec does; TensorRT's own default is 1.
TIMING_ITERATIONS = 8

# Called with a phase, and the part of it that is done (None: not known).
Notify = Callable[[str, float | None], None]


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built; `precision` is what the graph claims to be."""

    precision: str  # "int8", "fp8" or "fp16"
    optimization_level: int | None = None
    workspace_mib: int | None = None
    # The engine runs on later releases of the same major version, at some cost in speed.
    version_compatible: bool = False
    # The engine carries no weights; they are put back from the ONNX when it is loaded.
    strip_plan: bool = False
    timing_cache: Path | None = None
    # Smallest, usual and largest batch of a graph that leaves its first dimension open.
    batch: "tuple[int, int, int] | None" = None
    # TensorRT-RTX without a GPU builds for these.
    compute_capabilities: tuple[str, ...] = RTX_COMPUTE_CAPABILITIES


@dataclass(frozen=True)
class BuiltEngine:
    """A plan and what is known about it."""

    plan: bytes
    layers: tuple[LayerRow, ...]
    # "engine": what it executes; "network": what the graph asks for (nothing told more).
    layers_from: str
    moved: "Traffic | None"  # of the compiled engine, where it was printed
    warnings: tuple[str, ...]
    seconds: float


def build_engine(
    library: Library, onnx_path: Path, options: BuildOptions, notify: Notify
) -> BuiltEngine:
    """Parse, check and compile one graph. Nothing is written but the timing cache."""
    started = time.monotonic()
    log = Log()
    logger = make_logger(library, log)
    notify("reading the graph", None)
    try:
        builder = library.module.Builder(logger)
    except TypeError as error:
        # pybind's way to say that the factory returned nothing, which it does without a GPU.
        raise BuildFailedError(
            f"{library.name} cannot start: {log.reason()}.",
            "check the NVIDIA driver: nvidia-smi, or nvpmodel -q on a Jetson",
        ) from error
    network = builder.create_network(library.network_flags)
    parse_graph(library, network, logger, log, onnx_path)
    asked_for = network_layers(network)
    check_types(asked_for, options.precision, onnx_path)
    config = _configured(library, builder, options, log)
    if library.is_weakly_typed:
        held = hold_float32(library, network)
        log.add("WARNING", WARNING.format(version=library.text, held=held))
    _set_profile(builder, config, network, options, onnx_path)
    monitor = watch_build(library, config, notify)
    notify("compiling", None)
    memory = builder.build_serialized_network(network, config)
    if monitor.interruption is not None:
        raise monitor.interruption
    if memory is None:
        raise _failure(library, onnx_path, log, options)
    plan = bytes(memory)
    cache = None if library.is_rtx else config.get_timing_cache()
    if options.timing_cache is not None and cache is not None:
        write_whole(options.timing_cache, bytes(cache.serialize()))
    warnings = tuple(log.warnings)
    notify("reading the layers", None)
    # The runtime has to outlive the engine, which is None where it cannot be loaded: TensorRT-RTX
    # without a GPU.
    runtime = open_runtime(library, logger)
    engine = runtime.deserialize_cuda_engine(plan)
    layers: tuple[LayerRow, ...] = ()
    if engine is not None:
        json = library.module.LayerInformationFormat.JSON
        layers = parse_inspector(engine.create_engine_inspector().get_engine_information(json))
    kernels = parse_kernels(log.listing)
    layers = layers or tuple(kernel.row for kernel in kernels)
    return BuiltEngine(
        plan=plan,
        layers=layers or asked_for,
        layers_from="engine" if layers else "network",
        moved=traffic(kernels) if kernels else None,
        warnings=warnings,
        seconds=time.monotonic() - started,
    )


def parse_graph(library: Library, network: Any, logger: Any, log: Log, onnx_path: Path) -> None:
    """Fill `network` from an ONNX file; every complaint of the parser goes into the error."""
    parser = library.module.OnnxParser(network, logger)
    if parser.parse_from_file(str(onnx_path)):
        return
    reasons = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        # Only the newer parsers name the node.
        node = getattr(error, "node_name", None)
        where = f"node {node()}: " if node is not None and node() else ""
        reasons.append(where + " ".join(error.desc().split()))
    reason = "; ".join(reasons) or log.reason()
    fix = "export the model again for this target; a changed or cut file needs a fresh copy"
    if "zero point" in reason.lower():
        fix = "TensorRT takes symmetric quantization only: export for a tensorrt target"
    raise UntypedModelError(f"{library.name} cannot read {onnx_path.name}: {reason}", fix)


def check_types(layers: tuple[LayerRow, ...], precision: str, onnx_path: Path) -> None:
    """Refuse a graph that would silently become an engine of another precision."""
    kinds = {row.type for row in layers}
    quantized = precision in ("int8", "fp8")
    if quantized and not {"QUANTIZE", "DEQUANTIZE"} <= kinds:
        raise UntypedModelError(
            f"{onnx_path.name} is said to be {precision} and has no QuantizeLinear and"
            " DequantizeLinear.",
            "export the quantized model, or build it as fp16",
        )
    products = [row.precision for row in layers if row.type in MULTIPLYING]
    if quantized and precision.upper() not in products:
        raise UntypedModelError(
            f"{onnx_path.name} is said to be {precision}, but no convolution or matrix product has"
            f" both of its inputs dequantized from {precision.upper()}.",
            "export again; an optimizer may have moved a DequantizeLinear away from its layer",
        )
    if precision == "fp16" and not any(row.output == "FP16" for row in layers):
        raise UntypedModelError(
            f"{onnx_path.name} is said to be fp16 and holds no FP16 tensor.",
            "export again with the target's float type",
        )


def _configured(library: Library, builder: Any, options: BuildOptions, log: Log) -> Any:
    """The builder's configuration, with what was measured before in its timing cache."""
    config = builder.create_builder_config()
    config.profiling_verbosity = library.module.ProfilingVerbosity.DETAILED
    if hasattr(config, "avg_timing_iterations"):
        config.avg_timing_iterations = TIMING_ITERATIONS
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        pool = library.module.MemoryPoolType.WORKSPACE
        config.set_memory_pool_limit(pool, options.workspace_mib << 20)
    wanted = []
    if library.is_weakly_typed:
        wanted += ["FP16", "OBEY_PRECISION_CONSTRAINTS"]
        quantized = options.precision.upper()
        wanted += [quantized] if quantized in ("INT8", "FP8") else []
    if options.version_compatible:
        wanted.append("VERSION_COMPATIBLE")
    if options.strip_plan:
        # Identical: the weights put back are those it was tuned for, so it may fold them.
        wanted += ["STRIP_PLAN", "REFIT_IDENTICAL"]
    for name in wanted:
        flag = library.member("BuilderFlag", name)
        if flag is None:
            raise BuildFailedError(
                f"{library.name} {library.text} has no {name}.", "leave that option out"
            )
        config.set_flag(flag)
    if library.is_rtx:
        config.num_compute_capabilities = len(options.compute_capabilities)
        for index, capability in enumerate(options.compute_capabilities):
            member = library.member("ComputeCapability", "SM" + capability.replace(".", ""))
            if member is None or not config.set_compute_capability(member, index):
                raise BuildFailedError(
                    f"{library.name} {library.text} does not build for"
                    f" compute capability {capability}.",
                    f"choose among {', '.join(RTX_COMPUTE_CAPABILITIES)}",
                )
    # With a timing cache TensorRT-RTX asks for a GPU, which it needs for nothing else.
    elif options.timing_cache is not None:
        stored = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
        cache = config.create_timing_cache(stored) if stored else None
        # Refused if another TensorRT or another GPU measured it.
        if cache is None or not config.set_timing_cache(cache, False):
            log.reason()  # its complaint about the old cache is not the reason of a later failure
            config.set_timing_cache(config.create_timing_cache(b""), False)
    return config


def _set_profile(
    builder: Any, config: Any, network: Any, options: BuildOptions, onnx_path: Path
) -> None:
    tensor = network.get_input(0)
    shape = tuple(tensor.shape)
    if -1 not in shape:
        if options.batch is not None:
            raise BuildFailedError(
                f"{onnx_path.name} takes {shape[0]} images at once and no other number.",
                "leave --batch out, or export with export.batch=dynamic",
            )
        return
    if -1 in shape[1:]:
        raise UntypedModelError(
            f"{onnx_path.name}: input {tensor.name} is {shape}; only the batch may be open.",
            "export with a fixed resolution",
        )
    least, usual, most = options.batch or OPEN_BATCH
    if not 1 <= least <= usual <= most:
        raise BuildFailedError(
            f"batches of {least}, {usual}, {most} do not rise from 1.", "give MIN USUAL MAX"
        )
    profile = builder.create_optimization_profile()
    profile.set_shape(tensor.name, *[(size, *shape[1:]) for size in (least, usual, most)])
    config.add_optimization_profile(profile)


def _failure(library: Library, onnx_path: Path, log: Log, options: BuildOptions) -> Exception:
    reason = log.reason()
    fix = "try a lower --optimization-level, or another version of TensorRT"
    if "memory" in reason.lower():
        fix = "close other programs, or allow less with --workspace"
    elif options.strip_plan or options.version_compatible:
        fix = "leave --strip-plan and --version-compatible out"
    return BuildFailedError(
        f"{library.name} {library.text} built no engine from {onnx_path.name}: {reason}.", fix
    )


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

    # As with the logger, the base class is known only now.
    methods: dict[str, Callable[..., Any]] = {
        "__init__": lambda self: base.__init__(self),
        "phase_start": lambda self, phase, parent, steps: monitor.start(phase, parent, steps),
        "phase_finish": lambda self, phase: None,  # the next phase says it
        "step_complete": lambda self, phase, step: monitor.step(phase, step),
    }
    config.progress_monitor = type("CareProgress", (base,), methods)()
    return monitor
