"""Sweeps whose trials are trivial: they make a run directory, and what a table of trials shows."""

import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from rich.console import Console

from care_compress.errors import RecipeError
from care_compress.recipe.recipe import Recipe
from care_compress.report.write import page_html
from care_compress.run.context import Watch
from care_compress.sweep.cluster import Cluster
from care_compress.sweep.driver import begun_before, drive, space_of
from care_compress.sweep.sections import Sweep, read_sweep
from care_compress.sweep.trials import make_search

SCHEMA = Path(page_html.__code__.co_filename).with_name("sweep.schema.json")


def sweep_of(folder: Path, **asked: Any) -> Sweep:
    """A sweep as its file would say it."""
    path = folder / "tiny_sweep.yaml"
    path.write_text(yaml.safe_dump({"recipes": ["int8_ptq"], **asked}))
    return read_sweep(str(path))


def trivial(
    recipe: Recipe, runs: Path, name: str, console: Console, repair: bool, watch: Watch | None
) -> Mapping[str, Any]:
    """A run that says of itself what its recipe said: more images, a smaller drop."""
    assert recipe.quantize is not None
    images = recipe.quantize.calibrate.images
    if images == 13:
        raise RecipeError("thirteen is no number of images.", "take another")
    if images == 14:
        os.abort()  # as a library that crashes does
    folder = runs / name
    folder.mkdir(parents=True, exist_ok=True)
    import ray

    with (folder / "made").open("a") as file:
        file.write(f"{ray.get_runtime_context().get_node_id()}\n")
    for validations in range(1, 10) if watch is not None else ():
        watch("qat", validations, 90.0 - 1 / images)
    time.sleep(recipe.quantize.calibrate.batch_size / 1000)
    drop = 1 / images
    results = {
        "precision": "int8",
        "accuracy": {"images": 100, "top1": 90.0 - drop, "top5": 99.0},
        "kept": "ptq",
        "candidates": {"ptq": {"drop": drop, "drop_ci95": [drop - 0.1, drop + 0.1]}},
        "exports": {
            "onnxruntime-cpu": {
                "models": {"int8": {"holds": True, "size_bytes": 1000 * images, "file": "i.onnx"}}
            }
        },
        "plan": {"energy_mj": 0.5},
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "manifest.json").write_text(json.dumps({"outputs": {}}))
    return results


def times_made(runs: Path, on: str = "") -> dict[str, int]:
    """How often each run was begun, on any node or on this one."""
    begun = {path.parent.name: path.read_text().split() for path in runs.glob("*/made")}
    here = {name: [node for node in nodes if on in node] for name, nodes in begun.items()}
    return {name: len(nodes) for name, nodes in here.items() if nodes}


def run(
    cluster: Cluster, sweep: Sweep, folder: Path, console: Console | None = None
) -> tuple[int, dict[str, Any]]:
    """Run a sweep of trivial trials; return its exit code and what it wrote."""
    cluster.ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # not on the nodes
    search = make_search(sweep, folder.parent, begun_before(folder, space_of(sweep)))
    code = drive(cluster, sweep, folder, search, trivial, console or Console(quiet=True))
    value: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    jsonschema.validate(value, json.loads(SCHEMA.read_text()))
    return code, value
