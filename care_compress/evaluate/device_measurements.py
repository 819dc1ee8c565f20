"""What devices measured: checked against the run, kept in it, shown beside what ran here."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from care_compress.device.manifest import precision_of
from care_compress.errors import CareError
from care_compress.files import json_text, read_json, write_text
from care_compress.run.finished import as_written

# Allows no NaN and no infinity: a figure that is none has no place among figures.
Finite = Annotated[float, Field(allow_inf_nan=False)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
OLDER = ("care-deploy-results", 1)
_AGAIN = "copy results.json from the unpacked bundle again, after 'verify' and 'bench'"


class DeviceResultsError(CareError):
    """A results file that is damaged, incomplete, or of another export."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ClockRange(_Strict):
    """Megahertz of a clock in all of a model's turns."""

    least: Finite
    median: Finite
    most: Finite


class During(_Strict):
    """How the board was set, and what its sensors told while one model ran."""

    power_mode: str | None
    power_mode_from: Literal["nvpmodel", "hand"] | None
    clocks_locked: bool | None
    moments: Annotated[int, Field(ge=0)]
    gpu_mhz: ClockRange | None
    cpu_mhz: ClockRange | None
    temperatures_c: dict[str, Finite]  # the highest
    throttled: list[str]


class EnergyCost(_Strict):
    """What an image costs, with the power that the board draws anyway and without."""

    rails: Annotated[list[str], Field(min_length=1)]
    idle_watts: Finite
    watts: Positive
    millijoules_per_image: Positive
    millijoules_above_idle: Finite
    images_per_second_per_watt: Positive


class DeviceLatency(_Strict):
    """Milliseconds of one run of the engine."""

    p50: Positive
    p90: Positive
    p99: Positive


class SpeedFigures(_Strict):
    """What is measured of an engine's speed."""

    batch: Annotated[int, Field(gt=0)]
    cuda_graph: bool
    runs: Annotated[int, Field(gt=0)]
    seconds: Positive
    latency_ms: DeviceLatency  # of the GPU's kernels, with one run queued ahead
    host_latency_ms: DeviceLatency  # from the copy in to the answer out, one run after the other
    enqueue_ms: DeviceLatency  # of the host
    throughput: Positive
    during: During
    energy: EnergyCost | None
    energy_missing: str | None


class Speed(SpeedFigures):
    """What `bench` writes."""

    measured_at: str


class AccuracyFigures(_Strict):
    """How near a model's answers are to those that were exported."""

    images: Annotated[int, Field(gt=0)]
    # Of classifiers. Labels with a place do not travel, so other tasks tell agreement alone.
    top1: Percent | None = None
    expected_top1: Percent | None = None
    agreement: Percent
    sqnr_db: Finite
    max_deviation: Finite
    passed: bool


class DeviceAccuracy(AccuracyFigures):
    """What `verify` writes."""

    measured_at: str


class DeviceLayer(_Strict):
    """One layer of an engine, as the board's profiler timed it."""

    name: str
    type: str
    precision: str
    origin: list[str]
    ms: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LayerFigures(_Strict):
    """All layers of one engine."""

    layers: list[DeviceLayer]


class EngineLayers(LayerFigures):
    """What `bench` writes of the engines that explain each other."""

    measured_at: str


class FieldRow(_Strict):
    """One way to build one model that `tune` tried."""

    model: str
    optimization_level: int
    batch: Annotated[int, Field(gt=0)]
    onnx_sha256: Sha256
    state: Literal["begun", "failed", "lost", "passed"]
    reason: str
    tries: int
    engine_sha256: Sha256 | None
    size_bytes: Annotated[int, Field(gt=0)] | None
    build_seconds: Finite | None
    accuracy: AccuracyFigures | None
    speed: SpeedFigures | None
    layer_times: LayerFigures | None


class Engine(_Strict):
    """One engine of the board."""

    onnx_sha256: Sha256
    engine_sha256: Sha256
    size_bytes: Annotated[int, Field(gt=0)]
    layers_from: Literal["engine", "network"]
    precisions: dict[str, int]
    accuracy: DeviceAccuracy | None = None
    speed: Speed | None = None
    layer_times: EngineLayers | None = None


class DeviceGpu(_Strict):
    """The board's GPU."""

    name: str
    compute_capability: str


