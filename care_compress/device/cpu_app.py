"""The command line on a machine without a GPU: ``python3 care_deploy.py verify``, then ``bench``.

The exported files run as they are, in the runtime that the bundle names.
"""

import argparse
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from care_compress.device.cpu_session import (
    LIBRARIES,
    CpuRuntime,
    CpuSession,
    load_cpu_runtime,
    open_file,
)
from care_compress.device.infer import Asked
from care_compress.device.manifest import (
    Bundle,
    required_module,
)
from care_compress.device.problems import ProcessorError
from care_compress.device.processor import (
    DOT_PRODUCTS,
    Processor,
    check_processor,
    dot_product_limit,
    read_processor,
)
from care_compress.device.results import CPU_RESULTS, merge_results
from care_compress.device.samples import run_pixels, verify_samples
from care_compress.device.sensors import (
    CPUS,
    is_busy,
    read_board_name,
    read_cpu_clock,
    read_load,
    read_temperatures,
    scaling_governor,
)
from care_compress.device.timing import BenchPlan, Measured, Timed, measure, verdict
from care_compress.device.verbs import (
    make_parser,
    run_command,
    say,
    show_bundle,
    show_facts,
    show_timings,
    show_verified,
    wanted_models,
)

FLOAT = "fp32"  # the model that a quantized one has to beat


def main(arguments: Sequence[str] | None = None, root: Path = Path("/")) -> int:
    """Run one verb; the exit code. `root` is where the system's files lie."""
    work = {
        "verify": partial(_verify, root),
        "bench": partial(_bench, root),
        "infer": partial(_infer, root),
        "info": partial(_info, root),
    }
    about = "Check and measure the files of a care-compress bundle on this processor."
    parser, verbs = make_parser(about, tuple(work), ("int8", FLOAT), "model")
    verbs["bench"].add_argument(
        "--threads", type=int, default=1, help="for one inference (default 1)"
    )
    return run_command(parser, arguments, LIBRARIES, work)


def _verify(root: Path, bundle: Bundle, options: argparse.Namespace) -> int:
    box = _open(root, bundle, wanted_models(bundle, options, bundle.models), 1)
    verified = verify_samples(box.sessions, bundle, say)
    records = {model: one.as_record(bundle.limits(model)) for model, one in verified.items()}
    box.merge(bundle, "accuracy", records)
    return show_verified(verified, bundle)


def _bench(root: Path, bundle: Bundle, options: argparse.Namespace) -> int:
    threads = options.threads
    box = _open(root, bundle, wanted_models(bundle, options, bundle.models), threads)
    pixels_NCHW = bundle.array("pixels")
    for session in box.sessions.values():
        # What is timed are real images: some operations are faster on zeros.
        run_pixels(session, bundle, pixels_NCHW[: session.batch])
    before = read_cpu_conditions(root)
    timed = {model: Timed(one.batch, one.timed_run) for model, one in box.sessions.items()}
    timings = measure(timed, BenchPlan(options.seconds), say)
    measured = Measured(timings, before, read_cpu_conditions(root))
    box.merge(bundle, "speed", measured.as_records({"threads": threads}))
    show_timings(timings)
    model = _first(timings)
    if said := verdict(timings, model, FLOAT, f"use {bundle.file(FLOAT).name} on this processor"):
        print(said)
    print(f"{threads} thread{'s' if threads > 1 else ''}, floats in {box.runtime.floats_in}")
    if is_busy(before["load_average"], box.processor.cores):
        print("Other programs were at work: stop them and measure again.")
    print(f"before: {_conditions(before)}; after: {_conditions(measured.after)}")
    print(f"Written to {bundle.results}")
    return 0


def _infer(root: Path, bundle: Bundle, options: argparse.Namespace) -> int:
    model = _first(wanted_models(bundle, options, bundle.models))
    asked = Asked.of(bundle, options.images, options.out)
    asked.answer(_open(root, bundle, (model,), 1).sessions[model], model, options.top)
    return 0


