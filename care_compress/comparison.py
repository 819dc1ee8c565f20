"""One comparison: which file runs where, what each answers, how long each takes, what it means.

The files that are timed are the files that are scored, on the same images in the same order.
"""

import contextlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from care_compress.boards import measured_on_boards
from care_compress.contenders import SIMULATION, Contender
from care_compress.data.loader import BadImages, prepared_batches
from care_compress.data.samples import Samples
from care_compress.data.sources import check_classes
from care_compress.errors import TargetError
from care_compress.evaluate.accuracy import spread_indices
from care_compress.evaluate.answers import Collected, collect_answers
from care_compress.evaluate.latency import Latency, LatencyPlan
from care_compress.evaluate.readback import ReadBack
from care_compress.evaluate.verdicts import Budget, Drop, Verdict
from care_compress.findings import Finding
from care_compress.progress import progress_bar
from care_compress.runtime.dot_products import (
    check_needs,
    onnxruntime_is_exact,
    openvino_is_exact,
)
from care_compress.runtime.layer_times import Profile
from care_compress.runtime.on_openvino import has_bfloat16, openvino_devices
from care_compress.runtime.opening import open_predictor
from care_compress.sections import DataSection
from care_compress.target import load_target

BF16 = " as bf16"  # behind the name of a model that is run with its floats in bfloat16


@dataclass(frozen=True)
class CompareOptions:
    """What a user may ask for."""

    targets: tuple[str, ...] | None = None
    images: int | None = None
    json_file: Path | None = None
    max_drop: float | None = None
    min_speedup: float | None = None
    data: DataSection | None = None
    latency: LatencyPlan = LatencyPlan()
    report: bool = True  # write report.html of the last run, too


@dataclass(frozen=True)
class Entry:
    """One file on one target, in one setting."""

    target: str
    name: str
    path: Path
    precision: str  # of the floats: what OpenVINO may round to

    @property
    def device(self) -> str:
        """As OpenVINO names it."""
        return "CPU" if self.target == SIMULATION else load_target(self.target).device.upper()

    @property
    def key(self) -> str:
        """Unique."""
        return f"{self.target}/{self.name}"


