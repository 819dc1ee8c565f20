"""The command line on the device: ``python3 care_deploy.py build``, then ``verify``, ``bench``."""

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from care_compress.device.build import BuildOptions
from care_compress.device.cuda import Cuda
from care_compress.device.deploy import (
    REAL_HOST,
    Host,
    build_file,
    bundle_library,
    open_sessions,
)
from care_compress.device.library import Library
from care_compress.device.manifest import Bundle, merge_results
from care_compress.device.problems import EngineMismatchError
from care_compress.device.samples import likeliest, load_files, verify_samples
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
from care_compress.device.timing import BenchPlan, Measured, Timed, measure, verdict
from care_compress.device.verbs import (
    format_table,
    make_parser,
    run_command,
    say,
    show_bundle,
    show_classes,
    show_facts,
    show_timings,
    show_verified,
    wanted_models,
)

LIBRARIES = ("tensorrt", "tensorrt_rtx")
RESULTS_KIND = "care-deploy-results"
FLOAT = "fp16"  # the model that a quantized one has to beat
QUANTIZED = ("int8", "fp8")


def main(arguments: Sequence[str] | None = None, host: Host = REAL_HOST) -> int:
    """Run one verb; the exit code."""
    work = {
        "build": partial(_build, host),
        "verify": partial(_verify, host),
        "bench": partial(_bench, host),
        "infer": partial(_infer, host),
        "info": partial(_info, host),
    }
    about = "Build, check and measure the TensorRT engines of a care-compress bundle."
    parser, verbs = make_parser(about, tuple(work), (*QUANTIZED, FLOAT), "engine")
    build = verbs["build"]
    build.add_argument("--workspace", type=int, metavar="MIB", help="memory the builder may use")
    build.add_argument("--optimization-level", type=int, choices=range(6))
    build.add_argument("--version-compatible", action="store_true", help="for later releases too")
    build.add_argument("--strip-plan", action="store_true", help="leave the weights in the ONNX")
    build.add_argument("--no-timing-cache", action="store_true", help="time every kernel again")
    build.add_argument(
        "--batch",
        type=int,
        nargs=3,
        metavar=("MIN", "USUAL", "MAX"),
        help="batch sizes, for a graph that leaves them open (default 1 1 8)",
    )
    verbs["bench"].add_argument("--no-cuda-graph", action="store_true")
    return run_command(parser, arguments, LIBRARIES, work)


def _build(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    terminal = sys.stderr.isatty()

    def show_progress(model: str, phase: str, done: float | None) -> None:
        text = f"{model}: {phase}" if done is None else f"{model}: {phase} {done:4.0%}"
        if terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif done is None:
            say(text)

    models = wanted_models(bundle, options)
    for leftover in bundle.folder.glob(".*.tmp"):
        leftover.unlink()  # of a build that was killed while it wrote
    library = bundle_library(host, bundle)
    # An engine is built on the GPU it will run on.
    gpu = None if library.is_rtx else host.load_cuda().gpu()
    built = {}
    for model in models:
        settings = BuildOptions(
            precision=model,
            optimization_level=options.optimization_level,
            workspace_mib=options.workspace,
            version_compatible=options.version_compatible,
            strip_plan=options.strip_plan,
            timing_cache=None if options.no_timing_cache else bundle.folder / "timing.cache",
            batch=None if options.batch is None else tuple(options.batch),
        )
        file, digest, engine = bundle.file(model), bundle.sha256(model), bundle.engine(model)
        notify = partial(show_progress, model)
        built[model] = build_file(library, gpu, file, digest, engine, settings, notify)
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    rows = [["engine", "MB", "built in", "layers by precision"]]
    for model, about in built.items():
        counts = ", ".join(f"{count} {name}" for name, count in about["precisions"].items())
        of = "" if about["layers_from"] == "engine" else " (of the graph: no GPU to load it)"
        size, seconds = about["size_bytes"] / 1e6, about["build_seconds"]
        rows.append([bundle.engine(model).name, f"{size:.1f}", f"{seconds:.0f} s", counts + of])
    print(format_table(rows))
    for model, about in built.items():
        for warning in about["warnings"]:
            print(f"{model}: {warning}", file=sys.stderr)
    print("The layers, one by one, are in the .json beside each engine. Next: verify")
    return 0


def _verify(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    models, limits = _built_models(bundle, options), bundle.manifest["limits"]
    with open_sessions(host, bundle, models) as (library, cuda, sessions, engines):
        verified = verify_samples(sessions, bundle, say)
        board = describe_board(host.root, library, cuda)
    records = {model: one.as_record(limits) for model, one in verified.items()}
    _merge(bundle, board, engines, "accuracy", records)
    return show_verified(verified, limits)


def _bench(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    models, graph = _built_models(bundle, options), not options.no_cuda_graph
    with open_sessions(host, bundle, models) as (library, cuda, sessions, engines):
        board, before = describe_board(host.root, library, cuda), read_conditions(host.root)
        for session in sessions.values() if graph else ():
            session.capture()
        # Each run is timed on the device; the processor spins while it waits.
        start, end = cuda.new_event(), cuda.new_event()
        try:
            timed = {
                name: Timed(session.batch, partial(session.run_between, start, end))
                for name, session in sessions.items()
            }
            timings = measure(timed, BenchPlan(options.seconds), say)
        finally:
            cuda.drop_event(start)
            cuda.drop_event(end)
        measured = Measured(timings, before, read_conditions(host.root))
    _merge(bundle, board, engines, "speed", measured.as_records({"cuda_graph": graph}))
    show_timings(timings)
    for model in QUANTIZED:
        if said := verdict(timings, model, FLOAT, "use fp16.engine on this board"):
            print(said)
    print(
        f"CUDA graph: {'yes' if graph else 'no'}; power mode: {before['power_mode'] or 'unknown'}"
    )
    print(f"before: {_conditions(before)}; after: {_conditions(measured.after)}")
    print(f"Written to {bundle.results}")
    return 0


def _conditions(state: Mapping[str, Any]) -> str:
    clock = "?" if state["gpu_mhz"] is None else f"{state['gpu_mhz']:.0f}"
    hottest = max(state["temperatures_c"].values(), default=None)
    heat = "?" if hottest is None else f"{hottest:.0f}"
    return f"GPU at {clock} MHz, {heat} °C at most"


def _infer(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    built = _built_models(bundle, options)
    model = next((name for name in QUANTIZED if name in built), built[0])
    pixels_NCHW = load_files(bundle, options.images)
    with open_sessions(host, bundle, [model]) as (_, _, sessions, _):
        found = likeliest(sessions[model], bundle, pixels_NCHW, options.top)
    show_classes(options.images, model, found)
    return 0


def _info(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    engines = ", ".join(m for m in bundle.models if bundle.engine(m).is_file()) or "none"
    show_bundle(bundle, {"engines": engines, "needs": str(bundle.manifest["requirement"])})
    # Printed first: the bundle can be told also where TensorRT or the GPU is missing.
    board = describe_board(host.root, bundle_library(host, bundle), host.load_cuda())
    show_facts({**board, **read_conditions(host.root)})
    return 0


def _built_models(bundle: Bundle, options: argparse.Namespace) -> tuple[str, ...]:
    """Those of the wanted models that have an engine."""
    wanted = wanted_models(bundle, options)
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


if __name__ == "__main__":
    sys.exit(main())
