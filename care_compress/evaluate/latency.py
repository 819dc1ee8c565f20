"""Latency of several models, measured so that they can be compared: in turns, on one machine.

Models take turns of a few runs each, in an order drawn for every turn, so that whatever else the
machine does hits all of them; a ratio is taken turn by turn, and its interval knows that a machine
which is slow stays slow for a while. Absolute figures are this machine's, now. Images are noise:
how long a network takes does not depend on what it sees.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from care_compress import machine
from care_compress.console import say, step_line
from care_compress.errors import TargetError
from care_compress.files import digest_of, json_text, size_of, write_text
from care_compress.quantize.artifact import quantized_header
from care_compress.runtime.artifact import Size, artifact_path, input_size
from care_compress.runtime.memory import peak_memory
from care_compress.runtime.on_openvino import unasked_precision
from care_compress.runtime.probe import probe
from care_compress.runtime.runners import open_runner
from care_compress.tasks.intervals import ratio_interval

NOISY = 0.25  # spread of one model's turns, quartile to quartile over median, that says too little
WARNING = "too noisy to say: other programs had the cores, or clocks moved; measure again"


@dataclass(frozen=True)
class LatencyPlan:
    """How long to measure each model."""

    seconds: float = 1.5
    least_runs: int = 50
    warmup: int = 10
    turns: int = 24


@dataclass(frozen=True)
class Latency:
    """Runs of one model, turn by turn."""

    turns: tuple[NDArray[np.float64], ...]  # milliseconds
    batch: int

    @property
    def milliseconds(self) -> NDArray[np.float64]:
        """Time of every run."""
        return np.concatenate(self.turns)

    @property
    def medians(self) -> NDArray[np.float64]:
        """Median of each turn."""
        return np.array([np.median(turn) for turn in self.turns])

    @property
    def throughput(self) -> float:
        """Images per second, one batch after the other."""
        return 1000 * self.batch / float(self.milliseconds.mean())

    @property
    def is_noisy(self) -> bool:
        """Whether the turns differ too much to say anything fine."""
        low, high = np.percentile(self.medians, [25, 75])
        return bool((high - low) > NOISY * np.median(self.medians))

    def percentiles(self) -> dict[str, float]:
        """Return p50, p90 and p99 in milliseconds."""
        return {f"p{p}": float(np.percentile(self.milliseconds, p)) for p in (50, 90, 99)}

    def speedup_over(self, other: "Latency") -> tuple[float, float, float]:
        """Return how many times faster than `other` it is, with the 95 % interval."""
        return ratio_interval(other.medians, self.medians)


def measure_latency(
    runs: Mapping[str, Callable[[], object]], batch: int, plan: LatencyPlan
) -> dict[str, Latency]:
    """Time every model in turns."""
    per_turn = {}
    for name, run in runs.items():
        for _ in range(plan.warmup):
            run()
        once = float(np.median(_timed(run, 3))) / 1000
        most = 20 * plan.least_runs
        wanted = max(plan.least_runs, min(int(plan.seconds / max(once, 1e-6)), most))
        per_turn[name] = -(-wanted // plan.turns)
    turns: dict[str, list[NDArray[np.float64]]] = {name: [] for name in runs}
    rng, names = np.random.default_rng(0), list(runs)
    for _ in range(plan.turns):
        # Drawn: whoever follows the same one each time has its caches and its heat.
        for name in (names[place] for place in rng.permutation(len(names))):
            run = runs[name]
            run()  # another model's weights are in the caches
            turns[name].append(_timed(run, per_turn[name]))
    return {name: Latency(tuple(found), batch) for name, found in turns.items()}


def _timed(run: Callable[[], object], count: int) -> NDArray[np.float64]:
    found = np.empty(count)
    for place in range(count):
        began = time.perf_counter()
        run()
        found[place] = 1000 * (time.perf_counter() - began)
    return found


@dataclass(frozen=True)
class SpeedOptions:
    """What a user may ask for; what is left out is the machine's or the file's own."""

    batches: tuple[int, ...] = (1, 8)
    threads: tuple[int, ...] | None = None
    precision: str | None = None
    resolution: int | None = None
    json_file: Path | None = None
    # One file alone has time: its slow runs are part of the answer.
    plan: LatencyPlan = LatencyPlan(seconds=5.0)


@dataclass(frozen=True)
class Setting:
    """One batch size on one number of threads."""

    batch: int
    threads: int
    load_seconds: float
    latency: Latency

    @property
    def is_noisy(self) -> bool:
        """Whether turns differ, or many runs are slow: a network takes the same time each time."""
        times = self.latency.percentiles()
        return self.latency.is_noisy or times["p90"] > (1 + NOISY) * times["p50"]

    def as_json(self) -> dict[str, Any]:
        """As ``--json`` writes it."""
        return {
            "batch": self.batch,
            "threads": self.threads,
            "latency_ms": self.latency.percentiles(),
            "throughput": self.latency.throughput,
            "runs": len(self.latency.milliseconds),
            "seconds": float(self.latency.milliseconds.sum()) / 1000,
            "load_seconds": self.load_seconds,
            "noisy": self.is_noisy,
        }


def measure_speed(artifact: str, options: SpeedOptions, console: Console) -> dict[str, Any]:
    """Time one artifact, print what was found, and write it where the user wants it."""
    path = artifact_path(artifact)
    probe(path, options.resolution)
    size = input_size(path, options.resolution)
    if options.precision is not None and path.suffix != ".xml":
        raise TargetError(
            f"{path} is computed in what it says; only OpenVINO rounds as it is told.",
            "leave --precision out",
        )
    precision = options.precision or (unasked_precision() if path.suffix == ".xml" else "f32")
    # First, while nothing of ours has run yet.
    before = machine.load_average()
    threads = options.threads or tuple(dict.fromkeys((1, len(machine.usable_cores()))))
    with step_line(console) as notify:
        notify("measuring memory")
        # An engine's memory is the GPU's, which is not counted here.
        memory = (
            None
            if path.suffix == ".engine"
            else peak_memory(path, size=size, threads=threads[0], precision=precision)
        )
        settings = []
        for batch, count in product(options.batches, threads):
            notify(f"timing batch {batch} on {count} threads")
            settings.append(_timed_file(path, size, batch, count, precision, options.plan))
    value = {
        "artifact": artifact,
        "sha256": digest_of(path),
        "size_bytes": size_of(path),
        "peak_memory_bytes": memory,
        "input": list(size),
        "floats_in": precision,
        "settings": [setting.as_json() for setting in settings],
        "machine": {
            **machine.describe(),
            "load_average": {"before": before, "after": machine.load_average()},
        },
    }
    _show(value, console)
    if path.suffix == ".safetensors" and quantized_header(path) is not None:
        console.print("this file simulates integers in float; time its exported files instead")
    if options.json_file is not None:
        write_text(options.json_file, json_text(value))
    return value


def _timed_file(
    path: Path, size: Size, batch: int, threads: int, precision: str, plan: LatencyPlan
) -> Setting:
    images = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))
    runner = open_runner(path, images, threads, precision)
    found = measure_latency({"it": runner.run}, batch, plan)
    return Setting(batch, threads, runner.load_seconds, found["it"])


def _show(value: dict[str, Any], console: Console) -> None:
    table = Table(title=escape(Path(value["artifact"]).name), title_justify="left")
    for column in ("batch", "threads", "p50 ms", "p90 ms", "p99 ms", "images/s", "load s", "runs"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in value["settings"]:
        table.add_row(
            str(one["batch"]),
            str(one["threads"]),
            *(f"{one['latency_ms'][p]:.2f}" for p in ("p50", "p90", "p99")),
            f"{one['throughput']:.0f}",
            f"{one['load_seconds']:.2f}",
            f"{one['runs']}{' noisy' if one['noisy'] else ''}",
        )
    console.print(table)
    memory = value["peak_memory_bytes"]
    height, width = value["input"]
    used = "memory: the GPU's" if memory is None else f"{memory / 1e6:.1f} MB of memory at its peak"
    text = (
        f"{value['size_bytes'] / 1e6:.2f} MB on disk, {used}, "
        f"{width}x{height} images, floats in {value['floats_in']}"
    )
    say(text, console)
    show_machine(value["machine"], console)
    if any(one["noisy"] for one in value["settings"]):
        console.print(f"[yellow]{WARNING}[/]", soft_wrap=True)


def show_machine(about: dict[str, Any], console: Console) -> None:
    """Print the processor and the state it was measured in, on one line."""
    cpu, load = about["cpu"], about["load_average"]
    features = [name for name, present in cpu["features"].items() if present]
    text = (
        f"{cpu['name']}, {cpu['logical_cores']} cores, {' '.join(features) or 'features unknown'}, "
        f"governor {cpu['governor'] or 'unknown'}, "
        f"load average {load['before']:.1f} before, {load['after']:.1f} after"
    )
    say(text, console)