@dataclass
class Comparison:
    """Everything that was found."""

    models: list[Contender]
    entries: list[Entry]
    missing: dict[tuple[str, str], str]  # (target, model) -> why it cannot run here
    collected: Collected
    latency: dict[tuple[int, int], dict[str, Latency]] = field(default_factory=dict)
    load_seconds: dict[str, float] = field(default_factory=dict)
    layers: dict[str, Profile] = field(default_factory=dict)
    peak_memory: dict[str, int] = field(default_factory=dict)
    load_average: dict[str, float] = field(default_factory=dict)  # before and after the timing
    read_backs: dict[str, ReadBack] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)  # exports, where they were made
    findings: list[Finding] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    budgets: list[Budget] = field(default_factory=list)

    @cached_property
    def boards(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
        """What devices measured, by target and model; engines only where none was run here."""
        found: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for one in self.models:
            for board in measured_on_boards(one.run) if one.run is not None else ():
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
    def baseline(self) -> Contender:
        """The first model named."""
        return self.models[0]

    @property
    def targets(self) -> list[str]:
        """Of everything, measured or missing, in order."""
        every = [entry.target for entry in self.entries] + [target for target, _ in self.missing]
        return list(dict.fromkeys(every))

    def entry(self, target: str, name: str) -> Entry | None:
        """The file of a model on a target, if it could be run."""
        return next((e for e in self.entries if (e.target, e.name) == (target, name)), None)

    def model(self, name: str) -> Contender:
        """The one of this name, whatever its floats are rounded to."""
        return next(one for one in self.models if one.name == name.removesuffix(BF16))

    def fault(self, target: str, name: str) -> str:
        """Why a file is not the model it should be; nothing where it is."""
        key = f"{target}/{name}"
        read = self.read_backs.get(key)
        if read is not None and not read.holds:
            return f"its file, read back here, has {read}"
        return self.failed.get(key, "")

    def drop(self, target: str, name: str) -> Drop | None:
        """Top-1 of the baseline minus that of `name`, on this target's files."""
        pair = (self.entry(target, self.baseline.name), self.entry(target, name))
        if pair[0] is None or pair[1] is None:
            return None
        before, after = (self.collected.answers[entry.key] for entry in pair if entry)
        return Drop.between(before.right, after.right)


def find_entries(
    models: list[Contender], options: CompareOptions
) -> tuple[list[Entry], dict[tuple[str, str], str]]:
    """Every file that can run here, and why the others cannot."""
    entries: list[Entry] = []
    missing: dict[tuple[str, str], str] = {}
    targets = options.targets or tuple(dict.fromkeys(t for one in models for t in one.targets))
    for target in targets:
        if target != SIMULATION:
            load_target(target)  # a misspelt one is an error
        for place, one in enumerate(models):
            path = one.files.get(target)
            why = _why_not(one, target, path)
            if why or path is None:
                missing[target, one.name] = why
                continue
            halves = target == "openvino-cpu" and has_bfloat16()
            if target in ("openvino-gpu", "openvino-npu"):
                entries.append(Entry(target, one.name, path, "f16"))  # what they compute in
            elif place == 0:
                entries.append(Entry(target, one.name, path, "f32"))
                if halves:
                    entries.append(Entry(target, one.name + BF16, path, "bf16"))
            else:  # as OpenVINO runs it unasked
                entries.append(Entry(target, one.name, path, "bf16" if halves else "f32"))
    return entries, missing


def _why_not(one: Contender, target: str, path: Path | None) -> str:
    """Why a model cannot be run on a target here; nothing if it can."""
    if path is None:
        export = one.results.get("exports", {}).get(target, {})
        if "failed" in export:
            return f"the export of {one.name} failed: {export['failed']}"
        skipped = export.get("skipped", "")
        return skipped or f"{one.name} has no file for {target}; make quantize exports it"
    if not path.is_file():
        return f"{path} is gone; make quantize again"
    if target == SIMULATION:
        return ""
    about = load_target(target)
    if about.runtime == "openvino" and about.device.upper() not in openvino_devices():
        return f"OpenVINO sees no {about.device.upper()} here; compare on a machine with one"
    if about.is_engine and path.suffix != ".engine":
        return f"needs its device: make bundle TARGET={target}, then care-compress import-results"
    if one.run is not None and about.device == "cpu":
        exact = openvino_is_exact if about.runtime == "openvino" else onnxruntime_is_exact
        try:
            check_needs(path, one.export_of[target].get("needs"), exact)
        except TargetError as error:
            return error.message.removesuffix(".")
    return ""


def score(
    entries: list[Entry],
    models: list[Contender],
    samples: Samples,
    data: DataSection,
    options: CompareOptions,
    console: Console,
) -> Collected:
    """Answers of every file to the same images, decoded once."""
    first = {entry.target: entry.key for entry in reversed(entries)}
    cpu = torch.device("cpu")
    predictors = {
        entry.key: open_predictor(
            str(entry.path), cpu, precision=entry.precision, plugin=entry.device
        )
        for entry in entries
    }
    for predict in predictors.values():
        check_classes(samples, predict.num_classes)
    recipe = next((one.recipe for one in reversed(models) if one.recipe is not None), None)
    wanted = options.images or (recipe.evaluate.images if recipe else None)
    indices = spread_indices(len(samples), wanted)
    batches = prepared_batches(samples, data, 32, bad=BadImages(), indices=indices)
    with (
        contextlib.closing(batches),
        progress_bar(console, "scoring", len(indices)) as advance,
    ):
        baseline_of = {entry.key: first[entry.target] for entry in entries}
        return collect_answers(predictors, baseline_of, batches, advance)
