"""The Python interface: what the verbs do, as functions, by the same code.

    import care_compress as cc

    model = cc.load_checkpoint("care_s0.pth")
    result = cc.quantize(model, data="imagenet/", recipe="int8_ptq", resolution=224)
    print(result.accuracy, result.export("openvino-cpu"))
    print(cc.compare([cc.fp32(result), result]).verdicts)

Nothing is printed unless it is asked for, nothing ends the process, and what a user can get wrong
raises a `CareError` that says what to do. A run lies in its directory, where the verbs find it.
"""

import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from torch import nn

from care_compress.console import Terminal, html_table
from care_compress.data.given import give
from care_compress.errors import RecipeError, RunError
from care_compress.evaluate.compare import run_compare
from care_compress.evaluate.comparison import CompareOptions, Comparison
from care_compress.evaluate.resolve import NamedModel, float_recipe_of, named_models
from care_compress.model.care import Care
from care_compress.model.checkpoint import load_checkpoint, save_checkpoint, state_digest
from care_compress.pipeline import run_recipe
from care_compress.quantize.artifact import load_quantized
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.spec import Plan
from care_compress.recipe.layers import ENDINGS
from care_compress.recipe.recipe import Recipe, load_recipe, plain_name
from care_compress.recipe.target import load_target
from care_compress.report.write import write_report
from care_compress.run.finished import FinishedRun, find_run
from care_compress.tasks.known import task_called

Tell = Callable[[str], None]
WIDTH = 120  # of what is told line by line
CHECKPOINTS = ".checkpoints"  # in the folder of runs: models that were given as modules


@dataclass(frozen=True)
class Accuracy:
    """Every metric of the task in percent, and what the first lost against the float model.

    Each is an attribute, too: `top1` and `top5`, `miou` and `pixel_accuracy`, `map50` and `map`.
    """

    images: int
    task: str
    metrics: Mapping[str, float]
    drop: float | None = None  # points; None of a float run
    drop_ci95: tuple[float, float] | None = None
    agreement: float | None = None  # percent of answers that are the float model's

    def __str__(self) -> str:
        metric = task_called(self.task).metric
        said = f"{metric.name} {self.metrics[metric.key]:.2f} % of {self.images:,} images"
        if self.drop_ci95 is None:
            return said
        low, high = self.drop_ci95
        return f"{said}, {self.drop:.2f} points [{low:.2f}, {high:.2f}] below the float model"

    def __getattr__(self, name: str) -> float:
        # Asked of what is no field; of a copy in the making, too, which has nothing yet.
        metrics: Mapping[str, float] = self.__dict__.get("metrics", {})
        if name in metrics:
            return metrics[name]
        raise AttributeError(f"{name} is no metric of this task: {', '.join(metrics)}")


