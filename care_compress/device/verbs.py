"""What the command lines on devices have in common: how a verb ends, and what it prints."""

import argparse
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from care_compress.device.manifest import Bundle, open_bundle
from care_compress.device.problems import DeployError
from care_compress.device.samples import Verified
from care_compress.device.timing import Timing

VERIFY_HEADER = "model|images|top-1 %|expected %|agreement %|SQNR dB|max dev.|".split("|")


def run_verb(
    options: argparse.Namespace,
    libraries: Sequence[str],
    work: Callable[[Bundle, argparse.Namespace], int],
) -> int:
    """Run one verb; 0: fine, 1: a model's answers are wrong, 2: it could not be done."""
    try:
        # Before anything else, whatever the verb: a changed file makes every answer worthless.
        bundle = open_bundle(options.bundle, libraries)
        return work(bundle, options)
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


def shared_options() -> argparse.ArgumentParser:
    """The options of every verb."""
    shared = argparse.ArgumentParser(add_help=False)
    here = Path(sys.argv[0]).resolve().parent  # the script is a zip: no file of its own lies there
    shared.add_argument(
        "--bundle", type=Path, default=here, help="the unpacked bundle (default: this file's)"
    )
    shared.add_argument("--debug", action="store_true", help="show tracebacks")
    return shared


def choice_options(models: Sequence[str]) -> argparse.ArgumentParser:
    """Options that choose one of the models: ``--int8-only``."""
    which = argparse.ArgumentParser(add_help=False)
    only = which.add_mutually_exclusive_group()
    for model in models:
        only.add_argument(f"--{model}-only", dest="only", action="store_const", const=model)
    return which


def wanted_models(bundle: Bundle, options: argparse.Namespace) -> tuple[str, ...]:
    """The models of the bundle that were asked for."""
    if options.only is None:
        return bundle.models
    if options.only not in bundle.models:
        raise DeployError(
            f"this bundle has no {options.only} model.", f"it has {', '.join(bundle.models)}"
        )
    return (options.only,)


def show_verified(verified: Mapping[str, Verified], limits: Mapping[str, float]) -> int:
    """Print how the models compare; the exit code."""
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
    demand = f"agreement of {limits['agreement']} % and SQNR of {limits['sqnr_db']} dB"
    if all(result.passed for result in verified.values()):
        print(f"PASSED: every model reaches an {demand}.")
        return 0
    print(f"FAILED: not every model reaches an {demand}.")
    return 1


def show_timings(timings: Mapping[str, Timing]) -> None:
    """Print the latency of each model."""
    rows = [["model", "batch", "runs", "p50 ms", "p90 ms", "p99 ms", "images/s"]]
    for model, timing in timings.items():
        latencies = [f"{timing.percentile(percent):.3f}" for percent in (50, 90, 99)]
        counts = [str(timing.batch), str(len(timing.milliseconds))]
        rows.append([model, *counts, *latencies, f"{timing.throughput:.0f}"])
    print(format_table(rows))


def show_classes(
    files: Sequence[Path], model: str, found: Sequence[Sequence[tuple[str, float]]]
) -> None:
    """Print the likeliest classes of each picture."""
    for file, classes in zip(files, found, strict=True):
        print(f"{file} ({model})")
        print(format_table([[f"{100 * odds:5.1f} %", name] for name, odds in classes]))


def show_facts(facts: Mapping[str, object]) -> None:
    """Print what is known, a line each."""
    known = [[key, str(value)] for key, value in facts.items() if value not in (None, {})]
    print(format_table(known))


def format_table(rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces, so that a log or a mail shows them too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    """Tell what is going on, beside what is printed."""
    print(text, file=sys.stderr, flush=True)
