"""One comparison: its files, what was found of each, and the same as ``compare.json``.

``compare.json`` is an interface, stable; points in percent. Keys beside those of the interface say
more and may grow.
"""

from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from care_compress import machine
from care_compress.console import CheckResult, html_table
from care_compress.data.samples import Samples
from care_compress.evaluate.device_field import device_field
from care_compress.evaluate.device_measurements import device_measurements, device_rows
from care_compress.evaluate.latency import Latency, LatencyPlan
from care_compress.evaluate.readback import ReadBack
from care_compress.evaluate.resolve import SIMULATION, NamedModel
from care_compress.files import digest_of, size_of
from care_compress.recipe.sections import DataSection
from care_compress.recipe.target import load_target
from care_compress.runtime.layer_times import Profile
from care_compress.tasks.intervals import Interval
from care_compress.tasks.task import Answers, Collected, Drop, Task

BF16 = " as bf16"  # behind the name of a model that is run with its floats in bfloat16
# Where a model's own figures are taken, if it runs on several targets.
FIRST_TARGETS = ("openvino-cpu", "onnxruntime-cpu")


@dataclass(frozen=True)
class CompareOptions:
    """What a user may ask for."""

    targets: tuple[str, ...] | None = None
    images: int | None = None
    json_file: Path | None = None
    max_drop: float | None = None
    min_speedup: float | None = None
    min_agreement: float | None = None  # percent of answers as the first model's
    data: DataSection | None = None
    latency: LatencyPlan = LatencyPlan()