@dataclass(frozen=True)
class Result:
    """A finished run."""

    path: Path

    @cached_property
    def run(self) -> FinishedRun:
        """Its recipe and ``results.json``."""
        return find_run(self.path.parent, self.path.name)

    @property
    def name(self) -> str:
        """The run's name, as the verbs take it."""
        return self.path.name

    @property
    def accuracy(self) -> Accuracy:
        """What the run's model answers on the validation images: the simulation, not a file."""
        results, task = self.run.results, self.run.recipe.task
        shown = task_called(task).shown
        if self.run.kept is None:
            metrics = {key: results["accuracy"][key] for key in shown}
            return Accuracy(results["accuracy"]["images"], task, metrics)
        kept = results["candidates"][results["kept"]]
        # What was cut is held to the whole network, not to the float one it was quantized from.
        held = results["slim"]["models"][results["kept"]] if "slim" in results else kept
        return Accuracy(
            kept["images"],
            task,
            {key: kept[key] for key in shown},
            held["drop"],
            tuple(held["drop_ci95"]),
            kept["agreement"],
        )

    @cached_property
    def model(self) -> nn.Module:
        """The network in eval mode: with simulated integers, or the float one of a float run."""
        kept = self.run.kept
        if kept is None:
            return load_checkpoint(self.run.checked_checkpoint(), self.run.recipe.model.arch)
        if kept.suffix != ".safetensors":
            raise RunError(
                f"{self.name} was quantized by NNCF, whose model is no torch module.",
                f"open {kept} in OpenVINO",
            )
        return load_quantized(kept)

    @cached_property
    def plan(self) -> Plan | None:
        """What became of every layer; None of a float run and of NNCF's."""
        kept = self.run.kept
        if kept is None or kept.suffix != ".safetensors":
            return None
        assert isinstance(self.model, QuantizedCare)
        return self.model.plan

    @property
    def exports(self) -> dict[str, Path]:
        """The main file of every target that the run was exported to."""
        (found,) = named_models([self.name], self.path.parent)
        assert isinstance(found, NamedModel)
        return found.files

    def export(self, target: str, *, verbose: bool = False, progress: Tell | None = None) -> Path:
        """The file for a target, made if it is not there; read back and compared, as always.

        Raises `ExportError` where the file does not compute what the model does.
        """
        name = load_target(target).name
        if name not in self.exports:
            recipe = self.run.recipe
            targets = (*self.exports, target)
            wanted = recipe.export.model_copy(update={"targets": targets})
            recipe = recipe.model_copy(update={"export": wanted})
            run_recipe(recipe, self.path.parent, self.name, _console(verbose, progress))
            self.__dict__.pop("run", None)
        if name not in self.exports:
            raise RunError(
                f"{self.name} has no file for {name}.",
                "install what its runtime needs: care-compress doctor says what",
            )
        return self.exports[name]

    def report(self) -> Path:
        """Write ``report.html`` and return its path."""
        return write_report(self.path, Console(quiet=True))[0]

    def _repr_html_(self) -> str:
        recipe = self.run.recipe
        rows = [("run", str(self.path)), ("recipe", f"{recipe.name}: {recipe.claim}")]
        rows += [("accuracy", str(self.accuracy))]
        for target, export in self.run.results["exports"].items():
            files = export.get("models", {})
            told = [
                f"{one['file']}, {one['size_bytes'] / 1e6:.2f} MB, {one['agreement']:.1f} % of "
                f"answers as the model's{'' if one['holds'] else ' (REFUSED)'}"
                for one in files.values()
                if one.get("agreement") is not None
            ]
            rows.append((target, "; ".join(told) or str(export.get("failed", "no file"))))
        return html_table(rows)


def quantize(
    model: Care | str | Path,
    data: Any = None,
    recipe: str | Path | Mapping[str, Any] | Recipe = "int8_ptq",
    *,
    resolution: int | None = None,
    settings: Mapping[str, object] | None = None,
    name: str | None = None,
    runs: str | Path = "runs",
    verbose: bool = False,
    progress: Tell | None = None,
) -> Result:
    """Run a recipe, as ``care-compress quantize`` does; what is there and still holds is kept.

    `model` is a checkpoint's path or name (``builtin:``, ``hf-hub:``), or what `load_checkpoint`
    returned. `data` is a source as in a recipe, or images in memory (`care_compress.data.given`).
    `recipe` is the name of a shipped one, a file, a mapping or a `Recipe`; `settings` are dotted
    keys over it, as ``--set`` takes them: ``{"quantize.calibrate.images": 128}``.

    `verbose` prints what the verb prints; `progress` is called with each line of it instead.
    """
    runs = Path(runs)
    values: dict[str, object] = {"model.checkpoint": _checkpoint(model, runs)}
    if data is not None:
        source = str(data) if isinstance(data, str | Path) else give(data)
        values["data.source"] = source
        if resolution is None and not source.startswith("builtin:") and _is_shipped(recipe):
            raise RecipeError(
                f"recipe {recipe} is for the included images of 64 pixels, not for {source}.",
                "give resolution=224, or what the model was trained at",
            )
    if resolution is not None:
        values["data.resolution"] = resolution
    values |= settings or {}
    chosen = _load(recipe, values)
    run = plain_name(name or chosen.name)
    run_recipe(chosen, runs, run, _console(verbose, progress))
    return Result(runs / run)


