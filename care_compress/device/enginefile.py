"""An engine on the disk and the small JSON beside it, which is checked before the engine is read.

TensorRT does not forgive a wrong plan: between versions it refuses with a number, and a plan for
another GPU may load and then fail. So every engine says what it was built from and for.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from care_compress.device.cuda import CudaGpu
from care_compress.device.library import Library
from care_compress.device.manifest import version_numbers
from care_compress.device.problems import EngineMismatchError
from care_compress.device.storage import (
    digest_bytes,
    read_json_object,
    write_json_whole,
    write_whole,
)

ENGINE_KIND = "care-engine"
# Major version -> those before it whose version-compatible plans it runs.
_ALSO_RUNS = {11: (10,)}
_REBUILD = "build it again: python3 care_deploy.py build"


@dataclass(frozen=True)
class EngineOrigin:
    """What an engine was built from and for."""

    library: str
    version: str
    # None: built ahead of time for `compute_capabilities` (TensorRT-RTX).
    gpu: CudaGpu | None
    compute_capabilities: tuple[str, ...]
    onnx_sha256: str
    version_compatible: bool
    stripped: bool


def origin_path(engine: Path) -> Path:
    """The description of int8.engine is int8.engine.json."""
    return engine.with_name(engine.name + ".json")


def write_engine(
    path: Path, plan: bytes, origin: EngineOrigin, details: Mapping[str, Any]
) -> dict[str, Any]:
    """Write an engine and its description; returns the description."""
    description = {
        "format": 1,
        "kind": ENGINE_KIND,
        **asdict(origin),
        "compute_capabilities": list(origin.compute_capabilities),
        "engine_sha256": digest_bytes(plan),
        "size_bytes": len(plan),
        **details,
    }
    # The old description goes first: if the power fails in between, the engine has none and is
    # refused, rather than having one that is not its own.
    origin_path(path).unlink(missing_ok=True)
    write_whole(path, plan)
    write_json_whole(origin_path(path), description)
    return description


def copy_engine(path: Path, target: Path) -> None:
    """Put an engine and its description in the place of another one."""
    origin_path(target).unlink(missing_ok=True)  # as above: no engine with a foreign description
    write_whole(target, path.read_bytes())
    write_whole(origin_path(target), origin_path(path).read_bytes())


def read_engine(
    path: Path, library: Library, gpu: CudaGpu | None, onnx_sha256: str
) -> tuple[bytes, dict[str, Any]]:
    """The plan and its description, if this TensorRT and this GPU can run it."""
    description = read_json_object(origin_path(path))
    if not path.is_file():
        raise EngineMismatchError(f"{path} has not been built.", _REBUILD)
    if description is None or description.get("kind") != ENGINE_KIND:
        raise EngineMismatchError(
            f"{path} has no description ({origin_path(path).name}) to check it by.", _REBUILD
        )
    if description.get("onnx_sha256") != onnx_sha256:
        raise EngineMismatchError(f"{path} was built from another ONNX graph.", _REBUILD)
    builder, version = description.get("library"), str(description.get("version"))
    lasting = description.get("version_compatible") and _outlives(version, library)
    if builder != library.name or not (version == library.text or lasting):
        raise EngineMismatchError(
            f"{path} was built by {builder} {version}; here is {library.name} {library.text}.",
            _REBUILD,
        )
    built = description.get("gpu")
    capabilities = description.get("compute_capabilities", [])
    if gpu is not None and built is not None and built != asdict(gpu):
        raise EngineMismatchError(
            f"{path} was built for {built.get('name')}"
            f" (compute capability {built.get('compute_capability')});"
            f" here is {gpu.name} ({gpu.compute_capability}).",
            _REBUILD,
        )
    if gpu is not None and built is None and not any(_runs_on(one, gpu) for one in capabilities):
        raise EngineMismatchError(
            f"{path} was built for compute capability {', '.join(capabilities)};"
            f" {gpu.name} has {gpu.compute_capability}.",
            _REBUILD,
        )
    plan = path.read_bytes()
    if digest_bytes(plan) != description.get("engine_sha256"):
        raise EngineMismatchError(f"{path} is not the file that was built.", _REBUILD)
    return plan, description


def _outlives(version: str, library: Library) -> bool:
    """Whether a version-compatible plan of that version runs in this library.

    In later releases of its own major version, and across major versions as NVIDIA's support matrix
    has it; never in an earlier release.
    """
    built, here = version_numbers(version), library.version
    if not built or built > here:
        return False
    return built[0] == here[0] or built[0] in _ALSO_RUNS.get(here[0], ())


def _runs_on(capability: str, gpu: CudaGpu) -> bool:
    """Code for 8.6 runs on 8.6 and 8.9, not on 8.0 or 9.0."""
    built, here = (
        tuple(int(part) for part in text.split("."))
        for text in (capability, gpu.compute_capability)
    )
    return built[0] == here[0] and built[1] <= here[1]
