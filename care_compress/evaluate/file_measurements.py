"""What the compared files do here: which runs where, what each answers, how long each takes.

The files that are timed are the files that are scored, on the same images in the same order.
"""

import contextlib
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from care_compress import machine
from care_compress.console import progress_bar, step_line
from care_compress.data.loader import CPU, BadImages, prepared_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.data.sources import check_classes
from care_compress.errors import TargetError
from care_compress.evaluate.agreement import HeldImages, hold_images
from care_compress.evaluate.comparison import BF16, CompareOptions, Comparison, Entry
from care_compress.evaluate.latency import measure_latency
from care_compress.evaluate.readback import (
    answers_beside,
    counted_only,
    read_back,
    read_back_checks,
    what_failed,
)
from care_compress.evaluate.resolve import SIMULATION, NamedModel
from care_compress.files import digest_of
from care_compress.recipe.sections import DataSection
from care_compress.recipe.target import load_target
from care_compress.run.finished import as_written
from care_compress.runtime.artifact import open_predictor
from care_compress.runtime.dot_products import check_needs
from care_compress.runtime.memory import peak_memory
from care_compress.runtime.on_openvino import has_bfloat16, openvino_devices
from care_compress.runtime.profile import SECONDS, profile_layers, read_engine_profile
from care_compress.runtime.runners import Runner, open_runner
from care_compress.shipped import QUANTIZE
from care_compress.tasks.task import Collected, Task

BARE = "a file without a run says nothing of the model it was made from"
OTHER_IMAGES = f"its export was checked on other images; {QUANTIZE} exports it again"
BATCHES = (1, 8)


def find_entries(
    models: list[NamedModel], options: CompareOptions
) -> tuple[list[Entry], dict[tuple[str, str], str]]:
    """Find every file that can run here, and why the others cannot."""
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
    """Say why a model cannot be run on a target here; nothing if it can."""
    if path is None:
        export = one.results.get("exports", {}).get(target, {})
        if "failed" in export:
            return f"the export of {one.name} failed: {export['failed']}"
        skipped = export.get("skipped", "")
        return skipped or f"{one.name} has no file for {target}; {QUANTIZE} exports it"
    if not path.is_file():
        return f"{path} is gone; {QUANTIZE} again"
    if target == SIMULATION:
        return ""
    about = load_target(target)
    if about.runtime == "openvino" and about.device.upper() not in openvino_devices():
        return f"OpenVINO sees no {about.device.upper()} here; compare on a machine with one"
    if about.is_engine and path.suffix != ".engine":
        return f"needs its device: make bundle TARGET={target}, then care-compress import-results"
    here = machine.read_machine()
    platform = f"{here.system} {here.arch}"
    if about.needs.platforms and platform not in about.needs.platforms:
        return f"it is for {' or '.join(about.needs.platforms)}, and this is {platform}"
    if one.run is not None and about.device == "cpu":
        try:
            check_needs(path, one.export_of[target].get("needs"), about.runtime)
        except TargetError as error:
            return error.message.removesuffix(".")
    return ""


