"""``care-compress reference``: whether the shipped recipes still give what was accepted.

`eval/reference.yaml` holds accuracy, by the metric of its task, and size of every recipe's file on
every target that can be measured without a device. Runs are made for it, or taken if this very
commit made them.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from rich.console import Console
from rich.markup import escape

from care_compress.console import say
from care_compress.errors import RecipeError, TargetError
from care_compress.evaluate.comparison import BF16, CompareOptions
from care_compress.evaluate.file_measurements import find_entries, score
from care_compress.evaluate.resolve import MakeRun, NamedModel, named_models
from care_compress.files import read_json, size_of
from care_compress.machine import git_revision
from care_compress.recipe.reading import read_yaml
from care_compress.recipe.recipe import Recipe, load_recipe, parse
from care_compress.recipe.sections import Count, Section
from care_compress.recipe.target import load_target
from care_compress.shipped import shipped
from care_compress.tasks.known import TASKS, labelled, task_called
from care_compress.tasks.task import Metric

REFERENCE_FILE = shipped("eval/reference.yaml")
Tolerance = Annotated[float, Field(ge=0)]
Percent = Annotated[float, Field(ge=0, le=100)]
# Runs to make in a folder, by name: each with its results, in this order, when it is made.
MakeRuns = Callable[[Mapping[str, Recipe], Path], Generator[tuple[str, Any]]]


class AcceptedFile(Section):
    """What one target's file of a recipe gave when it was accepted."""

    top1: Percent | None = Field(None, description="of classification")
    miou: Percent | None = Field(None, description="of segmentation")
    map50: Percent | None = Field(None, description="of detection")
    size_bytes: Count


class AcceptedRecipe(Section):
    """The values of one recipe, and how far a value may be from them."""

    top1_tolerance: Tolerance | None = Field(None, description="in points")
    miou_tolerance: Tolerance | None = Field(None, description="in points")
    map50_tolerance: Tolerance | None = Field(None, description="in points")
    size_tolerance: Tolerance = Field(description="in percent")
    targets: dict[str, AcceptedFile] = Field(min_length=1)

    @property
    def metric(self) -> Metric:
        """The one that has a tolerance."""
        metrics = (task.metric for task in TASKS.values())
        return next(one for one in metrics if getattr(self, f"{one.key}_tolerance") is not None)

    @property
    def tolerance(self) -> float:
        """In points of the metric."""
        return float(getattr(self, f"{self.metric.key}_tolerance"))

    @model_validator(mode="after")
    def _has_one_metric(self) -> "AcceptedRecipe":
        keys = [task.metric.key for task in TASKS.values()]
        there = [key for key in keys if getattr(self, f"{key}_tolerance") is not None]
        if len(there) != 1:
            raise ValueError(f"give one of {', '.join(f'{key}_tolerance' for key in keys)}")
        for target, one in self.targets.items():
            if [key for key in keys if getattr(one, key) is not None] != there:
                raise ValueError(f"{target} needs {there[0]}, as its tolerance says")
        return self


class AcceptedValues(Section):
    """All accepted values."""

    recipes: dict[str, AcceptedRecipe] = Field(min_length=1)


@dataclass(frozen=True)
class MeasuredFile:
    """What a recipe's file on one target gives now."""

    value: float  # of the metric of its task
    size_bytes: int


@dataclass(frozen=True)
class Check:
    """One value beside its accepted one."""

    recipe: str
    target: str
    what: str
    value: float
    accepted: float
    tolerance: float  # in the unit of the value

    @property
    def holds(self) -> bool:
        """Whether it is within the tolerance; what is exactly at it counts as within."""
        return abs(self.value - self.accepted) <= self.tolerance + 1e-9

    def __str__(self) -> str:
        said = "ok   " if self.holds else "DRIFT"
        return (
            f"{said} {self.recipe} on {self.target}: {self.what} {self.value:,.10g}, "
            f"accepted {self.accepted:,.10g} +- {round(self.tolerance, 2):,.10g}"
        )


def one_by_one(make_run: MakeRun) -> MakeRuns:
    """Return what makes runs in this process, each when it is asked for."""

    def make(wanted: Mapping[str, Recipe], runs: Path) -> Generator[tuple[str, Any]]:
        for name, recipe in wanted.items():
            yield name, make_run(recipe, runs, name, Console(quiet=True))

    return make


