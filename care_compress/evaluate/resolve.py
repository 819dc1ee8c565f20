"""Who is compared: from what a user types to files, one for each target.

A name is a run, a recipe, a precision (the newest run of it) or a path. Names that could mean
several runs mean the newest one on the same model and images as the others.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from care_compress.data.loader import CPU
from care_compress.errors import CareError
from care_compress.files import read_json
from care_compress.recipe.recipe import Precision, Recipe, load_recipe
from care_compress.recipe.sections import DataSection
from care_compress.run.finished import FinishedRun, as_written, read_run
from care_compress.runtime.artifact import CHECKPOINT_SUFFIXES, open_predictor
from care_compress.tasks.known import task_called

# The target whose runtime reads a bare file.
READERS = {".onnx": "onnxruntime-cpu", ".xml": "openvino-cpu"}
MakeRun = Callable[[Recipe, Path, str, Console], object]  # runs a recipe; handed in
SIMULATION = "torch"  # stands for a target where a checkpoint is compared as it is


@dataclass(frozen=True)
class NamedModel:
    """One model under comparison."""

    name: str
    files: dict[str, Path]  # by target
    run: Path | None = None
    recipe: Recipe | None = None
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def targets(self) -> list[str]:
        """Those it has a file for, and those whose export failed."""
        exports = self.results.get("exports", {})
        return [*self.files, *(target for target, one in exports.items() if "failed" in one)]

    @cached_property
    def task(self) -> str:
        """What it answers; a file without a run says it of itself."""
        if self.recipe is not None:
            return self.recipe.task
        (path,) = self.files.values()
        return open_predictor(str(path), CPU).task

    @property
    def checkpoint_sha256(self) -> str | None:
        """Digest of the float weights it began with; None where nobody noted it."""
        if self.run is None or self.recipe is None:
            return None
        return FinishedRun(self.run, self.recipe, self.results).start_sha256

    @property
    def export_of(self) -> dict[str, dict[str, Any]]:
        """``export.json`` of every target that has files."""
        assert self.run is not None
        found = {}
        for target in self.files:
            path = self.run / "exports" / target / "export.json"
            with as_written(path):
                export = read_json(path)
                # What `compare` asks an export.
                _ = export["preprocessing"], export["classes"]
                _ = [entry["sha256"] for entry in export["models"].values()]
            found[target] = export
        return found

    def same_start(self, other: "NamedModel") -> bool:
        """Whether both runs began with the same model and images."""
        if self.recipe is None or other.recipe is None:
            return True
        return (
            self.task == other.task
            and same_images(self.task, self.recipe.data, other.recipe.data)
            and self.recipe.model.checkpoint == other.recipe.model.checkpoint
        )


def same_images(task: str, one: DataSection, other: DataSection) -> bool:
    """Whether two runs of a task look at the same images in the same way."""
    keys = set(DataSection.model_fields) - {"workers"} - task_called(task).unused
    return one.model_dump(include=keys) == other.model_dump(include=keys)


def named_models(names: list[str], runs: Path) -> list[NamedModel | str]:
    """Find whom the names mean; a name with no run stays a name."""
    found = {name: _options(name, runs) for name in names}
    # The last name that means one thing tells which model and images are meant.
    settled = next((found[name][0] for name in reversed(names) if found[name]), None)
    chosen: list[NamedModel | str] = []
    for name in names:
        fitting = [one for one in found[name] if settled is None or one.same_start(settled)]
        if fitting:
            chosen.append(fitting[0])
        elif found[name] and name not in get_args(Precision):
            chosen.append(found[name][0])  # named outright: the check of the images says why not
        else:
            chosen.append(name)
    return chosen


def _options(name: str, runs: Path) -> list[NamedModel]:
    """Return what a name may mean, best first."""
    path = Path(name)
    if path.suffix in (*READERS, *CHECKPOINT_SUFFIXES, ".engine"):
        if not os.path.isfile(path):
            raise CareError(f"{name} is not a file.", "check the path, or name a run")
        target = READERS.get(path.suffix, SIMULATION)
        if path.suffix == ".engine":
            target = path.resolve().parent.name  # exports/<target>/int8.engine
        return [NamedModel(name, {target: path})]
    if os.path.isfile(runs / name / "results.json"):
        return [_of_run(runs / name)]
    every = [(file, _of_run(file.parent)) for file in runs.glob("*/results.json")]
    # A slimmed network is nobody's float baseline: it is meant only where it is named.
    wanted = [
        (file, one)
        for file, one in every
        if one.results.get("recipe") == name
        or (one.results.get("precision") == name and not (name == "fp32" and "slim" in one.results))
    ]
    newest_first = sorted(wanted, key=lambda pair: -pair[0].stat().st_mtime)
    return [one for _, one in newest_first]


def _of_run(run: Path) -> NamedModel:
    found = read_run(run)
    results, recipe = found.results, found.recipe
    files = {}
    with as_written(run / "results.json"):
        for target, export in results.get("exports", {}).items():
            main = export.get("models", {}).get(recipe.precision)
            if main is not None:
                files[target] = run / "exports" / target / main["file"]
    return NamedModel(run.name, files, run, recipe, results)


def float_recipe_of(candidate: NamedModel) -> Recipe:
    """Return the float baseline of a quantized run: the same model on the same images."""
    assert candidate.recipe is not None
    start = candidate.recipe
    checkpoint: str | None = start.model.checkpoint
    if start.train is not None:
        assert candidate.run is not None
        checkpoint = str(candidate.run / "float" / "model.safetensors")
    values: dict[str, object] = {
        "task": start.task,
        "model": {"checkpoint": checkpoint, "arch": start.model.arch},
        "data": start.data.model_dump(mode="json"),
        "evaluate": start.evaluate.model_dump(mode="json"),
        "export": {**start.export.model_dump(mode="json"), "targets": list(candidate.files)},
    }
    return load_recipe("fp32", [], values)