def score(
    task: Task,
    entries: list[Entry],
    models: list[NamedModel],
    samples: Samples,
    data: DataSection,
    options: CompareOptions,
    console: Console,
) -> Collected[Any]:
    """Collect every file's answers to the same images, decoded once."""
    first = {entry.target: entry.key for entry in reversed(entries)}
    predictors = {
        entry.key: open_predictor(
            str(entry.path), CPU, precision=entry.precision, plugin=entry.device
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
        return task.collect(predictors, baseline_of, batches, advance)


def profile_files(found: Comparison, console: Console) -> None:
    """Find layers and times of what runs here, and precisions of engines that were built."""
    image = _images(found, 1)
    seconds = min(SECONDS, found.options.latency.seconds)
    with step_line(console) as notify:
        for entry in found.entries:
            if entry.is_timed:
                notify(f"profiling {entry.name} on {entry.target}")
                found.layers[entry.key] = profile_layers(
                    entry.path, image, 1, entry.precision, entry.device, seconds
                )
    for target, name in found.missing:
        # An engine that was built ahead tells its layers; its GPU need not be here.
        path = next(one for one in found.models if one.name == name).files.get(target)
        if path is not None and (engine := path.with_suffix(".engine")).is_file():
            found.layers[f"{target}/{name}"] = read_engine_profile(engine)


def read_files_back(found: Comparison, console: Console) -> None:
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
                expected_file = answers_beside(entry.path, one.recipe.precision)
                if not expected_file.is_file():  # an earlier version's: its counts alone are known
                    here, counted = found.collected.answers[entry.key], one.results["accuracy"]
                    metric = found.task.metric
                    found.read_backs[entry.key] = counted_only(
                        metric,
                        here.metrics()[metric.key],
                        len(found.collected),
                        counted[metric.key],
                        counted["images"],
                    )
                    continue
                expected = torch.from_numpy(np.load(expected_file, allow_pickle=False))
                count = one.recipe.export.images
                if count not in held:
                    held[count] = hold_images(found.samples, found.data, count, BadImages())
                same_list = one.results["data"]["fingerprint"] == found.samples.fingerprint()
                if not same_list or len(held[count].labels) != len(expected):
                    unread[entry.key] = OTHER_IMAGES
                    continue
                # Floats in float32 on a CPU, as the export had them.
                precision = "f32" if entry.device == "CPU" else entry.precision
                predict = open_predictor(
                    str(entry.path), CPU, precision=precision, plugin=entry.device
                )
                export = one.results["exports"][entry.target]
                least_db = float(export["models"][one.recipe.precision]["least_sqnr_db"])
                found.read_backs[entry.key] = read_back(
                    found.task, expected, held[count].logits(predict), held[count], least_db
                )
    found.failed = _failed(found)
    found.checks += read_back_checks(found.read_backs, found.failed, unread)


def _failed(found: Comparison) -> dict[str, str]:
    """Return why exports failed where they were made, for every target that is compared."""
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


def time_files(found: Comparison, console: Console) -> None:
    """Time every file at every batch size and number of threads; then measure its peak memory."""
    cores = len(machine.usable_cores())
    timed = [entry for entry in found.entries if entry.is_timed]
    found.load_average["before"] = machine.load_average()
    with step_line(console) as notify:
        for batch, threads in product(BATCHES, dict.fromkeys((1, cores))):
            notify(f"timing batch {batch} on {threads} threads")
            runners = _runners(timed, _images(found, batch), threads)
            if not runners:
                return
            runs: dict[str, Callable[[], object]] = {k: r.run for k, r in runners.items()}
            found.latency[batch, threads] = measure_latency(runs, batch, found.options.latency)
            if (batch, threads) == (1, 1):
                found.load_seconds = {key: r.load_seconds for key, r in runners.items()}
        found.load_average["after"] = machine.load_average()
        notify("measuring memory")
        size = (found.data.resolution, found.data.resolution)
        known: dict[tuple[str, ...], int] = {}  # several models may have the same bytes
        for entry in timed:
            key = (digest_of(entry.path), entry.target, entry.precision)
            if key not in known:
                known[key] = peak_memory(
                    entry.path, size=size, precision=entry.precision, device=entry.device
                )
            found.peak_memory[entry.key] = known[key]


def _images(found: Comparison, count: int) -> torch.Tensor:
    """Return exactly so many images, the first ones again where there are fewer."""
    single = found.data.model_copy(update={"workers": 0})
    (images,) = hold_images(found.samples, single, count, BadImages()).batches(count)
    repeats = -(-count // len(images))
    return images.repeat(repeats, 1, 1, 1)[:count].contiguous()


def _runners(entries: list[Entry], images: torch.Tensor, threads: int) -> dict[str, Runner]:
    """Open every file for timing, on targets where each of them takes this batch."""
    ready: dict[str, Runner] = {}
    unable = set()
    for entry in entries:
        try:
            ready[entry.key] = open_runner(
                entry.path, images, threads, entry.precision, entry.device
            )
        except TargetError:
            if len(images) == 1:
                raise
            unable.add(entry.target)
    return {key: one for key, one in ready.items() if key.split("/")[0] not in unable}