@dataclass(frozen=True)
class Entry:
    """One file on one target, in one setting."""

    target: str
    name: str
    path: Path
    precision: str  # of the floats: what OpenVINO may round to

    @property
    def device(self) -> str:
        """The device, as OpenVINO names it."""
        return "CPU" if self.target == SIMULATION else load_target(self.target).device.upper()

    @property
    def key(self) -> str:
        """Its name in every table of the comparison."""
        return f"{self.target}/{self.name}"

    @property
    def is_timed(self) -> bool:
        """Whether it is an exported file; an engine or a checkpoint is only scored."""
        return self.path.suffix in (".onnx", ".xml")


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate pays on one target, and why."""

    target: str
    candidate: str
    pays: bool | None  # None: it could not be measured
    text: str


@dataclass(frozen=True)
class Budget:
    """One limit and how the candidate stands to it; no value where nothing could be measured."""

    name: str
    limit: float
    value: float | None
    ok: bool

    def __str__(self) -> str:
        found = "not measured" if self.value is None else f"{self.value:.3g}"
        return f"{'ok    ' if self.ok else 'FAILED'} {self.name}: {found}, limit {self.limit:g}"


@dataclass
class Comparison:
    """What is compared on which images, and everything that was found."""

    task: Task
    data: DataSection
    samples: Samples
    options: CompareOptions
    models: list[NamedModel]
    entries: list[Entry]
    missing: dict[tuple[str, str], str]  # (target, model) -> why it cannot run here
    collected: Collected[Answers]
    latency: dict[tuple[int, int], dict[str, Latency]] = field(default_factory=dict)
    load_seconds: dict[str, float] = field(default_factory=dict)
    layers: dict[str, Profile] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)
    load_average: dict[str, float] = field(default_factory=dict)  # before and after the timing
    read_backs: dict[str, ReadBack] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # exports, where they were made
    pictures: dict[str, Any] | None = None  # of answers that changed, where a task draws any
    checks: list[CheckResult] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    budgets: list[Budget] = field(default_factory=list)

    @cached_property
    def device_results(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """What devices measured, by target and model; engines only where none was run here."""
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for one in self.models:
            for board in device_measurements(one.run) if one.run is not None else ():
                target = board["target"]
                here = load_target(target).is_engine and self.entry(target, one.name) is not None
                if target in self.targets and not here:
                    found.setdefault((target, one.name), []).append(board)
        return found

    @property
    def is_noisy(self) -> bool:
        """Whether any file's turns differ too much to say anything fine."""
        return any(one.is_noisy for timed in self.latency.values() for one in timed.values())

    @property
    def holds(self) -> bool:
        """Whether every budget holds."""
        return all(budget.ok for budget in self.budgets)

    def _repr_html_(self) -> str:
        """What a notebook shows: one row for each verdict and each limit."""
        rows = [(one.target, one.text) for one in self.verdicts]
        rows += [("limit", str(one)) for one in self.budgets]
        return html_table(rows)

    @property
    def baseline(self) -> NamedModel:
        """The first model named."""
        return self.models[0]

    @property
    def targets(self) -> list[str]:
        """Targets of everything, measured or missing, in order."""
        every = [entry.target for entry in self.entries] + [target for target, _ in self.missing]
        return list(dict.fromkeys(every))

    def entry(self, target: str, name: str) -> Entry | None:
        """Return the file of a model on a target, if it could be run."""
        return next((e for e in self.entries if (e.target, e.name) == (target, name)), None)

    def model(self, name: str) -> NamedModel:
        """Return the one of this name, whatever its floats are rounded to."""
        return next(one for one in self.models if one.name == name.removesuffix(BF16))

    def fault(self, target: str, name: str) -> str:
        """Say why a file is not the model it should be; nothing where it is."""
        key = f"{target}/{name}"
        read = self.read_backs.get(key)
        if read is not None and not read.holds:
            return f"its file, read back here, has {read}"
        return self.failed.get(key, "")

    def pair(self, target: str, name: str) -> tuple[Answers, Answers] | None:
        """Return the baseline's answers on a target and another model's, where both ran."""
        answers = self.collected.answers
        before, after = (answers.get(f"{target}/{one}") for one in (self.baseline.name, name))
        return None if before is None or after is None else (before, after)

    def drop(self, target: str, name: str) -> Drop | None:
        """Return the metric of the baseline minus that of `name`, on this target's files."""
        pair = self.pair(target, name)
        return None if pair is None else pair[0].drop_to(pair[1])

    def agreement(self, target: str, name: str) -> float | None:
        """Return the percent of answers that are the baseline's, on this target's files."""
        pair = self.pair(target, name)
        return None if pair is None else pair[0].agreement(pair[1])

    def speedups(self, target: str, name: str) -> dict[str, Interval]:
        """Return speedups over each of the baseline's settings, batch 1, one thread."""
        timed = self.latency.get((1, 1), {})
        candidate = timed.get(f"{target}/{name}")
        return {
            other: candidate.speedup_over(timed[f"{target}/{other}"])
            for other in (self.baseline.name, self.baseline.name + BF16)
            if candidate is not None and f"{target}/{other}" in timed
        }


def comparison_as_json(found: Comparison) -> dict[str, Any]:
    """Return everything that was found."""
    return {
        "task": found.task.name,
        "images": len(found.collected),
        "models": {one.name: _model(found, one) for one in found.models},
        "pairs": [
            pair
            for target, one in product(found.targets, found.models[1:])
            if (pair := _pair(found, target, one.name)) is not None
        ],
        "targets": {target: _target(found, target) for target in found.targets},
        **({} if found.pictures is None else {"pictures": found.pictures}),
        "devices": [
            field
            for (_, name), boards in found.device_results.items()
            for board in boards
            if (field := device_field(name, board)) is not None
        ],
        "checks": [check.as_json() for check in found.checks],
        "verdicts": [asdict(verdict) for verdict in found.verdicts],
        "budgets": [asdict(budget) for budget in found.budgets],
        "latency": [_setting(found, batch, threads) for batch, threads in found.latency],
        "data": {**found.data.model_dump(mode="json"), "samples": found.samples.fingerprint()},
        "machine": {
            **machine.describe(),
            "load_average": found.load_average,
            "noisy": found.is_noisy,
        },
    }


