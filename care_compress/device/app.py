"""The command line on the device: ``python3 care_deploy.py build``, then ``verify``, ``bench``."""

import argparse
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from care_compress.device.board import describe_board, read_conditions
from care_compress.device.build import BuildOptions
from care_compress.device.deploy import (
    REAL_HOST,
    Host,
    bench_models,
    build_models,
    built_models,
    bundle_library,
    classify_files,
    verify_models,
)
from care_compress.device.manifest import Bundle, open_bundle
from care_compress.device.problems import DeployError
from care_compress.device.results import results_path
from care_compress.device.timing import BenchPlan, verdict

VERIFY_HEADER = "engine|images|top-1 %|expected %|agreement %|SQNR dB|max dev.|".split("|")


def main(arguments: Sequence[str] | None = None, host: Host = REAL_HOST) -> int:
    """Run one verb; 0: fine, 1: the engine's answers are wrong, 2: it could not be done."""
    options = _parser().parse_args(arguments)
    try:
        # Before anything else, whatever the verb: a changed file makes every answer worthless.
        bundle = open_bundle(options.bundle)
        return int(options.work(host, bundle, options))
    except DeployError as error:
        if options.debug:
            traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if options.debug:
            traceback.print_exc()
        print(f"{error} Fix: make the bundle's folder readable and writable", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    here = Path(__file__).resolve().parent
    shared.add_argument(
        "--bundle", type=Path, default=here, help="the unpacked bundle (default: this file's)"
    )
    shared.add_argument("--debug", action="store_true", help="show tracebacks")
    which = argparse.ArgumentParser(add_help=False)
    only = which.add_mutually_exclusive_group()
    only.add_argument("--int8-only", dest="only", action="store_const", const="int8")
    only.add_argument("--fp16-only", dest="only", action="store_const", const="fp16")
    parser = argparse.ArgumentParser(
        description="Build, check and measure the TensorRT engines of a care-compress bundle."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    build = verbs.add_parser("build", parents=[shared, which], help="build the engines here")
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
    build.set_defaults(work=_build)
    verify = verbs.add_parser("verify", parents=[shared, which], help="compare with the export")
    verify.set_defaults(work=_verify)
    bench = verbs.add_parser("bench", parents=[shared, which], help="measure the latency")
    bench.add_argument("--seconds", type=float, default=10.0, help="for each engine (default 10)")
    bench.add_argument("--no-cuda-graph", action="store_true")
    bench.set_defaults(work=_bench)
    infer = verbs.add_parser("infer", parents=[shared, which], help="classify image files")
    infer.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    infer.add_argument("--top", type=int, default=5)
    infer.set_defaults(work=_infer)
    info = verbs.add_parser("info", parents=[shared], help="say what is here")
    info.set_defaults(work=_info)
    return parser


def _wanted(bundle: Bundle, options: argparse.Namespace) -> tuple[str, ...]:
    if options.only is None:
        return bundle.models
    if options.only not in bundle.models:
        raise DeployError(
            f"this bundle has no {options.only} model.", f"it has {', '.join(bundle.models)}"
        )
    return (options.only,)


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
    built = build_models(host, bundle, _wanted(bundle, options), settings, _show_progress)
    _end_progress()
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
    models = built_models(bundle, _wanted(bundle, options))
    verified = verify_models(host, bundle, models, _say)
    rows = [VERIFY_HEADER]
    for model, result in verified.items():
        found = result.agreement
        rows.append(
            [
                model,
                str(found.images),
                f"{found.top1:.1f}",
                f"{found.expected_top1:.1f}",
                f"{found.agreement:.1f}",
                f"{found.sqnr_db:.1f}",
                f"{found.max_deviation:.4f}",
                "passed" if result.passed else "FAILED",
            ]
        )
    print(format_table(rows))
    limits = bundle.manifest["limits"]
    demand = f"agreement of {limits['agreement']} % and SQNR of {limits['sqnr_db']} dB"
    if all(result.passed for result in verified.values()):
        print(f"PASSED: every engine reaches an {demand}.")
        return 0
    print(f"FAILED: not every engine reaches an {demand}.")
    return 1


def _bench(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    models = built_models(bundle, _wanted(bundle, options))
    plan = BenchPlan(seconds=options.seconds, cuda_graph=not options.no_cuda_graph)
    measured = bench_models(host, bundle, models, plan, _say)
    timings = measured.timings
    rows = [["engine", "batch", "runs", "p50 ms", "p90 ms", "p99 ms", "images/s"]]
    for model, timing in timings.items():
        latencies = [f"{timing.percentile(percent):.3f}" for percent in (50, 90, 99)]
        counts = [str(timing.batch), str(len(timing.milliseconds))]
        rows.append([model, *counts, *latencies, f"{timing.throughput:.0f}"])
    print(format_table(rows))
    if sentence := verdict(timings):
        print(sentence)
    power = measured.before["power_mode"] or "unknown"
    print(f"CUDA graph: {'yes' if plan.cuda_graph else 'no'}; power mode: {power}")
    print(f"before: {_conditions(measured.before)}; after: {_conditions(measured.after)}")
    print(f"Written to {results_path(bundle)}")
    return 0


def _conditions(state: Mapping[str, Any]) -> str:
    clock = "?" if state["gpu_mhz"] is None else f"{state['gpu_mhz']:.0f}"
    hottest = max(state["temperatures_c"].values(), default=None)
    heat = "?" if hottest is None else f"{hottest:.0f}"
    return f"GPU at {clock} MHz, {heat} °C at most"


def _infer(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    built = built_models(bundle, _wanted(bundle, options))
    model = "int8" if "int8" in built else built[0]
    found = classify_files(host, bundle, model, options.images, options.top)
    for file, classes in found.items():
        print(f"{file} ({model})")
        print(format_table([[f"{100 * odds:5.1f} %", name] for name, odds in classes]))
    return 0


def _info(host: Host, bundle: Bundle, options: argparse.Namespace) -> int:
    about = bundle.manifest
    rows = [
        ["bundle", f"run {about['run']}, recipe {about['recipe']}, target {about['target']}"],
        ["models", ", ".join(bundle.models)],
        ["engines", ", ".join(m for m in bundle.models if bundle.engine(m).is_file()) or "none"],
        ["needs", str(about["requirement"])],
    ]
    print(format_table(rows))
    # Printed first: the bundle can be told also where TensorRT or the GPU is missing.
    board = describe_board(host.root, bundle_library(host, bundle), host.load_cuda())
    facts = {**board, **read_conditions(host.root)}
    print(format_table([[key, str(value)] for key, value in facts.items() if value is not None]))
    return 0


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, so that a log or a mail shows them too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _show_progress(phase: str, done: float | None) -> None:
    text = phase if done is None else f"{phase} {done:4.0%}"
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif done is None:
        print(text, file=sys.stderr, flush=True)


def _end_progress() -> None:
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
