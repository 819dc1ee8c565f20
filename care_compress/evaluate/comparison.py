"""One comparison: which file runs where, what each answers, how long each takes, what it means.

The files that are timed are the files that are scored, on the same images in the same order.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from care_compress import machine
from care_compress.console import CheckResult, progress_bar, step_line
from care_compress.data.loader import BadImages, prepared_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.data.sources import check_classes
from care_compress.errors import TargetError
from care_compress.evaluate.device_measurements import device_measurements
from care_compress.evaluate.images import HeldImages, hold_images
from care_compress.evaluate.latency import Latency, LatencyPlan, measure_latency
from care_compress.evaluate.pairs import Collected, collect_answers
from care_compress.evaluate.readback import (
    ReadBack,
    answers_beside,
    counted_only,
    read_back,
    read_back_checks,
    what_failed,
)
from care_compress.evaluate.resolve import SIMULATION, NamedModel
from care_compress.evaluate.verdicts import Budget, Drop, Verdict
from care_compress.files import digest_of
from care_compress.recipe.sections import DataSection
from care_compress.recipe.target import load_target
from care_compress.run.finished import as_written
from care_compress.runtime.artifact import open_predictor
from care_compress.runtime.dot_products import check_needs
from care_compress.runtime.layer_times import Profile
from care_compress.runtime.memory import peak_memory
from care_compress.runtime.on_openvino import has_bfloat16, openvino_devices
from care_compress.runtime.profile import SECONDS, profile_layers, read_engine_profile
from care_compress.runtime.runners import Runner, open_runner

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

    models: list[NamedModel]
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
    checks: list[CheckResult] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    budgets: list[Budget] = field(default_factory=list)

    @cached_property
    def boards(self) -> dict[tuple[str, str], list[dict[str, Any]]]:
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
        """Whether every budget does."""
        return all(budget.ok for budget in self.budgets)

    @property
    def baseline(self) -> NamedModel:
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

    def model(self, name: str) -> NamedModel:
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
    models: list[NamedModel], options: CompareOptions
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


def _why_not(one: NamedModel, target: str, path: Path | None) -> str:
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
        try:
            check_needs(path, one.export_of[target].get("needs"), about.runtime)
        except TargetError as error:
            return error.message.removesuffix(".")
    return ""


def score(
    entries: list[Entry],
    models: list[NamedModel],
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


def profile_files(
    found: Comparison,
    data: DataSection,
    samples: Samples,
    options: CompareOptions,
    console: Console,
) -> None:
    """Layers of what runs here with their times; of engines that were built, their precisions."""
    single = data.model_copy(update={"workers": 0})
    (image,) = hold_images(samples, single, 1, BadImages()).batches(1)
    image = image.contiguous(memory_format=torch.contiguous_format)
    seconds = min(SECONDS, options.latency.seconds)
    with step_line(console) as notify:
        for entry in found.entries:
            if entry.path.suffix in (".onnx", ".xml"):
                notify(f"profiling {entry.name} on {entry.target}")
                found.layers[entry.key] = profile_layers(
                    entry.path, image, 1, entry.precision, entry.device, seconds
                )
    for target, name in found.missing:
        model = next(one for one in found.models if one.name == name)
        _engine(found, model, target)


def _engine(found: Comparison, model: NamedModel, target: str) -> None:
    """What an engine that was built ahead says of its layers; its GPU need not be here."""
    path = model.files.get(target)
    engine = None if path is None else path.with_suffix(".engine")
    if engine is not None and engine.is_file():
        found.layers[f"{target}/{model.name}"] = read_engine_profile(engine)


BARE = "a file without a run says nothing of the model it was made from"
OTHER_IMAGES = "its export was checked on other images; make quantize exports it again"


def read_files_back(
    found: Comparison, data: DataSection, samples: Samples, console: Console
) -> None:
    """Fill `found` with what each file does here, and the checks that follow.

    What a file's model answers lies beside the file since its export (`answers_beside`), so neither
    the checkpoint nor the placement that a target asked for then is needed again.
    """
    held: dict[int, HeldImages] = {}
    unread: dict[str, str] = {}
    with step_line(console) as notify:
        for entry in found.entries:
            if entry.name.endswith(BF16):  # the same file once more
                continue
            one = found.model(entry.name)
            if one.run is None or one.recipe is None:
                unread[entry.key] = BARE
                continue
            notify(f"reading back {entry.key}")
            with as_written(entry.path.parent):
                expected = _answers(one, entry)
                if expected is None:
                    found.read_backs[entry.key] = _by_count(found, one, entry)
                    continue
                count = one.recipe.export.images
                if count not in held:
                    held[count] = hold_images(samples, data, count, BadImages())
                same_list = one.results["data"]["fingerprint"] == samples.fingerprint()
                if not same_list or len(held[count].labels) != len(expected):
                    unread[entry.key] = OTHER_IMAGES
                    continue
                found.read_backs[entry.key] = _beside_answers(one, entry, expected, held[count])
    found.failed = _failed(found)
    found.checks += read_back_checks(found.read_backs, found.failed, unread)


def _answers(one: NamedModel, entry: Entry) -> torch.Tensor | None:
    """What the model of a file answers; None of an export by an earlier version."""
    assert one.recipe is not None
    path = answers_beside(entry.path, one.recipe.precision)
    return torch.from_numpy(np.load(path, allow_pickle=False)) if path.is_file() else None


def _beside_answers(
    one: NamedModel, entry: Entry, expected: torch.Tensor, images: HeldImages
) -> ReadBack:
    """On the images of the export, floats in float32 as the export had them on a CPU."""
    assert one.recipe is not None
    precision = "f32" if entry.device == "CPU" else entry.precision
    predict = open_predictor(
        str(entry.path), torch.device("cpu"), precision=precision, plugin=entry.device
    )
    export = one.results["exports"][entry.target]
    least_db = float(export["models"][one.recipe.precision]["least_sqnr_db"])
    return read_back(expected, images.logits(predict), images.labels, least_db)


def _by_count(found: Comparison, one: NamedModel, entry: Entry) -> ReadBack:
    """Top-1 here beside the model's, as the run counted it."""
    answers, counted = found.collected.answers[entry.key], one.results["accuracy"]
    return counted_only(answers.top1, len(answers.right), counted["top1"], counted["images"])


