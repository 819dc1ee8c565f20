"""The work behind the verbs: build the engines of a bundle, verify them, measure them.

`Host` is the one seam to the machine; tests put another library and another CUDA there.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from care_compress.device.board import describe_board, read_conditions
from care_compress.device.build import BuildOptions, build_engine
from care_compress.device.compare import Agreement, compare_logits
from care_compress.device.cuda import Cuda, Gpu, load_cuda
from care_compress.device.enginefile import EngineOrigin, read_engine, write_engine
from care_compress.device.images import load_pixels, normalize_pixels
from care_compress.device.layers import precision_counts
from care_compress.device.library import Library, load_library, required_library, satisfies
from care_compress.device.manifest import Bundle
from care_compress.device.problems import EngineMismatchError, TensorRtMissingError
from care_compress.device.progress import Notify
from care_compress.device.results import merge_results
from care_compress.device.session import FloatArray, Session
from care_compress.device.timing import BenchPlan, Timing, measure

# Normalized floats of so many images are in memory at a time.
_IMAGES_AT_ONCE = 32


@dataclass(frozen=True)
class Host:
    """Where TensorRT, CUDA and the system's files come from."""

    load_library: Callable[[str], Library]
    load_cuda: Callable[[], Cuda]
    root: Path


REAL_HOST = Host(load_library, load_cuda, Path("/"))


@dataclass(frozen=True)
class Verified:
    """One engine's answers."""

    agreement: Agreement
    passed: bool


@dataclass(frozen=True)
class Measured:
    """Timings, and how the board was before and after them."""

    timings: dict[str, Timing]
    before: dict[str, Any]
    after: dict[str, Any]


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
    gpu: Gpu | None,
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
        "precisions": precision_counts(built.layers),
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
    return {
        model: build_file(
            library,
            gpu,
            bundle.onnx(model),
            bundle.onnx_sha256(model),
            bundle.engine(model),
            replace(options, precision=model),
            _named(notify, model),
        )
        for model in models
    }


def _named(notify: Notify, model: str) -> Notify:
    def tell(phase: str, done: float | None) -> None:
        notify(f"{model}: {phase}", done)

    return tell


def built_models(bundle: Bundle, wanted: Sequence[str]) -> tuple[str, ...]:
    """Those of the wanted models that have an engine."""
    found = tuple(model for model in wanted if bundle.engine(model).is_file())
    if not found:
        raise EngineMismatchError(
            "there is no engine yet.", "build first: python3 care_deploy.py build"
        )
    return found


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
                bundle.engine(model), library, gpu, bundle.onnx_sha256(model)
            )
            refit_from = bundle.onnx(model) if description.get("stripped") else None
            sessions[model] = stack.enter_context(Session(library, cuda, plan, refit_from))
            descriptions[model] = description
        yield library, cuda, sessions, descriptions


def verify_models(
    host: Host, bundle: Bundle, models: Sequence[str], notify: Callable[[str], None]
) -> dict[str, Verified]:
    """Run the bundle's samples through its engines and note how they compare."""
    pixels_NCHW, labels_N = bundle.array("pixels"), bundle.array("labels")
    verified, records = {}, {}
    with open_sessions(host, bundle, models) as (library, cuda, sessions, descriptions):
        for model, session in sessions.items():
            notify(f"verifying {model} on {len(pixels_NCHW)} images")
            logits_NK = run_pixels(session, bundle, pixels_NCHW)
            agreement = compare_logits(logits_NK, bundle.array(f"logits_{model}"), labels_N)
            passed = agreement.meets(bundle.manifest["limits"])
            verified[model] = Verified(agreement, passed)
            records[model] = {**asdict(agreement), "passed": passed}
        board = describe_board(host.root, library, cuda)
    merge_results(bundle, board, descriptions, "accuracy", records)
    return verified


def run_pixels(session: Session, bundle: Bundle, pixels_NCHW: Any) -> FloatArray:
    """Logits of uint8 pixels."""
    mean, std = bundle.manifest["mean"], bundle.manifest["std"]
    return np.concatenate(
        [
            session.run(normalize_pixels(pixels_NCHW[first : first + _IMAGES_AT_ONCE], mean, std))
            for first in range(0, len(pixels_NCHW), _IMAGES_AT_ONCE)
        ]
    )


def bench_models(
    host: Host,
    bundle: Bundle,
    models: Sequence[str],
    plan: BenchPlan,
    notify: Callable[[str], None],
) -> Measured:
    """Measure the engines in turns and note it with the board's state before and after."""
    with open_sessions(host, bundle, models) as (library, cuda, sessions, descriptions):
        board = describe_board(host.root, library, cuda)
        before = read_conditions(host.root)
        timings = measure(cuda, sessions, plan, notify)
        after = read_conditions(host.root)
    records = {model: timing_record(timing, before, after) for model, timing in timings.items()}
    merge_results(bundle, board, descriptions, "speed", records)
    return Measured(timings, before, after)


def timing_record(timing: Timing, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """A measurement as it stands in results.json."""
    return {
        "batch": timing.batch,
        "cuda_graph": timing.cuda_graph,
        "runs": len(timing.milliseconds),
        "seconds": round(timing.seconds, 3),
        "latency_ms": {f"p{percent}": timing.percentile(percent) for percent in (50, 90, 99)},
        "throughput": timing.throughput,
        "before": before,
        "after": after,
    }


def classify_files(
    host: Host, bundle: Bundle, model: str, files: Sequence[Path], top: int
) -> dict[Path, list[tuple[str, float]]]:
    """The likeliest classes of image files, each with its probability."""
    about = bundle.manifest
    pixels_NCHW = np.stack(
        [
            load_pixels(file, about["resolution"], about["crop_pct"], about["exif_rotate"])
            for file in files
        ]
    )
    with open_sessions(host, bundle, [model]) as (_, _, sessions, _):
        logits_NK = run_pixels(sessions[model], bundle, pixels_NCHW)
    odds_NK = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    odds_NK /= odds_NK.sum(axis=1, keepdims=True)
    return {
        file: [(str(about["classes"][k]), float(odds_K[k])) for k in np.argsort(-odds_K)[:top]]
        for file, odds_K in zip(files, odds_NK, strict=True)
    }
