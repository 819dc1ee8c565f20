"""One comparison: which file runs where, what each answers, how long each takes, what it means.

The files that are timed are the files that are scored, on the same images in the same order.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from care_compress import machine
from care_compress.boards import board_verdict, measured_on_boards
from care_compress.contenders import SIMULATION, Contender
from care_compress.data.loader import BadImages, prepared_batches
from care_compress.data.samples import Samples
from care_compress.data.sources import check_classes
from care_compress.errors import TargetError
from care_compress.evaluate.accuracy import spread_indices
from care_compress.evaluate.answers import Answers, Collected, collect_answers
from care_compress.evaluate.exports import digest_of, size_of
from care_compress.evaluate.images import hold_images
from care_compress.evaluate.latency import Latency, LatencyPlan, measure_latency
from care_compress.evaluate.significance import drop_interval
from care_compress.evaluate.verdicts import Budget, Drop, Verdict, judge
from care_compress.predictor import Predictor
from care_compress.progress import progress_bar, step_line
from care_compress.runtime.layer_times import Profile
from care_compress.runtime.memory import peak_memory
from care_compress.runtime.on_openvino import OpenVinoPredictor, has_bfloat16, openvino_devices
from care_compress.runtime.opening import open_predictor
from care_compress.runtime.runners import Runner, open_runner
from care_compress.sections import BudgetSection, DataSection
from care_compress.target import load_target

BATCHES = (1, 8)
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
    verdicts: list[Verdict] = field(default_factory=list)
    budgets: list[Budget] = field(default_factory=list)

    @cached_property
    def boards(self) -> dict[tuple[str, str], dict[str, Any]]:
        """What boards measured, by target and model; only where nothing was measured here."""
        return {
            (target, one.name): board
            for one in self.models
            if one.run is not None
            for target, board in measured_on_boards(one.run).items()
            if target in self.targets and self.entry(target, one.name) is None
        }

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

    def drop(self, target: str, name: str) -> Drop | None:
        """Top-1 of the baseline minus that of `name`, on this target's files."""
        pair = (self.entry(target, self.baseline.name), self.entry(target, name))
        if pair[0] is None or pair[1] is None:
            return None
        before, after = (self.collected.answers[entry.key] for entry in pair if entry)
        lost, gained = changes(before, after)
        return Drop(before.top1 - after.top1, *drop_interval(lost, gained, len(before.right)))


def changes(before: Answers, after: Answers) -> tuple[int, int]:
    """Images that were right and are wrong now, and the other way round."""
    return int((before.right & ~after.right).sum()), int((~before.right & after.right).sum())


def find_entries(
    models: list[Contender], options: CompareOptions
) -> tuple[list[Entry], dict[tuple[str, str], str]]:
    """Every file that can run here, and why the others cannot."""
    entries: list[Entry] = []
    missing: dict[tuple[str, str], str] = {}
    targets = options.targets or tuple(dict.fromkeys(t for one in models for t in one.files))
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
        skipped = one.results.get("exports", {}).get(target, {}).get("skipped", "")
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
    return ""


def _open(entry: Entry) -> Predictor:
    if entry.path.suffix == ".xml":
        return OpenVinoPredictor(entry.path, precision=entry.precision, device=entry.device)
    return open_predictor(str(entry.path), torch.device("cpu"))


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
    predictors = {entry.key: _open(entry) for entry in entries}
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


def decide(found: Comparison, options: CompareOptions) -> None:
    """A verdict for each target and candidate, and the budgets of the candidates."""
    for candidate in found.models[1:]:
        budget = candidate.recipe.budget if candidate.recipe else BudgetSection()
        limit = budget.max_top1_drop if options.max_drop is None else options.max_drop
        for target in found.targets:
            found.verdicts += _verdicts(found, candidate, target, limit)
            least = options.min_speedup or (budget.min_speedup or {}).get(target)
            if least is not None and found.entry(target, candidate.name):
                over = dict(_speedups(found, target, candidate.name)).get(found.baseline.name)
                value = None if over is None else over[0]
                found.budgets.append(_at_least(f"min_speedup on {target}", least, value))
        if limit is not None:
            drops = [found.drop(target, candidate.name) for target in found.targets]
            worst = max((drop.value for drop in drops if drop is not None), default=None)
            found.budgets.append(_at_most(f"max_top1_drop of {candidate.name}", limit, worst))
        if budget.max_size is not None:
            size = max((size_of(p) for p in candidate.files.values()), default=0) / 1e6
            name = f"max_size of {candidate.name} (MB)"
            found.budgets.append(_at_most(name, budget.max_size, size))


def _at_most(name: str, limit: float, value: float | None) -> Budget:
    return Budget(name, limit, value, value is not None and value <= limit)


def _at_least(name: str, limit: float, value: float | None) -> Budget:
    return Budget(name, limit, value, value is not None and value >= limit)


def _verdicts(
    found: Comparison, candidate: Contender, target: str, limit: float | None
) -> Iterator[Verdict]:
    drop = found.drop(target, candidate.name)
    if drop is not None:
        speedups = dict(_speedups(found, target, candidate.name))
        timed = found.latency.get((1, 1), {})
        noisy = any(one.is_noisy for key, one in timed.items() if key.startswith(f"{target}/"))
        yield judge(target, candidate.name, speedups, drop, limit, noisy)
    board = found.boards.get((target, candidate.name))
    if board is not None and candidate.recipe is not None:
        said = board_verdict(candidate.name, candidate.recipe.precision, board)
        if said is not None:
            yield said


def _speedups(
    found: Comparison, target: str, name: str
) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Over each of the baseline's settings, batch 1, one thread."""
    timed = found.latency.get((1, 1), {})
    candidate = timed.get(f"{target}/{name}")
    for other in (found.baseline.name, found.baseline.name + BF16):
        baseline = timed.get(f"{target}/{other}")
        if candidate is not None and baseline is not None:
            yield other, candidate.speedup_over(baseline)