def _info(root: Path, bundle: Bundle, options: argparse.Namespace) -> int:
    requirement, processor = str(bundle.manifest["requirement"]), read_processor(root)
    needs = [f"{bundle.file(m).name}: {bundle.needs(m)}" for m in bundle.models if bundle.needs(m)]
    show_bundle(bundle, {"needs": ", ".join([requirement, *needs])})
    dots = {True: "yes", False: "no", None: "not told by the system"}[processor.dot_products]
    features = None if processor.features is None else " ".join(processor.features)
    show_facts(
        {
            "name": box_name(root, processor),
            "processor": processor.name,
            "architecture": processor.architecture,
            "cores": processor.cores,
            DOT_PRODUCTS: dots,
            "features": features,
            **read_cpu_conditions(root),
        }
    )
    # Last: the bundle and the processor can be told also where the runtime is missing.
    check_processor(processor)
    runtime = load_cpu_runtime(requirement)
    show_facts({"runtime": f"{runtime.name} {runtime.version}", "floats in": runtime.floats_in})
    return 0


@dataclass(frozen=True)
class Box:
    """A machine with its runtime and the opened files."""

    root: Path
    processor: Processor
    runtime: CpuRuntime
    sessions: dict[str, CpuSession]

    def merge(self, bundle: Bundle, part: str, values: Mapping[str, Mapping[str, Any]]) -> None:
        """Add to results.json what was found, beside what tells this machine from others."""
        board = {
            "name": box_name(self.root, self.processor),
            "processor": self.processor.name,
            "cores": self.processor.cores,
            "integer_dot_products": self.processor.dot_products,
            "library": self.runtime.name,
            "library_version": self.runtime.version,
            "python": platform.python_version(),
            "architecture": self.processor.architecture,
        }
        about = {
            model: {
                "sha256": bundle.sha256(model),
                "size_bytes": sum(path.stat().st_size for path in bundle.files(model)),
                "floats_in": self.runtime.floats_in,
            }
            for model in values
        }
        merge_results(bundle, CPU_RESULTS, board, about, part, values)


def _open(root: Path, bundle: Bundle, models: Sequence[str], threads: int) -> Box:
    """Open some models; first whatever may be wrong with the machine is named."""
    processor = read_processor(root)
    check_processor(processor)
    requirement = str(bundle.manifest["requirement"])
    is_openvino = required_module(requirement) == "openvino"
    limit = dot_product_limit(os.environ) if is_openvino else None
    for model in models:
        need, file = bundle.needs(model), bundle.file(model).name
        if not need or (need == DOT_PRODUCTS and processor.dot_products and limit is None):
            continue
        # Its answers would be wrong here.
        if limit is not None:
            raise ProcessorError(
                f"{file} needs {need}, which {limit}={os.environ[limit]} switches off.",
                f"unset {limit}",
            )
        has = "does not say whether it has" if processor.dot_products is None else "has no"
        others = [f"--{other}-only" for other in bundle.models if not bundle.needs(other)]
        use = f", or use {others[0]}" if others else ""
        raise ProcessorError(
            f"{file} needs {need}; this processor ({processor.name}) {has} {need}.",
            f"bundle a run without quantize.full_range, which is right on every processor{use}",
        )
    if not 1 <= threads <= processor.cores:
        raise ProcessorError(
            f"{threads} threads do not fit the {processor.cores} cores here.",
            f"give --threads from 1 to {processor.cores}",
        )
    runtime = load_cpu_runtime(requirement)
    shape = bundle.input_shape
    sessions = {model: open_file(runtime, bundle.file(model), shape, threads) for model in models}
    return Box(root, processor, runtime, sessions)


def box_name(root: Path, processor: Processor) -> str:
    """The name of the board, or of the processor of a machine that has none."""
    return read_board_name(root) or processor.name


def read_cpu_conditions(root: Path) -> dict[str, Any]:
    """How the clocks are set, how much else runs, and how warm it is, at this moment."""
    return {
        "governor": scaling_governor(root / CPUS),
        "load_average": read_load(root),
        "cpu_mhz": read_cpu_clock(root),
        "temperatures_c": read_temperatures(root),
    }


def _conditions(state: Mapping[str, Any]) -> str:
    hottest = max(state["temperatures_c"].values(), default=None)
    known = {
        "governor {}": state["governor"],
        "load average {:.1f}": state["load_average"],
        "{:.0f} MHz": state["cpu_mhz"],
        "{:.0f} °C at most": hottest,
    }
    said = [text.format(value) for text, value in known.items() if value is not None]
    return ", ".join(said) or "nothing is told"


def _first(models: Iterable[str]) -> str:
    """The quantized model, or the float one where there is no other."""
    return next((model for model in models if model != FLOAT), FLOAT)


if __name__ == "__main__":
    sys.exit(main())
