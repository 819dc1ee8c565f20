"""The files of a comparison take turns: latency, loading and peak memory of each."""

from collections.abc import Callable
from itertools import product

import torch
from rich.console import Console

from care_compress import machine
from care_compress.comparison import CompareOptions, Comparison, Entry
from care_compress.data.loader import BadImages
from care_compress.data.samples import Samples
from care_compress.errors import TargetError
from care_compress.evaluate.exports import digest_of
from care_compress.evaluate.images import hold_images
from care_compress.evaluate.latency import measure_latency
from care_compress.progress import step_line
from care_compress.runtime.memory import peak_memory
from care_compress.runtime.runners import Runner, open_runner
from care_compress.sections import DataSection

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
