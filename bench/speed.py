"""INT8 against every alternative, on one machine, in turns (`make bench`).

For each size of CARE at 224: the files of real runs, the published network, and what other tools
make of it (`peers.py`), in OpenVINO and ONNX Runtime, at batch 1 and 8, on one thread and on all.
Then how time grows (`growth.py`), and docs/PERFORMANCE.md from all of it (`performance_page.py`).
With ``--ckpt --data --resolution --crop`` it is one trained checkpoint instead, and what each file
answers to the same validation images stands beside its speed. What is finished is kept in
``runs/bench``; remove that folder to begin anew. Processors with and without integer dot products
have tables of their own, side by side.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from growth import measure_growth
from material import Finished, Scale, Trained, finished, first_images, recipe_for, run_of
from peers import ONNX_PEERS, OPENVINO_PEERS, Made, make_peers, publish, reason_of
from performance_page import WITHOUT, table_of, write_page
from rich.console import Console
from torch import Tensor

from care_compress import machine
from care_compress.console import progress_bar
from care_compress.data.loader import BadImages, images_at_once, prepared_batches
from care_compress.data.samples import spread_indices
from care_compress.data.sources import open_samples
from care_compress.errors import TargetError
from care_compress.evaluate.latency import Latency, LatencyPlan, measure_latency
from care_compress.files import digest_of, fingerprint, size_of, write_text
from care_compress.model.predictor import Predictor
from care_compress.recipe.sections import DataSection
from care_compress.runtime.artifact import open_predictor
from care_compress.runtime.on_openvino import has_bfloat16
from care_compress.runtime.runners import Runner, open_runner
from care_compress.tasks.classification import collect_answers

ARCHES = ("care_s0", "care_s1", "care_s2")
RESOLUTION = 224
BATCHES = (1, 8)
IMAGES = 2000  # validation images, evenly spaced
# Fewer runs than compare takes: there are three times as many files, and eight images take long.
PLAN = LatencyPlan(seconds=1.0, least_runs=15, warmup=3)
OPENVINO, ONNXRUNTIME = "OpenVINO", "ONNX Runtime"
# Cut networks, as slim_int8_ptq makes them; without training, which changes no time.
SLIM = {
    "slim70": ("ours, INT8, 30 % fewer MACs", ()),
    "slim50": ("ours, INT8, half of the MACs", ("slim.budget.macs=0.5", "slim.hidden=0.88")),
    "fastest": (
        "ours, INT8, 60 % fewer MACs, hard-swish",
        ("slim.budget.macs=0.4", "slim.hidden=null", "quantize.activation=hard_swish"),
    ),
}
Interval = tuple[float, float, float]
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One file in one runtime and setting."""

    key: str
    what: str
    runtime: str
    made: Made
    precision: str = "f32"  # what OpenVINO may round floats to

    @property
    def is_ours(self) -> bool:
        """Whether it is the INT8 file that all others are held against."""
        return self.key.startswith("int8/")


