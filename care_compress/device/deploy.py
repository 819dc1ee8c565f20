"""Engines on this device: built from a graph, and opened from a bundle.

`Host` is the one seam to the machine; tests put another library and another CUDA there.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from care_compress.device.build import BuildOptions, Notify, build_engine
from care_compress.device.cuda import Cuda, CudaGpu, load_cuda
from care_compress.device.enginefile import EngineOrigin, read_engine, write_engine
from care_compress.device.library import Library, load_library, required_library
from care_compress.device.manifest import Bundle, satisfies
from care_compress.device.problems import TensorRtMissingError
from care_compress.device.session import Session


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
        "traffic": None if built.moved is None else asdict(built.moved),
        "precisions": dict(sorted(Counter(row.precision for row in built.layers).items())),
        "layers": [asdict(row) for row in built.layers],
    }
    return write_engine(engine, built.plan, origin, details)


def open_engine(
    library: Library, cuda: Cuda, engine: Path, onnx: Path, onnx_sha256: str
) -> tuple[Session, dict[str, Any]]:
    """Load one engine that was built from this graph; the session and the engine's description."""
    plan, description = read_engine(engine, library, cuda.gpu(), onnx_sha256)
    refit_from = onnx if description.get("stripped") else None
    return Session(library, cuda, plan, refit_from), description


@contextlib.contextmanager
def open_sessions(
    host: Host, bundle: Bundle, models: Sequence[str]
) -> Iterator[tuple[Library, Cuda, dict[str, Session], dict[str, dict[str, Any]]]]:
    """Load engines, each checked against its description; everything is freed at the end."""
    library = bundle_library(host, bundle)
    cuda = host.load_cuda()
    with contextlib.ExitStack() as stack:
        sessions: dict[str, Session] = {}
        descriptions: dict[str, dict[str, Any]] = {}
        for model in models:
            session, descriptions[model] = open_engine(
                library, cuda, bundle.engine(model), bundle.file(model), bundle.sha256(model)
            )
            sessions[model] = stack.enter_context(session)
        yield library, cuda, sessions, descriptions