class Board(_Strict):
    """The board and its software."""

    name: Annotated[str, Field(min_length=1)]
    gpu: DeviceGpu
    library: str
    library_version: str
    cuda: dict[str, str]
    l4t: str | None
    jetpack: str | None
    jetpack_from: Literal["package", "l4t"] | None
    container: bool
    python: str
    architecture: str


class CpuConditions(_Strict):
    """How the clocks were set, what else ran, and how warm it was."""

    governor: str | None
    load_average: Finite | None
    cpu_mhz: Finite | None
    temperatures_c: dict[str, Finite]


class CpuSpeed(_Strict):
    """What `bench` of a CPU bundle writes."""

    batch: Annotated[int, Field(gt=0)]
    threads: Annotated[int, Field(gt=0)]
    runs: Annotated[int, Field(gt=0)]
    seconds: Positive
    latency_ms: DeviceLatency
    throughput: Positive
    before: CpuConditions
    after: CpuConditions
    measured_at: str


class CpuFile(_Strict):
    """One file on a processor."""

    sha256: Sha256
    size_bytes: Annotated[int, Field(gt=0)]
    floats_in: Literal["f32", "bf16"]
    accuracy: DeviceAccuracy | None = None
    speed: CpuSpeed | None = None


class CpuBoard(_Strict):
    """A machine without a GPU, and its software."""

    name: Annotated[str, Field(min_length=1)]
    processor: str
    cores: Annotated[int, Field(gt=0)]
    integer_dot_products: bool | None  # None: the system does not say
    library: str
    library_version: str
    python: str
    architecture: str


class _Results(_Strict):
    """What results.json of any bundle says."""

    target: str
    run: str
    recipe: str
    fingerprint: str
    bundle_sha256: Sha256
    measured_at: str


class DeviceResults(_Results):
    """results.json of a bundle of engines."""

    format: Literal[2]  # 1 timed the gap before each launch, too
    kind: Literal["care-deploy-results"]
    board: Board
    models: dict[str, Engine]
    candidates: dict[str, FieldRow] = {}
    winner: str | None = None

    @model_validator(mode="after")
    def something_was_measured(self) -> Self:
        """A tune of which nothing passed has rows with reasons, and no model."""
        if not self.models and not self.candidates:
            raise ValueError("models: nothing was measured")
        return self


class CpuResults(_Results):
    """results.json of a bundle for a CPU."""

    format: Literal[1]
    kind: Literal["care-deploy-cpu-results"]
    board: CpuBoard
    models: Annotated[dict[str, CpuFile], Field(min_length=1)]


Results = DeviceResults | CpuResults
_RESULTS: TypeAdapter[Results] = TypeAdapter(Annotated[Results, Field(discriminator="kind")])


def counted_threads(count: int) -> str:
    """Write ``2 threads``, and ``1 thread``."""
    return f"{count} thread{'s' if count > 1 else ''}"


def parse_results(text: str) -> Results:
    """Read the results in a JSON text; `ValidationError` for anything else."""
    # From JSON, not from Python values: NaN, which json.loads takes, is then refused too.
    return _RESULTS.validate_json(text, strict=True)


