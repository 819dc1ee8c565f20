"""How time grows: with the pixels of an image, the images at once, threads, and in the pipeline.

Linear attention must stay linear: were it quadratic, the exponent of time over pixels would rise
towards 2 with the resolution. All points of a curve take turns, so that a busy minute does not
bend it; the exponent is fitted to every turn, and its interval is that of the turns.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from material import FEW_CALIBRATED, TARGETS, Finished, Scale, finished, recipe_for, run_of
from numpy.typing import NDArray
from peers import publish
from rich.console import Console

from care_compress import machine
from care_compress.evaluate.latency import LatencyPlan, measure_latency
from care_compress.files import digest_of, fingerprint, write_text
from care_compress.machine import git_revision
from care_compress.model.care import ARCHITECTURES
from care_compress.recipe.recipe import load_recipe
from care_compress.runtime.on_openvino import has_bfloat16
from care_compress.runtime.runners import open_runner
from care_compress.tasks.intervals import centre_interval

RESOLUTIONS = (128, 224, 320, 512)
BATCHES = (1, 2, 4, 8, 16)
CALIBRATION = (64, 128, 256, 512)  # images, for the included care_nano
SMALL = 96  # pixels, at which the sizes are quantized to see how PTQ grows with them
UNEXPORTED = ("export.targets=[]", "evaluate.images=64")
PLAN = LatencyPlan(seconds=0.7, least_runs=15, warmup=2)


@dataclass(frozen=True)
class Subject:
    """One way to run the network, whose curves are drawn."""

    what: str
    precision: str
    files: dict[int, Path]  # by resolution

    @property
    def runtime(self) -> str:
        """Which runs it: what its name ends with."""
        return self.what.rpartition(", ")[2]


def measure_growth(scale: Scale, root: Path, console: Console) -> dict[str, Any]:
    """All curves of one size: an earlier measurement of the same files, or a new one."""
    ours = run_of("int8_ptq", scale, root, console)
    chosen = sorted({*RESOLUTIONS, scale.resolution})
    subjects = subjects_of(ours, scale, chosen, root, console)
    digests = [digest_of(path) for one in subjects for path in one.files.values()]
    processor = machine.read_machine().cpu.kind
    key = fingerprint([digests, str(PLAN), machine.installed_versions(), processor])
    store = root / scale.arch / f"growth_{scale.resolution}.json"
    kept: dict[str, Any] = json.loads(store.read_text()) if store.is_file() else {}
    if kept.get("key") != key:
        console.print("timing resolutions, batches and threads", markup=False)
        before = psutil.getloadavg()[0]
        kept = {
            "key": key,
            "arch": scale.arch,
            "date": str(datetime.now(UTC).date()),
            "revision": git_revision() or "unknown",
            **curves_of(subjects, scale.resolution),
            "pipeline": pipeline_times(root / "pipeline", console),
            "load_average": [round(before, 2), round(psutil.getloadavg()[0], 2)],
        }
        write_text(store, json.dumps(kept, indent=1) + "\n")
    return kept


def subjects_of(
    ours: Finished, scale: Scale, resolutions: Sequence[int], root: Path, console: Console
) -> list[Subject]:
    """The published network and our INT8, exported for every resolution."""
    published, openvino, onnxruntime = {}, {}, {}
    for resolution in resolutions:
        place = root / scale.arch / "growth" / str(resolution)
        run = ours
        if resolution != scale.resolution:
            recipe = recipe_for("int8_ptq", Scale(scale.arch, resolution), root, FEW_CALIBRATED)
            run = finished(recipe, place, "int8_ptq", console)
        published[resolution] = publish(run.network(), resolution, place).with_suffix(".xml")
        openvino[resolution], onnxruntime[resolution] = (run.file(name) for name in TARGETS)
    return [
        Subject("published network, FP32, OpenVINO", "f32", published),
        Subject("ours, INT8, OpenVINO", "bf16" if has_bfloat16() else "f32", openvino),
        Subject("ours, INT8, ONNX Runtime", "f32", onnxruntime),
    ]


def curves_of(subjects: list[Subject], resolution: int) -> dict[str, Any]:
    """Time over pixels, images at once, and threads; one thread but in the last."""
    sizes = sorted(subjects[0].files)
    threads = range(1, len(machine.usable_cores()) + 1)
    return {
        "resolution": curves(
            {one.what: [open_run(one, size, 1, 1) for size in sizes] for one in subjects},
            [size * size for size in sizes],
        ),
        "batch": curves(
            {one.what: [open_run(one, resolution, n, 1) for n in BATCHES] for one in subjects},
            BATCHES,
        ),
        "threads": curves(
            {one.what: [open_run(one, resolution, 1, n) for n in threads] for one in subjects},
            threads,
        ),
    }


def open_run(one: Subject, resolution: int, batch: int, threads: int) -> Callable[[], object]:
    """One file, ready to be timed on random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, resolution, resolution, generator=generator)
    return open_runner(one.files[resolution], images, threads, one.precision).run


def curves(runs: dict[str, list[Callable[[], object]]], points: Sequence[int]) -> dict[str, Any]:
    """Milliseconds of every point of every curve, all in turns."""
    flat = {f"{what}@{at}": run for what, row in runs.items() for at, run in enumerate(row)}
    found = measure_latency(flat, 1, PLAN)
    rows = []
    for what in runs:
        row = [found[f"{what}@{at}"] for at in range(len(points))]
        medians_TP = np.stack([one.medians for one in row], axis=1)
        rows.append(
            {
                "what": what,
                "ms": [round(float(np.median(one.medians)), 3) for one in row],
                "exponent": exponent(points, medians_TP),
                "noisy": any(one.is_noisy for one in row),
            }
        )
    return {"points": list(points), "rows": rows}


def exponent(points: Sequence[int], medians_TP: NDArray[np.float64]) -> list[float] | None:
    """The p of time ~ points^p, fitted to each turn, with the 95 % interval of the turns."""
    if len(points) < 2:
        return None
    logs = np.log(np.asarray(points, np.float64))
    logs -= logs.mean()
    slopes = np.log(medians_TP) @ logs / (logs @ logs)
    return [round(value, 3) for value in centre_interval(slopes)]


def pipeline_times(root: Path, console: Console) -> dict[str, Any]:
    """Seconds of PTQ, selection included: of one network on more images, of larger networks."""
    by_images, by_size = [], []
    # What a process does once, such as tracing a network, would all be in the first of them.
    for place, images in enumerate((CALIBRATION[0], *CALIBRATION)):
        recipe = load_recipe("int8_ptq", UNEXPORTED, {"quantize.calibrate.images": images})
        name = str(images) if place else "uncounted"
        by_images.append(_ptq_seconds(finished(recipe, root / "images", name, console)))
    macs = []
    for arch in ARCHITECTURES:
        recipe = recipe_for("int8_ptq", Scale(arch, SMALL), root)
        export = recipe.export.model_copy(update={"targets": ()})
        run = finished(recipe.model_copy(update={"export": export}), root / arch, "ptq", console)
        by_size.append(_ptq_seconds(run))
        macs.append(int(run.results["rewrites"][0]["macs"]))
    return {
        "images": {"points": list(CALIBRATION), "seconds": by_images[1:]},
        "macs": {"points": macs, "names": list(ARCHITECTURES), "seconds": by_size},
    }


def _ptq_seconds(run: Finished) -> float:
    spent = run.results["seconds"]
    return round(float(spent["select"] + spent["ptq"]), 2)
