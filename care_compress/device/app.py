"""The command line on the device: ``python3 care_deploy.py build``, then ``verify``, ``bench``.

Or ``tune``, which does all three for every way in which the models can be built.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from care_compress.device.bench import bench_sessions, capture_graphs, show_benched
from care_compress.device.board import BoardSetting, describe_board
from care_compress.device.build import BuildOptions
from care_compress.device.choice import choose_engine
from care_compress.device.deploy import (
    REAL_HOST,
    Host,
    build_file,
    bundle_library,
    open_sessions,
)
from care_compress.device.infer import Asked
from care_compress.device.layer_times import explain
from care_compress.device.manifest import FLOAT, Bundle, precision_of
from care_compress.device.power import find_rails
from care_compress.device.problems import EngineMismatchError
from care_compress.device.results import ENGINE_RESULTS, engine_record, merge_results
from care_compress.device.samples import verify_samples
from care_compress.device.timing import verdict
from care_compress.device.tune import tune
from care_compress.device.verbs import (
    BuildProgress,
    format_table,
    make_parser,
    run_command,
    say,
    show_bundle,
    show_facts,
    show_verified,
    wanted_models,
)
from care_compress.device.watch import read_moment

LIBRARIES = ("tensorrt", "tensorrt_rtx")


def main(arguments: Sequence[str] | None = None, host: Host = REAL_HOST) -> int:
    """Run one verb; the exit code."""
    work = {
        "build": partial(_build, host),
        "verify": partial(_verify, host),
        "tune": partial(_tune, host),
        "bench": partial(_bench, host),
        "infer": partial(_infer, host),
        "info": partial(_info, host),
    }
    about = "Build, check and measure the TensorRT engines of a care-compress bundle."
    parser, verbs = make_parser(about, tuple(work), ("int8", "fp8", FLOAT), "engine")
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
    verbs["tune"].add_argument(
        "--seconds", type=float, default=5.0, help="for each candidate (default 5)"
    )
    for verb in ("bench", "tune"):
        verbs[verb].add_argument(
            "--power-mode", metavar="NAME", help="where nvpmodel cannot be asked: in a container"
        )
    return run_command(parser, arguments, LIBRARIES, work)


def _build(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    models = wanted_models(bundle, options, bundle.usual_models)
    for leftover in bundle.folder.glob(".*.tmp"):
        leftover.unlink()  # of a build that was killed while it wrote
    library = bundle_library(host, bundle)
    # An engine is built on the GPU it will run on.
    gpu = None if library.is_rtx else host.load_cuda().gpu()
    built = {}
    with BuildProgress() as progress:
        for model in models:
            settings = BuildOptions(
                precision=precision_of(model),
                optimization_level=options.optimization_level,
                workspace_mib=options.workspace,
                version_compatible=options.version_compatible,
                strip_plan=options.strip_plan,
                timing_cache=None if options.no_timing_cache else bundle.timing_cache,
                batch=None if options.batch is None else tuple(options.batch),
            )
            file, digest, engine = bundle.file(model), bundle.sha256(model), bundle.engine(model)
            notify = partial(progress.show, model)
            built[model] = build_file(library, gpu, file, digest, engine, settings, notify)
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
    for warning in BoardSetting.of(host.root, None).warnings():
        print(f"take note: {warning}", file=sys.stderr)
    print("The layers, one by one, are in the .json beside each engine. Next: verify")
    return 0


def _verify(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    models = _built_models(bundle, options)
    with open_sessions(host, bundle, models) as (library, cuda, sessions, engines):
        verified = verify_samples(sessions, bundle, say)
        board = describe_board(host.root, library, cuda)
    records = {model: one.as_record(bundle.limits(model)) for model, one in verified.items()}
    _merge(bundle, board, engines, "accuracy", records)
    return show_verified(verified, bundle)


def _bench(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    models = _built_models(bundle, options)
    setting = BoardSetting.of(host.root, options.power_mode)
    with open_sessions(host, bundle, models) as (library, cuda, sessions, engines):
        board = describe_board(host.root, library, cuda)
        captured = capture_graphs(sessions, not options.no_cuda_graph, say)
        benched = bench_sessions(
            sessions, bundle, cuda, host.root, setting, captured, options.seconds, say
        )
        layers = explain(sessions, engines, benched, say)
    _merge(bundle, board, engines, "speed", benched.as_records())
    _merge(bundle, board, engines, "layer_times", layers)
    show_benched(benched)
    model, plain = benched.fastest(quantized=True), benched.fastest(quantized=False)
    if model is not None and plain is not None:
        fallback = f"use {bundle.engine(plain).name} on this board"
        print(verdict(benched.timings, model, plain, fallback))
    for warning in benched.warnings():
        print(f"take note: {warning}", file=sys.stderr)
    print(f"Written to {bundle.results}")
    return 0


def _tune(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    models = wanted_models(bundle, options, bundle.models)
    return tune(host, bundle, models, options.power_mode, options.seconds)


def _infer(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    model, why = choose_engine(bundle, _built_models(bundle, options))
    say(f"using {bundle.engine(model).name}: {why}")
    asked = Asked.of(bundle, options.images, options.out)
    with open_sessions(host, bundle, [model]) as (_, _, sessions, _):
        asked.answer(sessions[model], model, options.top)
    return 0


def _info(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    engines = ", ".join(m for m in bundle.models if bundle.engine(m).is_file()) or "none"
    show_bundle(bundle, {"engines": engines, "needs": str(bundle.manifest["requirement"])})
    # Printed first: the bundle can be told also where TensorRT or the GPU is missing.
    board = describe_board(host.root, bundle_library(host, bundle), host.load_cuda())
    setting = BoardSetting.of(host.root, None)
    rails = find_rails(host.root)
    now = read_moment(host.root, rails)
    show_facts(
        {
            **board,
            **setting.as_record(),
            "gpu_mhz": now.gpu_mhz,
            "cpu_mhz": now.cpu_mhz,
            "temperatures_c": now.temperatures_c,
            "throttled": ", ".join(now.throttles) or None,
            "rails": ", ".join(rail.name for rail in rails) or None,
            "watts": now.watts,
        }
    )
    for warning in setting.warnings():
        print(f"take note: {warning}", file=sys.stderr)
    return 0


def _built_models(bundle: Bundle, options: argparse.Namespace) -> tuple[str, ...]:
    """Those of the wanted models that have an engine."""
    wanted = wanted_models(bundle, options, bundle.models)
    found = tuple(model for model in wanted if bundle.engine(model).is_file())
    if not found:
        raise EngineMismatchError(
            "there is no engine yet.", "build first: python3 care_deploy.py build"
        )
    return found


def _merge(
    bundle: Bundle,
    board: Mapping[str, Any],
    engines: Mapping[str, Mapping[str, Any]],
    part: str,
    values: Mapping[str, Mapping[str, Any]],
) -> None:
    """Add to results.json what tells one engine from another, and what was found of each."""
    about = {model: engine_record(bundle, model, engine) for model, engine in engines.items()}
    merge_results(bundle, ENGINE_RESULTS, board, about, part, values)


if __name__ == "__main__":
    sys.exit(main())
