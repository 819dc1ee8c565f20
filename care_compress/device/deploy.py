"""The work behind the verbs: build the engines of a bundle, verify them, measure them.

`Host` is the one seam to the machine; tests put another library and another CUDA there.
"""

import contextlib
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from care_compress.device.build import BuildOptions, Notify, build_engine
from care_compress.device.cuda import Cuda, CudaGpu, load_cuda
from care_compress.device.enginefile import EngineOrigin, read_engine, write_engine
from care_compress.device.library import Library, load_library, required_library
from care_compress.device.manifest import Bundle, merge_results, satisfies
from care_compress.device.problems import EngineMismatchError, TensorRtMissingError
from care_compress.device.samples import DeviceAgreement, verify_samples
from care_compress.device.sensors import (
    parse_l4t,
    parse_package,
    parse_power_mode,
    read_board_name,
    read_cpu_clock,
    read_gpu_clock,
    read_temperatures,
    system_text,
    tool_output,
)
from care_compress.device.session import Session
from care_compress.device.timing import BenchPlan, Measured, Timed, measure

RESULTS_KIND = "care-deploy-results"


@dataclass(frozen=True)
class Host:
    """Where TensorRT, CUDA and the system's files come from."""

    load_library: Callable[[str], Library]
    load_cuda: Callable[[], Cuda]
    root: Path


REAL_HOST = Host(load_library, load_cuda, Path("/"))


def bundle_library(host: Host, bundle: Bundle) -> Library:
    """The library the bundle asks for, in a version it allows."""
    requirement = str(bundle.manifest["requirement"])
    library = host.load_library(required_library(requirement))
    if not satisfies(library.version, requirement):
        raise TensorRtMissingError(
            f"here is {library.name} {library.text}; this bundle needs {requirement}.",
            "install a version that fits, or export a bundle for this board",
        )
    return library


def build_file(
    library: Library,
    gpu: CudaGpu | None,
    onnx: Path,
    onnx_sha256: str,
    engine: Path,
    options: BuildOptions,
    notify: Notify,
) -> dict[str, Any]:
    """Build one engine from one graph and write both files; returns the engine's description.

    `gpu` is None for TensorRT-RTX, which builds for `options.compute_capabilities`.
    """
    built = build_engine(library, onnx, options, notify)
    origin = EngineOrigin(
        library=library.name,
        version=library.text,
        gpu=gpu,
        compute_capabilities=options.compute_capabilities if gpu is None else (),
        onnx_sha256=onnx_sha256,
        version_compatible=options.version_compatible,
        stripped=options.strip_plan,
    )
    details = {
        "precision": options.precision,
        "optimization_level": options.optimization_level,
        "workspace_mib": options.workspace_mib,
        "build_seconds": round(built.seconds, 1),
        "warnings": list(built.warnings),
        "layers_from": built.layers_from,
        "precisions": dict(sorted(Counter(row.precision for row in built.layers).items())),
        "layers": [asdict(row) for row in built.layers],
    }
    return write_engine(engine, built.plan, origin, details)


def build_models(
    host: Host, bundle: Bundle, models: Sequence[str], options: BuildOptions, notify: Notify
) -> dict[str, dict[str, Any]]:
    """Build the engines of some models of a bundle, on the GPU they will run on."""
    for leftover in bundle.folder.glob(".*.tmp"):
        leftover.unlink()  # of a build that was killed while it wrote
    library = bundle_library(host, bundle)
    gpu = None if library.is_rtx else host.load_cuda().gpu()

    def tell(model: str, phase: str, done: float | None) -> None:
        notify(f"{model}: {phase}", done)

    return {
        model: build_file(
            library,
            gpu,
            bundle.file(model),
            bundle.sha256(model),
            bundle.engine(model),
            replace(options, precision=model),
            partial(tell, model),
        )
        for model in models
    }