def import_results(file: Path, run_dir: Path) -> dict[str, Any]:
    """Check a board's results and keep them in ``measured/<target>.<board>.json`` of the run."""
    try:
        results = parse_results(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DeviceResultsError(f"{file} cannot be read ({error}).", _AGAIN) from error
    except ValidationError as error:
        first = error.errors()[0]
        # The kind, by which the model of the results was chosen, stands in front of the rest.
        place = [part for part in first["loc"] if not str(part).startswith("care-deploy")]
        where = ".".join(map(str, place)) or "the file"
        raise DeviceResultsError(f"{file}: {where}: {first['msg']}.", _AGAIN) from error
    check_export(results, file, run_dir)
    # One board measured in two power modes, or on two numbers of threads, gave two results.
    speed = next((model.speed for model in results.models.values() if model.speed), None)
    if isinstance(speed, CpuSpeed):
        mode = counted_threads(speed.threads)
    else:
        mode = (speed.during.power_mode or "") if speed else ""
    parts = (results.target, _slug(results.board.name) or "board", _slug(mode))
    value = results.model_dump(mode="json")
    path = run_dir / "measured" / f"{'.'.join(filter(None, parts))}.json"
    write_text(path, json_text(value))
    return value


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def check_export(results: Results, file: Path, run_dir: Path) -> None:
    """Raise `DeviceResultsError` unless the results are of the run's present export."""
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
    graphs = [
        (name, model.sha256 if isinstance(model, CpuFile) else model.onnx_sha256)
        for name, model in results.models.items()
    ]
    if isinstance(results, DeviceResults):
        graphs += [(row.model, row.onnx_sha256) for row in results.candidates.values()]
    for name, exported in graphs:
        stored = export.get("models", {}).get(name, {}).get("sha256")
        if stored is not None and stored != exported:
            raise DeviceResultsError(
                f"{file}: {name} comes from another graph than {path} describes.",
                "measure the bundle of this export",
            )


def device_measurements(run: Path) -> list[dict[str, Any]]:
    """Read the newest engines of every target, and every machine's CPU files in every setting."""
    newest = {}
    every = []
    for path in sorted(run.glob("measured/*.json")):
        with as_written(path):
            text = path.read_text(encoding="utf-8")
            if _is_older(text):
                continue
            # As it was checked when it was imported.
            results = parse_results(text)
        try:
            check_export(results, path, run)
        except CareError:
            continue  # the run was exported again since: these are figures of other files
        every.append((results, path.stem))
    for results, name in sorted(every, key=lambda one: one[0].measured_at):
        newest[name if isinstance(results, CpuResults) else results.target] = results
    return [results.model_dump(mode="json") for results in newest.values()]


def _is_older(text: str) -> bool:
    """Tell results of engines that an earlier script timed otherwise: they compare with nothing."""
    value = json.loads(text)
    return isinstance(value, dict) and (value.get("kind"), value.get("format")) == OLDER


def fastest_of(found: dict[str, Any], precision: str) -> str | None:
    """Name the model of a precision that a device runs fastest, of those that answer rightly."""
    timed = {
        name: one["speed"]["latency_ms"]["p50"] / one["speed"]["batch"]
        for name, one in found["models"].items()
        if precision_of(name) == precision
        and one["speed"] is not None
        and (one["accuracy"] is None or one["accuracy"]["passed"])
    }
    return min(timed, key=lambda name: timed[name], default=None)


def device_rows(name: str, precision: str, found: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield a row for each model on a device, with where it was measured; nothing is computed."""
    board = found["board"]
    for model, one in found["models"].items():
        speed, accuracy = one["speed"], one["accuracy"]
        label = name if model == precision else f"{name} {model}"
        yield (
            # A CPU's files are measured here, too, and on any number of other machines.
            f"{label} on {place_of(found)}" if is_of_cpu(found) else label,
            {
                "available": True,
                "why": "",
                "top1": None if accuracy is None else accuracy["top1"],
                "latency_ms": None if speed is None else speed["latency_ms"],
                "throughput": None if speed is None else speed["throughput"],
                "int8_mac_share": None,
                "size_bytes": one["size_bytes"],
                "measured_on": {
                    "model": label,
                    "board": board["name"],
                    "library": f"{board['library']} {board['library_version']}",
                    "jetpack": board.get("jetpack"),
                    "power_mode": power_mode_of(speed),
                    "batch": None if speed is None else speed["batch"],
                    "threads": None if speed is None else speed.get("threads"),
                    "verified": None if accuracy is None else accuracy["passed"],
                    "at": found["measured_at"],
                },
            },
        )


def power_mode_of(speed: dict[str, Any] | None) -> str | None:
    """Return the power mode that a board was timed in; a CPU has none."""
    mode: str | None = ((speed or {}).get("during") or {}).get("power_mode")
    return mode


def is_of_cpu(found: dict[str, Any]) -> bool:
    """Tell results of a bundle for a CPU from those of engines."""
    return "gpu" not in found["board"]


def place_of(found: dict[str, Any]) -> str:
    """Name the device, with the number of threads where a CPU's files were timed."""
    speeds = [one["speed"] for one in found["models"].values() if one["speed"] is not None]
    threads = speeds[0].get("threads") if speeds else None
    name = str(found["board"]["name"])
    return name if threads is None else f"{name}, {counted_threads(threads)}"