def main() -> None:
    """Make what is missing, measure what is not measured, write JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", action="append", choices=(*ARCHES, "care_nano"))
    parser.add_argument("--resolution", type=int, default=RESOLUTION)
    parser.add_argument("--ckpt", type=Path, help="a trained checkpoint, instead of the sizes")
    parser.add_argument("--data", help="its images")
    parser.add_argument("--crop", type=float, default=1.0, help="their crop ratio")
    parser.add_argument("--images", type=int, default=IMAGES, help="validation images to score")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    parser.add_argument("--no-growth", action="store_true", help="only the tables")
    options = parser.parse_args()
    if bool(options.ckpt) != bool(options.data):
        parser.error("--ckpt and --data belong together")
    console = Console(width=150)
    # What runs made for one class of processors is not what they make for the other.
    suffix = WITHOUT if machine.dot_products_in("openvino") is False else ""
    root = options.runs / f"bench{suffix}"
    store = options.docs / "performance"
    scales = [Scale(arch, options.resolution) for arch in options.arch or ARCHES]
    if options.ckpt:
        data = DataSection(
            source=options.data, resolution=options.resolution, crop_pct=options.crop
        )
        trained = Trained(options.ckpt, data, options.images)
        scales = [Scale(options.ckpt.stem, options.resolution, trained)]
    for scale in scales:
        value = bench(scale, root, console)
        console.print(table_of(value), markup=False, soft_wrap=True)
        write_text(store / f"{scale.name}{suffix}.json", json.dumps(value, indent=1) + "\n")
    if not options.no_growth and not options.ckpt:
        value = measure_growth(scales[0], root, console)
        write_text(store / f"growth{suffix}.json", json.dumps(value, indent=1) + "\n")
    write_page(options.docs)
    console.print(f"written to {options.docs / 'PERFORMANCE.md'}")


def bench(scale: Scale, root: Path, console: Console) -> dict[str, Any]:
    """Everything about one size: an earlier measurement of the same files, or a new one."""
    ours, plain = (run_of(name, scale, root, console) for name in ("int8_ptq", "fp32"))
    slim = {
        key: finished(
            recipe_for("slim_int8_ptq", scale, root, changed), root / scale.folder, key, console
        )
        for key, (_, changed) in SLIM.items()
    }
    console.print(f"{scale.arch}: the peers' files", markup=False)
    folder = root / scale.folder
    published = publish(ours.network(), scale.resolution, folder / "peers")
    calibration = ours.calibration().batches(ours.recipe.data, 32, torch.device("cpu"))
    peers = make_peers(published, plain.file("openvino-cpu"), torch.cat(list(calibration)))
    entries = entries_of(ours, plain, slim, published, peers)
    files = {entry.key: said_of(entry.made) for entry in entries}
    about = machine.describe()
    processor = machine.read_machine().cpu.kind
    images = scale.trained and scale.trained.images
    key = fingerprint([files, str(PLAN), images, machine.installed_versions(), processor])
    store = folder / f"speed_{scale.resolution}.json"
    kept: dict[str, Any] = json.loads(store.read_text()) if store.is_file() else {}
    if kept.get("key") != key:
        kept = {
            "key": key,
            "arch": scale.arch,
            "resolution": scale.resolution,
            "date": str(datetime.now(UTC).date()),
            "revision": ours.revision,
            "machine": {name: about[name] for name in ("cpu", "python", "libraries")},
            "files": files,
            "answers": {},
            "settings": [],
        }
    if scale.trained is not None and not kept["answers"]:
        console.print(f"scoring {scale.trained.images} images", markup=False)
        kept["answers"] = answers_of(entries, ours.recipe.data, scale.trained.images, console)
        write_text(store, json.dumps(kept, indent=1) + "\n")
    done = {(setting["batch"], setting["threads"]) for setting in kept["settings"]}
    for setting in by_setting(first_images(ours.recipe.data, max(BATCHES))):
        if (len(setting.images_BCHW), setting.threads) not in done:
            kept["settings"].append(measured(entries, setting, console))
            kept["settings"].sort(key=lambda one: (one["batch"], one["threads"]))
            write_text(store, json.dumps(kept, indent=1) + "\n")
    return kept


def entries_of(
    ours: Finished,
    plain: Finished,
    slim: dict[str, Finished],
    published: Path,
    peers: dict[str, Made],
) -> list[Entry]:
    """Every file in every runtime that reads it; the published network in FP32 is the first."""
    halves = "bf16" if has_bfloat16() else "f32"  # what OpenVINO chooses unasked
    openvino = [
        ("published", "published network, FP32", Made(published.with_suffix(".xml")), "f32"),
        ("published_bf16", "published network, BF16", Made(published.with_suffix(".xml")), "bf16"),
        ("float", "ours, FP32", Made(plain.file("openvino-cpu")), "f32"),
        ("float_bf16", "ours, BF16", Made(plain.file("openvino-cpu")), "bf16"),
        ("int8", "ours, INT8", Made(ours.file("openvino-cpu")), halves),
        ("int8_f32", "ours, INT8, the rest in FP32", Made(ours.file("openvino-cpu")), "f32"),
        *((key, SLIM[key][0], Made(run.file("openvino-cpu")), halves) for key, run in slim.items()),
        *(
            (name, what, peers[f"{name}.xml"], halves)
            for name, what in (ONNX_PEERS | OPENVINO_PEERS).items()
        ),
    ]
    if halves == "f32":
        openvino = [
            row for row in openvino if row[0] not in ("published_bf16", "float_bf16", "int8_f32")
        ]
    onnxruntime = [
        ("published", "published network, FP32", Made(published)),
        ("float", "ours, FP32", Made(plain.file("onnxruntime-cpu"))),
        ("int8", "ours, INT8", Made(ours.file("onnxruntime-cpu"))),
        *((key, SLIM[key][0], Made(run.file("onnxruntime-cpu"))) for key, run in slim.items()),
        *((name, what, peers[f"{name}.onnx"]) for name, what in ONNX_PEERS.items()),
    ]
    return [
        *(
            Entry(f"{key}/{OPENVINO}", what, OPENVINO, made, hint)
            for key, what, made, hint in openvino
        ),
        *(
            Entry(f"{key}/{ONNXRUNTIME}", what, ONNXRUNTIME, made)
            for key, what, made in onnxruntime
        ),
    ]


def said_of(made: Made) -> dict[str, Any]:
    """Which file it is: that of the run, by the digest its results have."""
    if made.reason:
        return {"reason": made.reason}
    return {"file": made.path.name, "sha256": digest_of(made.path), "bytes": size_of(made.path)}


@dataclass(frozen=True)
class Setting:
    """How many images at once, on how many threads."""

    images_BCHW: Tensor
    threads: int


def by_setting(images_BCHW: Tensor) -> Iterator[Setting]:
    """Each batch size on one thread and on all."""
    for batch, threads in product(BATCHES, dict.fromkeys((1, len(machine.usable_cores())))):
        yield Setting(images_BCHW[:batch].contiguous(), threads)


def measured(entries: list[Entry], setting: Setting, console: Console) -> dict[str, Any]:
    """One table: every file in turns."""
    batch, threads = len(setting.images_BCHW), setting.threads
    console.print(f"timing batch {batch} on {threads} threads", markup=False)

    def open_entry(entry: Entry) -> Runner:
        return open_runner(entry.made.path, setting.images_BCHW, threads, entry.precision)

    runners, reasons = opened(entries, open_entry)
    before = psutil.getloadavg()[0]
    runs: dict[str, Callable[[], object]] = {key: one.run for key, one in runners.items()}
    timed = measure_latency(runs, batch, PLAN)
    rows = [row_of(entry, timed, reasons.get(entry.key, "")) for entry in entries]
    load = [round(before, 2), round(psutil.getloadavg()[0], 2)]
    return {"batch": batch, "threads": threads, "load_average": load, "rows": rows}


def answers_of(
    entries: list[Entry], data: DataSection, images: int, console: Console
) -> dict[str, Any]:
    """What each file answers, beside the published network in FP32 in the same runtime."""

    def open_entry(entry: Entry) -> Predictor:
        path = str(entry.made.path)
        return open_predictor(path, torch.device("cpu"), precision=entry.precision)

    predictors, reasons = opened(entries, open_entry)
    baseline_of = {entry.key: f"published/{entry.runtime}" for entry in entries}
    samples, size = open_samples(data, "val"), images_at_once(None, torch.device("cpu"))
    indices = spread_indices(len(samples), images)
    batches = prepared_batches(samples, data, size, bad=BadImages(), indices=indices)
    with progress_bar(console, "scoring", len(indices)) as advance:
        found = collect_answers(predictors, baseline_of, batches, advance).answers
    answers: dict[str, Any] = {key: {"reason": reason} for key, reason in reasons.items()}
    for key, mine in found.items():
        before = found[baseline_of[key]]
        drop = before.drop_to(mine)
        answers[key] = {
            "images": len(mine.right),
            "top1": round(mine.top1, 2),
            "lost": [round(end, 2) for end in (drop.value, drop.low, drop.high)],
            "same": round(before.agreement(mine), 2),
        }
    return answers


def opened(
    entries: list[Entry], open_entry: Callable[[Entry], T]
) -> tuple[dict[str, T], dict[str, str]]:
    """What runs, and why the others do not."""
    ready: dict[str, T] = {}
    reasons: dict[str, str] = {}
    for entry in entries:
        if entry.made.reason:
            reasons[entry.key] = entry.made.reason
            continue
        try:
            ready[entry.key] = open_entry(entry)
        except TargetError as error:
            reasons[entry.key] = reason_of(error)
    return ready, reasons


def row_of(entry: Entry, timed: dict[str, Latency], reason: str) -> dict[str, Any]:
    """One line of a table, with its ratios inside the runtime it ran in."""
    said = {"key": entry.key, "what": entry.what, "runtime": entry.runtime}
    if entry.key not in timed:
        return {**said, "reason": reason}
    mine = timed[entry.key]
    return {
        **said,
        "ms": {name: round(value, 3) for name, value in mine.percentiles().items()},
        "images_per_second": round(mine.throughput, 1),
        "over_published": _rounded(mine.speedup_over(timed[f"published/{entry.runtime}"])),
        "int8_over_it": _rounded(timed[f"int8/{entry.runtime}"].speedup_over(mine)),
        "noisy": mine.is_noisy,
    }


def _rounded(interval: Interval) -> list[float]:
    return [round(value, 3) for value in interval]


if __name__ == "__main__":
    main()