def _failed(found: Comparison) -> dict[str, str]:
    """Exports that failed where they were made, of every target that is compared, by its file."""
    failed = {}
    for one in found.models:
        if one.run is None or one.recipe is None:
            continue
        with as_written(one.run / "results.json"):
            exports = one.results.get("exports", {})
            for target in found.targets:
                export = exports.get(target, {})
                for why in what_failed(export, one.recipe.precision).values():
                    written = "" if "failed" in export else "its file failed where it was made: "
                    failed[f"{target}/{one.name}"] = f"{written}{why}"
    return failed


BATCHES = (1, 8)


def time_files(
    found: Comparison,
    data: DataSection,
    samples: Samples,
    options: CompareOptions,
    console: Console,
) -> None:
    """Latency of every file at every batch size and number of threads."""
    cores = len(machine.usable_cores())
    found.load_average["before"] = machine.load_average()
    with step_line(console) as notify:
        for batch, threads in product(BATCHES, dict.fromkeys((1, cores))):
            notify(f"timing batch {batch} on {threads} threads")
            images = _images(samples, data, batch)
            runners = _runners(found.entries, images, threads)
            if not runners:
                return
            runs: dict[str, Callable[[], object]] = {k: r.run for k, r in runners.items()}
            found.latency[batch, threads] = measure_latency(runs, batch, options.latency)
            if (batch, threads) == (1, 1):
                found.load_seconds = {key: r.load_seconds for key, r in runners.items()}
        found.load_average["after"] = machine.load_average()
        notify("measuring memory")
        _measure_memory(found, data.resolution)


def _measure_memory(found: Comparison, resolution: int) -> None:
    """Of every file and setting once: the same bytes may be there for several models."""
    known: dict[tuple[str, ...], int] = {}
    for entry in found.entries:
        if entry.path.suffix not in (".onnx", ".xml"):
            continue
        key = (digest_of(entry.path), entry.target, entry.precision)
        if key not in known:
            known[key] = peak_memory(
                entry.path,
                size=(resolution, resolution),
                precision=entry.precision,
                device=entry.device,
            )
        found.peak_memory[entry.key] = known[key]


def _runners(entries: list[Entry], images: torch.Tensor, threads: int) -> dict[str, Runner]:
    """Every file ready to be timed; on targets where each of them takes this batch."""
    ready: dict[str, Runner] = {}
    unable = set()
    for entry in entries:
        if entry.path.suffix not in (".onnx", ".xml"):
            continue
        try:
            ready[entry.key] = open_runner(
                entry.path, images, threads, entry.precision, entry.device
            )
        except TargetError:
            if len(images) == 1:
                raise
            unable.add(entry.target)
    return {key: one for key, one in ready.items() if key.split("/")[0] not in unable}


def _images(samples: Samples, data: DataSection, count: int) -> torch.Tensor:
    single = data.model_copy(update={"workers": 0})
    (images,) = hold_images(samples, single, count, BadImages()).batches(count)
    repeats = -(-count // len(images))
    return images.repeat(repeats, 1, 1, 1)[:count].contiguous()