def run_reference(
    names: list[str], file: Path, runs: Path, make_runs: MakeRuns, console: Console
) -> int:
    """Measure and check; return 0 only if every value holds."""
    chosen = read_reference(file, names)
    recipes = {}
    for name, accepted in chosen.items():
        for target in accepted.targets:
            load_target(target)  # a misspelt one is an error, before anything is made
        # Laid out for one class of processor, whichever measures it: sizes are of one placement.
        fixed = {"export.targets": list(accepted.targets), "export.dot_products": True}
        recipes[name] = load_recipe(name, [], fixed)
        wanted = task_called(recipes[name].task).metric
        if wanted != accepted.metric:
            raise RecipeError(
                f"{file} has {accepted.metric.name} of {name}, whose metric is {wanted.name}.",
                f"give it {wanted.key} and {wanted.key}_tolerance",
            )
    checks: list[Check] = []
    run_of = {name: f"reference_{name}" for name in chosen}
    to_make = {
        run: recipes[name]
        for name, run in run_of.items()
        if not _is_current(runs / run, recipes[name])
    }
    with contextlib.closing(make_runs(to_make, runs)) as made:
        for name, accepted in chosen.items():
            run = run_of[name]
            if run in to_make:
                console.print(f"making {escape(str(runs / run))}", soft_wrap=True)
                next(made)
            found, missing = _measured(runs, run, tuple(accepted.targets), console)
            for target, why in missing.items():
                say(f"skipped {name} on {target}: {why}", console)
            for check in checked(name, accepted, found):
                checks.append(check)
                say(str(check), console)
    if not checks:
        raise TargetError(
            "no target of these recipes can be measured here.", "care-compress doctor"
        )
    drifts = sum(not check.holds for check in checks)
    console.print(f"{len(checks)} values, {drifts} of them drifted")
    return 1 if drifts else 0


def read_reference(file: Path, names: list[str]) -> dict[str, AcceptedRecipe]:
    """Read the accepted values of these recipes; of all, if none is named."""
    known = parse(AcceptedValues, read_yaml(file) or {}, str(file)).recipes
    for name in names:
        if name not in known:
            raise RecipeError(
                f"{file} has no accepted values of {name!r}.", f"name one of: {', '.join(known)}"
            )
    return {name: known[name] for name in names or known}


def checked(
    name: str, accepted: AcceptedRecipe, found: Mapping[str, MeasuredFile]
) -> Iterator[Check]:
    """Yield every value that could be measured, beside its accepted one."""
    for target, one in found.items():
        known = accepted.targets[target]
        metric, right = accepted.metric, getattr(known, accepted.metric.key)
        yield Check(name, target, metric.name, one.value, right, accepted.tolerance)
        allowed = known.size_bytes * accepted.size_tolerance / 100
        yield Check(name, target, "bytes", one.size_bytes, known.size_bytes, allowed)


def _is_current(run: Path, recipe: Recipe) -> bool:
    """Tell whether this commit made the run from this recipe, to the end."""
    revision = git_revision()
    if revision is None or revision.endswith("+changes"):
        return False  # what the code was then is not known
    try:
        manifest = read_json(run / "manifest.json")
    except (OSError, ValueError):
        return False
    return (
        (run / "results.json").is_file()
        and manifest.get("git_revision") == revision
        and manifest.get("recipe") == recipe.model_dump(mode="json")
    )


def _measured(
    runs: Path, run: str, targets: tuple[str, ...], console: Console
) -> tuple[dict[str, MeasuredFile], dict[str, str]]:
    """Measure each file on its target, or say why not; floats are never rounded on their own."""
    (one,) = named_models([run], runs)
    assert isinstance(one, NamedModel) and one.recipe is not None
    options = CompareOptions(targets=targets)
    entries, missing = find_entries([one], options)
    entries = [entry for entry in entries if not entry.name.endswith(BF16)]
    reasons = {target: why for (target, _), why in missing.items()}
    if not entries:
        return {}, reasons
    task = task_called(one.recipe.task)
    samples = labelled(one.recipe, "val")
    answers = score(task, entries, [one], samples, one.recipe.data, options, console).answers
    found = {
        e.target: MeasuredFile(answers[e.key].metrics()[task.metric.key], size_of(e.path))
        for e in entries
    }
    return found, reasons
