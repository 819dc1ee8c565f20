"""What the command lines on devices have in common: how a verb ends, and what it prints."""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from care_compress.device.answers import Answers, answers_of
from care_compress.device.manifest import Bundle, open_bundle
from care_compress.device.problems import DeployError
from care_compress.device.samples import DeviceAgreement
from care_compress.device.timing import Timing

_HELP = {
    "build": "build the engines here",
    "verify": "compare with the export",
    "tune": "build every variant, keep the fastest",
    "bench": "measure the latency",
    "infer": "answer pictures of your own",
    "info": "say what is here",
}
# What a shell reports of a program that a broken pipe ended: 128 + SIGPIPE.
_BROKEN_PIPE = 141

Work = Callable[[Bundle, argparse.Namespace], int]


def make_parser(
    description: str, names: Sequence[str], models: Sequence[str], timed: str
) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The command line with the options that all devices have, and the parser of each verb.

    Options such as ``--int8-only`` choose one of `models`; `timed` is what "bench" measures.
    """
    shared = argparse.ArgumentParser(add_help=False)
    here = Path(sys.argv[0]).resolve().parent  # the script is a zip: no file of its own lies there
    shared.add_argument(
        "--bundle", type=Path, default=here, help="the unpacked bundle (default: this file's)"
    )
    shared.add_argument("--debug", action="store_true", help="show tracebacks")
    which = argparse.ArgumentParser(add_help=False)
    only = which.add_mutually_exclusive_group()
    for model in models:
        only.add_argument(f"--{model}-only", dest="only", action="store_const", const=[model])
    only.add_argument(
        "--model", dest="only", action="append", metavar="NAME", help="one of these, or several"
    )
    parser = argparse.ArgumentParser(description=description)
    adding = parser.add_subparsers(required=True, metavar="VERB", dest="verb")
    verbs = {}
    for name in names:
        parents = [shared] if name == "info" else [shared, which]
        verbs[name] = adding.add_parser(name, parents=parents, help=_HELP[name])
    verbs["bench"].add_argument(
        "--seconds", type=float, default=10.0, help=f"for each {timed} (default 10)"
    )
    verbs["infer"].add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    verbs["infer"].add_argument("--top", type=int, metavar="N", help="lines for each picture")
    verbs["infer"].add_argument(
        "--out", type=Path, metavar="PATH", help="where masks or boxes are drawn: a folder or a PNG"
    )
    return parser, verbs


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    libraries: Sequence[str],
    work: Mapping[str, Work],
) -> int:
    """Run the verb that the command line names; the exit code.

    Where the output is read no further, as by ``| head``, it ends without a word.
    """
    try:
        try:
            options = parser.parse_args(arguments)
            return run_verb(options, libraries, work[options.verb])
        finally:
            sys.stdout.flush()  # what is written at Python's own end can be caught no more
    except OSError as error:  # of the output itself: others end in run_verb
        broken = isinstance(error, BrokenPipeError)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        # Python would try once more, when it ends, to write what still waits in them.
        for stream in (sys.stdout, sys.stderr) if broken else (sys.stdout,):
            os.dup2(nowhere, stream.fileno())
        if broken:
            return _BROKEN_PIPE
        print(f"{error} Fix: make room for the output", file=sys.stderr)
        return 2


def run_verb(options: argparse.Namespace, libraries: Sequence[str], work: Work) -> int:
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
    except BrokenPipeError:
        raise
    except OSError as error:
        if options.debug:
            traceback.print_exc()
        print(f"{error} Fix: make the bundle's folder readable and writable", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def wanted_models(
    bundle: Bundle, options: argparse.Namespace, default: Sequence[str]
) -> tuple[str, ...]:
    """The models of the bundle that were asked for."""
    for model in options.only or ():
        if model not in bundle.models:
            raise DeployError(
                f"this bundle has no {model:.60} model.", f"it has {', '.join(bundle.models)}"
            )
    return tuple(dict.fromkeys(options.only or default))


def verify_header(answers: Answers) -> list[str]:
    """The columns of verify's table."""
    return ["model", "images", *answers.compared.values(), "SQNR dB", "least", "max dev.", ""]


def show_verified(verified: Mapping[str, DeviceAgreement], bundle: Bundle) -> int:
    """Print how the models compare; the exit code."""
    rows = [verify_header(answers_of(bundle))]
    passed = {model: found.meets(bundle.limits(model)) for model, found in verified.items()}
    for model, found in verified.items():
        rows.append(
            [
                model,
                str(found.images),
                *(f"{percent:.1f}" for percent in found.compared.values()),
                f"{found.sqnr_db:.1f}",
                f"{bundle.limits(model)['sqnr_db']:.1f}",
                f"{found.max_deviation:.4f}",
                "passed" if passed[model] else "FAILED",
            ]
        )
    print(format_table(rows))
    least = {f"{bundle.limits(model)['agreement']:g}" for model in verified}
    demand = f"its least SQNR and an agreement of {' or '.join(sorted(least))} %"
    if all(passed.values()):
        print(f"PASSED: every model reaches {demand}.")
        return 0
    print(f"FAILED: not every model reaches {demand}.")
    return 1


def show_timings(timings: Mapping[str, Timing]) -> None:
    """Print the latency of each model."""
    rows = [["model", "batch", "runs", "p50 ms", "p90 ms", "p99 ms", "images/s"]]
    for model, timing in timings.items():
        latencies = [f"{timing.percentile(percent):.3f}" for percent in (50, 90, 99)]
        counts = [str(timing.batch), str(len(timing.milliseconds))]
        rows.append([model, *counts, *latencies, f"{timing.throughput:.0f}"])
    print(format_table(rows))


def show_bundle(bundle: Bundle, facts: Mapping[str, str]) -> None:
    """Print what the bundle is, and more that is known of it."""
    about = bundle.manifest
    first = f"run {about['run']}, recipe {about['recipe']}, target {about['target']}"
    show_facts({"bundle": first, "task": bundle.task, "models": ", ".join(bundle.models), **facts})


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


class BuildProgress:
    """One line of a terminal that moves on, or one line for each phase in a log."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()

    def show(self, what: str, phase: str, done: "float | None") -> None:
        """Tell a phase of something, and the part of it that is done."""
        text = f"{what}: {phase}" if done is None else f"{what}: {phase} {done:4.0%}"
        if self._terminal:
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
        elif done is None:
            say(text)

    def __enter__(self) -> "BuildProgress":
        return self

    def __exit__(self, *failure: object) -> None:
        if self._terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def say(text: str) -> None:
    """Tell what is going on, beside what is printed."""
    print(text, file=sys.stderr, flush=True)
