"""The command line on the device: ``python3 care_deploy.py build``, then ``verify``, ``bench``."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from care_compress.device.build import BuildOptions
from care_compress.device.deploy import (
    REAL_HOST,
    Host,
    bench_models,
    build_models,
    built_models,
    bundle_library,
    describe_board,
    open_sessions,
    read_conditions,
    verify_models,
)
from care_compress.device.manifest import Bundle
from care_compress.device.samples import likeliest, load_files
from care_compress.device.timing import BenchPlan, verdict
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
FLOAT = "fp16"  # the model that INT8 has to beat


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
    parser, verbs = make_parser(about, tuple(work), ("int8", FLOAT), "engine")
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
    settings = BuildOptions(
        precision="",  # each model's own
        optimization_level=options.optimization_level,
        workspace_mib=options.workspace,
        version_compatible=options.version_compatible,
        strip_plan=options.strip_plan,
        timing_cache=None if options.no_timing_cache else bundle.folder / "timing.cache",
        batch=None if options.batch is None else tuple(options.batch),
    )
    terminal = sys.stderr.isatty()

    def show_progress(phase: str, done: float | None) -> None:
        text = phase if done is None else f"{phase} {done:4.0%}"
        if terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif done is None:
            say(text)

    built = build_models(host, bundle, wanted_models(bundle, options), settings, show_progress)
    if terminal:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    rows = [["engine", "MB", "built in", "layers by precision"]]
    for model, engine in built.items():
        counts = ", ".join(f"{count} {name}" for name, count in engine["precisions"].items())
        of = "" if engine["layers_from"] == "engine" else " (of the graph: no GPU to load it)"
        size, seconds = engine["size_bytes"] / 1e6, engine["build_seconds"]
        rows.append([bundle.engine(model).name, f"{size:.1f}", f"{seconds:.0f} s", counts + of])
    print(format_table(rows))
    for model, engine in built.items():
        for warning in engine["warnings"]:
            print(f"{model}: {warning}", file=sys.stderr)
    print("The layers, one by one, are in the .json beside each engine. Next: verify")
    return 0


def _verify(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    models = built_models(bundle, wanted_models(bundle, options))
    return show_verified(verify_models(host, bundle, models, say), bundle.manifest["limits"])


def _bench(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    models = built_models(bundle, wanted_models(bundle, options))
    graph = not options.no_cuda_graph
    measured = bench_models(host, bundle, models, BenchPlan(options.seconds), graph, say)
    show_timings(measured.timings)
    if said := verdict(measured.timings, "int8", FLOAT, "use fp16.engine on this board"):
        print(said)
    power = measured.before["power_mode"] or "unknown"
    print(f"CUDA graph: {'yes' if graph else 'no'}; power mode: {power}")
    print(f"before: {_conditions(measured.before)}; after: {_conditions(measured.after)}")
    print(f"Written to {bundle.results}")
    return 0


def _conditions(state: Mapping[str, Any]) -> str:
    clock = "?" if state["gpu_mhz"] is None else f"{state['gpu_mhz']:.0f}"
    hottest = max(state["temperatures_c"].values(), default=None)
    heat = "?" if hottest is None else f"{hottest:.0f}"
    return f"GPU at {clock} MHz, {heat} °C at most"


def _infer(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    built = built_models(bundle, wanted_models(bundle, options))
    model = "int8" if "int8" in built else built[0]
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


if __name__ == "__main__":
    sys.exit(main())