def _model(found: Comparison, one: NamedModel) -> dict[str, Any]:
    every = (found.entry(target, one.name) for target in (*FIRST_TARGETS, *found.targets))
    entry = next(filter(None, every), None)
    answers = None if entry is None else found.collected.answers[entry.key]
    rewrites = one.results.get("rewrites")  # the parameters are the rewritten network's
    return {
        **(dict.fromkeys(found.task.shown) if answers is None else answers.metrics()),
        "size_bytes": None if entry is None else size_of(entry.path),
        "params": rewrites[-1]["parameters"] if rewrites else None,
        "precision": None if one.recipe is None else one.recipe.precision,
        "checkpoint_sha256": one.checkpoint_sha256,
        "run": None if one.run is None else str(one.run),
        "measured_on": None if entry is None else entry.target,
    }


def _pair(found: Comparison, target: str, name: str) -> dict[str, Any] | None:
    pair = found.pair(target, name)
    if pair is None:
        return None
    before, after = pair
    drop = before.drop_to(after)
    names = found.baseline.name, name
    return {
        "target": target,
        "baseline": found.baseline.name,
        "candidate": name,
        "drop": drop.value,
        "drop_ci95": [drop.low, drop.high],
        "agreement": before.agreement(after),
        "sqnr_db": after.sqnr_db,
        **before.details(after, names, found.collected, found.samples.classes),
    }


def _target(found: Comparison, target: str) -> dict[str, Any]:
    """Return a row for each model on a target, and for each device that measured it."""
    names = [one.name for one in found.models]
    if found.entry(target, found.baseline.name + BF16) is not None:
        names.insert(1, found.baseline.name + BF16)
    rows = {name: _on_target(found, target, name) for name in names}
    for one in found.models:
        for board in found.device_results.get((target, one.name), ()):
            assert one.recipe is not None  # a run's
            rows.update(device_rows(one.name, one.recipe.precision, board))
    return rows


def _on_target(found: Comparison, target: str, name: str) -> dict[str, Any]:
    entry, key = found.entry(target, name), f"{target}/{name}"
    profile = found.layers.get(key)  # of an engine that cannot run here, too
    layers = {} if profile is None else profile.as_json()
    if entry is None:
        return {
            "available": False,
            "why": found.missing.get((target, name), "no such file"),
            **layers,
        }
    timed = found.latency.get((1, 1), {}).get(key)
    answers = found.collected.answers[key]
    read = found.read_backs.get(key)
    export = found.model(name).results.get("exports", {}).get(target, {})
    share = export.get("integer_macs", {}).get("share")
    return {
        "available": True,
        "why": "",
        **answers.metrics(),
        **{key: list(ends) for key, ends in answers.intervals().items()},
        "not_finite": answers.broken,
        "latency_ms": None if timed is None else timed.percentiles(),
        "throughput": None if timed is None else timed.throughput,
        "int8_mac_share": None if share is None else float(share),
        **({} if read is None else {"read_back": read.as_json()}),
        "floats_in": entry.precision,
        "sha256": digest_of(entry.path),
        "size_bytes": size_of(entry.path),
        "load_seconds": found.load_seconds.get(key),
        **layers,
        "peak_memory_bytes": found.peak_memory.get(key),
    }


def _setting(found: Comparison, batch: int, threads: int) -> dict[str, Any]:
    """Return every file that was timed at one batch size and number of threads."""
    timed = found.latency[batch, threads]
    rows = []
    for entry in found.entries:
        one = timed.get(entry.key)
        if one is None:
            continue
        base = timed.get(f"{entry.target}/{found.baseline.name}")
        over = None if base is None else one.speedup_over(base)
        rows.append(
            {
                "target": entry.target,
                "name": entry.name,
                "latency_ms": one.percentiles(),
                "throughput": one.throughput,
                "speedup": None if over is None else over[0],
                "speedup_ci95": None if over is None else list(over[1:]),
                "runs": len(one.milliseconds),
                "noisy": one.is_noisy,
            }
        )
    return {"batch": batch, "threads": threads, "rows": rows}
