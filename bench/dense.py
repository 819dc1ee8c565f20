"""Where there is an answer for every place: masks at 512x512 beside the classifier at that size.

The same backbone with its two heads, as published and as ours, in turns; then how the time of the
one for masks grows to 1024x1024 (`make bench WHAT=dense`). Random weights: they change no time.
"""

import argparse
import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from growth import Subject, curves, open_run
from material import FEW, FEW_CALIBRATED, TARGETS, Finished, Scale, finished, recipe_for
from peers import publish
from performance_page import WITHOUT, dense_text, write_page
from rich.console import Console

from care_compress import machine
from care_compress.evaluate.latency import LatencyPlan, measure_latency
from care_compress.files import digest_of, fingerprint, write_text
from care_compress.machine import git_revision
from care_compress.recipe.sections import Task
from care_compress.runtime.on_openvino import has_bfloat16

SIDE = 512
SIDES = (256, SIDE, 1024)
RECIPES: dict[Task, str] = {"classification": "int8_ptq", "segmentation": "seg_int8_ptq"}
PLAN = LatencyPlan(seconds=1.0, least_runs=8, warmup=2)


def main() -> None:
    """Make what is missing, measure what is not measured, write JSON and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="care_s0")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    options = parser.parse_args()
    console = Console(width=150)
    suffix = WITHOUT if machine.dot_products_in("openvino") is False else ""
    root = options.runs / f"bench{suffix}"
    found = bench(options.arch, root, console)
    console.print(dense_text(found), markup=False, soft_wrap=True)
    store = options.docs / "performance" / f"dense_{options.arch}{suffix}.json"
    write_text(store, json.dumps(found, indent=1) + "\n")
    write_page(options.docs)


def bench(arch: str, root: Path, console: Console) -> dict[str, Any]:
    """Both heads at one size, then one of them at several: kept if the files are the same."""
    subjects = {
        (task, one.what): one
        for task in RECIPES
        for one in subjects_of(
            arch, task, SIDES if task == "segmentation" else (SIDE,), root, console
        )
    }
    digests = [digest_of(path) for one in subjects.values() for path in one.files.values()]
    processor = machine.read_machine().cpu
    key = fingerprint([digests, str(PLAN), machine.installed_versions(), processor.kind])
    store = root / f"dense_{arch}.json"
    kept: dict[str, Any] = json.loads(store.read_text()) if store.is_file() else {}
    if kept.get("key") == key:
        return kept
    console.print("timing both heads, then sizes", markup=False)
    before, about = psutil.getloadavg()[0], machine.describe()
    found = {
        "key": key,
        "arch": arch,
        "date": str(datetime.now(UTC).date()),
        "revision": git_revision() or "unknown",
        "machine": {name: about[name] for name in ("cpu", "python", "libraries")},
        "side": SIDE,
        "rows": at_one_size(subjects),
        "growth": curves(
            {
                what: [open_run(one, side, 1, 1) for side in SIDES]
                for (task, what), one in subjects.items()
                if task == "segmentation"
            },
            [side * side for side in SIDES],
        ),
        "load_average": [round(before, 2), round(psutil.getloadavg()[0], 2)],
    }
    write_text(store, json.dumps(found, indent=1) + "\n")
    return found


def at_one_size(subjects: dict[tuple[Task, str], Subject]) -> list[dict[str, Any]]:
    """Each file's time, and how many times the float file of its head and runtime takes as long."""
    runs: dict[str, Callable[[], object]] = {
        f"{task}/{what}": open_run(one, SIDE, 1, 1) for (task, what), one in subjects.items()
    }
    timed = measure_latency(runs, 1, PLAN)
    rows = []
    for (task, what), one in subjects.items():
        mine = timed[f"{task}/{what}"]
        bases = {kind: f"{task}/{kind}, {one.runtime}" for kind in ("published FP32", "ours FP32")}
        rows.append(
            {
                "task": task,
                "what": what,
                "ms": round(mine.percentiles()["p50"], 2),
                "over": {
                    kind: [round(end, 3) for end in mine.speedup_over(timed[base])]
                    for kind, base in bases.items()
                },
                "noisy": mine.is_noisy,
            }
        )
    return rows


def subjects_of(
    arch: str, task: Task, sides: tuple[int, ...], root: Path, console: Console
) -> list[Subject]:
    """One head's files for every size: as published, ours in float, ours in INT8."""
    files: dict[str, dict[int, Path]] = {}
    for side in sides:
        scale = Scale(arch, side, task=task)
        place = root / scale.folder / "dense" / str(side)
        int8, plain = (_run(name, scale, root, place, console) for name in (RECIPES[task], "fp32"))
        published = publish(int8.network(), side, place)
        for runtime, target, path in (
            ("OpenVINO", TARGETS[0], published.with_suffix(".xml")),
            ("ONNX Runtime", TARGETS[1], published),
        ):
            files.setdefault(f"published FP32, {runtime}", {})[side] = path
            files.setdefault(f"ours FP32, {runtime}", {})[side] = plain.file(target)
            files.setdefault(f"ours INT8, {runtime}", {})[side] = int8.file(target)
    halves = "bf16" if has_bfloat16() else "f32"
    return [
        Subject(what, halves if what.startswith("ours INT8, OpenVINO") else "f32", paths)
        for what, paths in files.items()
    ]


def _run(name: str, scale: Scale, root: Path, place: Path, console: Console) -> Finished:
    few = FEW if name == "fp32" else FEW_CALIBRATED
    return finished(recipe_for(name, scale, root, few), place, name, console)


if __name__ == "__main__":
    main()
