"""What a board measured, taken home: checked against the run, then kept in the run's directory."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from care_compress.errors import CareError
from care_compress.figures import json_text
from care_compress.files import read_json
from care_compress.run import write_text

# Allows no NaN and no infinity: a figure that is none has no place among figures.
Finite = Annotated[float, Field(allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_AGAIN = "copy results.json from the unpacked bundle again, after 'verify' and 'bench'"


class DeviceResultsError(CareError):
    """A results file that is damaged, incomplete, or of another export."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Conditions(_Strict):
    """How the board was set and how warm it was."""

    power_mode: str | None
    gpu_mhz: Finite | None
    cpu_mhz: Finite | None
    temperatures_c: dict[str, Finite]


class Latency(_Strict):
    """Milliseconds of one run of the engine."""

    p50: Positive
    p90: Positive
    p99: Positive


class Speed(_Strict):
    """What `bench` writes."""

    batch: Annotated[int, Field(gt=0)]
    cuda_graph: bool
    runs: Annotated[int, Field(gt=0)]
    seconds: Positive
    latency_ms: Latency
    throughput: Positive
    before: Conditions
    after: Conditions
    measured_at: str


class Accuracy(_Strict):
    """What `verify` writes."""

    images: Annotated[int, Field(gt=0)]
    top1: Percent
    expected_top1: Percent
    agreement: Percent
    sqnr_db: Finite
    max_deviation: Finite
    passed: bool
    measured_at: str


class Engine(_Strict):
    """One engine of the board."""

    onnx_sha256: Sha256
    engine_sha256: Sha256
    size_bytes: Annotated[int, Field(gt=0)]
    layers_from: Literal["engine", "network"]
    precisions: dict[str, int]
    accuracy: Accuracy | None = None
    speed: Speed | None = None


class Gpu(_Strict):
    """The board's GPU."""

    name: str
    compute_capability: str


class Board(_Strict):
    """The board and its software."""

    name: Annotated[str, Field(min_length=1)]
    gpu: Gpu
    library: str
    library_version: str
    cuda: dict[str, str]
    l4t: str | None
    jetpack: str | None
    python: str
    architecture: str


class DeviceResults(_Strict):
    """results.json of a bundle."""

    format: Literal[1]
    kind: Literal["care-deploy-results"]
    target: str
    run: str
    recipe: str
    fingerprint: str
    bundle_sha256: Sha256
    board: Board
    models: Annotated[dict[str, Engine], Field(min_length=1)]
    measured_at: str


def import_results(file: Path, run_dir: Path) -> dict[str, Any]:
    """Check a board's results and keep them in ``measured/<target>.<board>.json`` of the run."""
    results = _read(file)
    _check_export(results, file, run_dir)
    board = re.sub(r"[^a-z0-9]+", "-", results.board.name.lower()).strip("-") or "board"
    value = results.model_dump(mode="json")
    # One board measured in two power modes gave two results.
    modes = [engine.speed.before.power_mode for engine in results.models.values() if engine.speed]
    mode = re.sub(r"[^a-z0-9]+", "-", (modes[0] or "").lower()).strip("-") if modes else ""
    name = ".".join(part for part in (results.target, board, mode) if part)
    path = run_dir / "measured" / f"{name}.json"
    write_text(path, json_text(value))
    return value


def _read(file: Path) -> DeviceResults:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceResultsError(f"{file} cannot be read ({error}).", _AGAIN) from error
    try:
        # From JSON, not from Python values: NaN, which json.loads takes, is then refused too.
        return DeviceResults.model_validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise DeviceResultsError(f"{file}: {where}: {first['msg']}.", _AGAIN) from error


def _check_export(results: DeviceResults, file: Path, run_dir: Path) -> None:
    # The target becomes a file name.
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", results.target):
        raise DeviceResultsError(f"{file}: target: {results.target!r} is no target's name.", _AGAIN)
    path = run_dir / "exports" / results.target / "export.json"
    if not path.is_file():
        if results.run != run_dir.resolve().name:
            raise DeviceResultsError(
                f"{file} is of run {results.run}, and {run_dir} exports nothing for"
                f" {results.target}.",
                "name the run whose bundle was measured",
            )
        return
    try:
        export = read_json(path)
    except ValueError as error:
        raise DeviceResultsError(f"{path} is damaged.", "export the run again") from error
    known = export.get("fingerprint")
    if known is not None and known != results.fingerprint:
        raise DeviceResultsError(
            f"{file} was measured on another export of {results.target} than {run_dir} has now.",
            "measure the bundle of this export, or import into the run that made that bundle",
        )
    for name, engine in results.models.items():
        stored = export.get("models", {}).get(name, {}).get("sha256")
        if stored is not None and stored != engine.onnx_sha256:
            raise DeviceResultsError(
                f"{file}: {name} was built from another graph than {path} describes.",
                "measure the bundle of this export",
            )