def fp32(result: Result, *, verbose: bool = False, progress: Tell | None = None) -> Result:
    """The float model that a run began with, exported to the same targets: the baseline."""
    (start,) = named_models([result.name], result.path.parent)
    assert isinstance(start, NamedModel)
    name = f"{result.name}_fp32"
    run_recipe(float_recipe_of(start), result.path.parent, name, _console(verbose, progress))
    return Result(result.path.parent / name)


def compare(
    results: Sequence[Result],
    *,
    targets: Sequence[str] | None = None,
    images: int | None = None,
    max_drop: float | None = None,
    min_speedup: float | None = None,
    min_agreement: float | None = None,
    verbose: bool = False,
    progress: Tell | None = None,
) -> Comparison:
    """Score and time the files of all results side by side; the first is the baseline.

    ``.verdicts`` says for every target whether a candidate pays, ``.budgets`` and ``.holds`` how
    the limits stand.
    """
    folders = {one.path.parent for one in results}
    if len(results) < 2 or len(folders) > 1:
        raise RunError(
            f"{len(results)} results in {len(folders)} folders cannot be compared.",
            "give a baseline and others, made with the same runs=",
        )
    options = CompareOptions(
        targets=None if targets is None else tuple(targets),
        images=images,
        max_drop=max_drop,
        min_speedup=min_speedup,
        min_agreement=min_agreement,
    )
    names = [one.name for one in results]
    return run_compare(names, folders.pop(), options, run_recipe, _console(verbose, progress))


def _checkpoint(model: Care | str | Path, runs: Path) -> str:
    """A checkpoint for the recipe to name; a module's weights are written where runs lie."""
    if not isinstance(model, nn.Module):
        return str(model)
    if not isinstance(model, Care):
        raise RecipeError(
            f"the model is a {type(model).__name__}, no CARE network.",
            "make it with load_checkpoint or build_model",
        )
    digest = state_digest(model.state_dict())[:16]
    path = runs / CHECKPOINTS / f"{model.arch}-{digest}.safetensors"
    if not path.is_file():
        save_checkpoint(model, path, {})
    return str(path)


def _is_shipped(recipe: object) -> bool:
    return isinstance(recipe, str) and not recipe.endswith(ENDINGS)


def _load(recipe: str | Path | Mapping[str, Any] | Recipe, values: Mapping[str, object]) -> Recipe:
    """The recipe; a mapping is read as the file that says the same would be."""
    if isinstance(recipe, str | Path):
        return load_recipe(str(recipe), [], values)
    said = recipe.model_dump(mode="json") if isinstance(recipe, Recipe) else dict(recipe)
    base = str(said.get("base", "recipe"))
    if base.endswith(ENDINGS):
        said["base"] = str(Path(base).absolute())
    said.setdefault("name", Path(base).stem)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        try:
            path.write_text(yaml.safe_dump(said), encoding="utf-8")
        except yaml.YAMLError as error:
            raise RecipeError(f"the recipe holds more than plain values: {error}.") from error
        return load_recipe(str(path), [], values)


class _Lines(io.TextIOBase):
    """A file whose lines are handed to a function."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._begun = ""

    def write(self, text: str) -> int:
        """Hand over the lines that end in `text`."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                self._tell(line.rstrip())
        return len(text)


def _console(verbose: bool, progress: Tell | None) -> Console:
    if progress is not None:
        return Terminal(file=_Lines(progress), width=WIDTH)
    return Terminal() if verbose else Console(quiet=True)