def built_models(bundle: Bundle, wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of the wanted models that have an engine."""
    found = tuple(model for model in wanted if bundle.engine(model).is_file())
    if not found:
        raise EngineMismatchError(
            "there is no engine yet.", "build first: python3 care_deploy.py build"
        )
    return found


def describe_board(root: Path, library: Library, cuda: Cuda) -> dict[str, Any]:
    """Everything about this machine that a measured figure depends on, and that does not move.

    The host's name, serial numbers and users are not read.
    """
    gpu = cuda.gpu()
    packages = system_text(root / "var/lib/dpkg/status")
    return {
        # A desktop is known by its GPU.
        "name": read_board_name(root) or gpu.name,
        "gpu": {"name": gpu.name, "compute_capability": gpu.compute_capability},
        "library": library.name,
        "library_version": library.text,
        "cuda": cuda.versions(),
        "l4t": parse_l4t(system_text(root / "etc/nv_tegra_release")),
        "jetpack": parse_package(packages, "nvidia-jetpack"),
        "python": platform.python_version(),
        "architecture": platform.machine(),
    }


def read_conditions(root: Path) -> dict[str, Any]:
    """Power mode, clocks and temperatures of this moment: a figure without them says nothing."""
    return {
        "power_mode": parse_power_mode(tool_output("nvpmodel", "-q")),
        "gpu_mhz": read_gpu_clock(root),
        "cpu_mhz": read_cpu_clock(root),
        "temperatures_c": read_temperatures(root),
    }


@contextlib.contextmanager
def open_sessions(
    host: Host, bundle: Bundle, models: Sequence[str]
) -> Iterator[tuple[Library, Cuda, dict[str, Session], dict[str, dict[str, Any]]]]:
    """Load engines, each checked against its description; everything is freed at the end."""
    library = bundle_library(host, bundle)
    cuda = host.load_cuda()
    gpu = cuda.gpu()
    with contextlib.ExitStack() as stack:
        sessions, descriptions = {}, {}
        for model in models:
            plan, description = read_engine(
                bundle.engine(model), library, gpu, bundle.sha256(model)
            )
            refit_from = bundle.file(model) if description.get("stripped") else None
            sessions[model] = stack.enter_context(Session(library, cuda, plan, refit_from))
            descriptions[model] = description
        yield library, cuda, sessions, descriptions


def verify_models(
    host: Host, bundle: Bundle, models: Sequence[str], notify: Callable[[str], None]
) -> dict[str, DeviceAgreement]:
    """Run the bundle's samples through its engines and note how they compare."""
    with open_sessions(host, bundle, models) as (library, cuda, sessions, descriptions):
        verified = verify_samples(sessions, bundle, notify)
        board = describe_board(host.root, library, cuda)
    limits = bundle.manifest["limits"]
    records = {model: one.as_record(limits) for model, one in verified.items()}
    _merge(bundle, board, descriptions, "accuracy", records)
    return verified


def bench_models(
    host: Host,
    bundle: Bundle,
    models: Sequence[str],
    plan: BenchPlan,
    cuda_graph: bool,
    notify: Callable[[str], None],
) -> Measured:
    """Measure the engines in turns and note it with the board's state before and after.

    Each run is timed on the device; the processor spins while it waits.
    """
    with open_sessions(host, bundle, models) as (library, cuda, sessions, descriptions):
        board = describe_board(host.root, library, cuda)
        before = read_conditions(host.root)
        for session in sessions.values() if cuda_graph else ():
            session.capture()
        start, end = cuda.new_event(), cuda.new_event()
        try:
            timed = {
                name: Timed(session.batch, partial(session.run_between, start, end))
                for name, session in sessions.items()
            }
            timings = measure(timed, plan, notify)
        finally:
            cuda.drop_event(start)
            cuda.drop_event(end)
        measured = Measured(timings, before, read_conditions(host.root))
    records = measured.as_records({"cuda_graph": cuda_graph})
    _merge(bundle, board, descriptions, "speed", records)
    return measured


def _merge(
    bundle: Bundle,
    board: Mapping[str, Any],
    engines: Mapping[str, Mapping[str, Any]],
    part: str,
    values: Mapping[str, Mapping[str, Any]],
) -> None:
    """Add to results.json what tells one engine from another, and what was found of each."""
    keys = ("engine_sha256", "size_bytes", "layers_from", "precisions")
    about = {
        model: {"onnx_sha256": bundle.sha256(model), **{key: engine[key] for key in keys}}
        for model, engine in engines.items()
    }
    merge_results(bundle, RESULTS_KIND, board, about, part, values)
