"""What a sweep file may ask for: recipes, what varies in them, budgets, and what a trial may take.

    recipes: [int8_ptq]
    overrides:
      quantize.calibrate.images: [64, 256]
      quantize.calibrate.percentile: {low: 99.0, high: 99.99, count: 3}
    budget: {max_top1_drop: 0.3}

As strict as a recipe: an unknown key, an empty range or a value of the wrong type is one line.
"""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from care_compress.console import shortened
from care_compress.errors import RecipeError
from care_compress.recipe.layers import ENDINGS
from care_compress.recipe.reading import did_you_mean, read_yaml
from care_compress.recipe.recipe import parse, plain_name
from care_compress.recipe.sections import Count, NonNegative, Positive, Section
from care_compress.recipe.target import load_target
from care_compress.shipped import shipped

SWEEPS_DIR = shipped("sweeps")
MOST_UNASKED = 1000  # trials of a grid that names no limit
MOST_TRIALS = 100_000  # rows that one page and one JSON file still hold

Metric = Literal["top1", "miou", "map50", "size", "energy", "latency"]
# What a metric is called on the console and the page, and whether more of it is better: those are
# of the tasks.
METRICS: dict[Metric, tuple[str, bool]] = {
    "top1": ("top-1", True),
    "miou": ("mIoU", True),
    "map50": ("mAP50", True),
    "size": ("size", False),
    "energy": ("energy", False),
    "latency": ("latency", False),
}


class RangeSection(Section):
    """Numbers from `low` to `high`, both among them where the steps lead there."""

    low: int | float
    high: int | float
    step: Positive | None = Field(None, description="between two values of a grid")
    count: Count | None = Field(None, description="of values of a grid, evenly spread")
    scale: Literal["linear", "log"] = "linear"

    @model_validator(mode="after")
    def _holds_something(self) -> "RangeSection":
        if not self.low < self.high:
            raise ValueError(f"the range from {self.low:g} to {self.high:g} is empty")
        if self.scale == "log" and (self.low <= 0 or self.step is not None):
            raise ValueError("a log range begins above 0 and has a count, no step")
        if self.step is not None and self.count is not None:
            raise ValueError("step and count both say how many: give one of them")
        return self

    @property
    def is_whole(self) -> bool:
        """Whether its values are integers: those of ``{low: 8, high: 64, step: 8}``."""
        whole = isinstance(self.low, int) and isinstance(self.high, int)
        return whole and (self.step is None or float(self.step).is_integer())

    def length(self) -> int | None:
        """How many values a grid takes of it; None where it says neither step nor count."""
        if self.step is not None:
            return math.floor((self.high - self.low) / self.step + 1e-9) + 1
        return self.count

    def values(self) -> list[int | float]:
        """The values of a grid; rounded to what a person would have written."""
        length = self.length()
        assert length is not None
        if self.step is not None:
            found = [self.low + index * self.step for index in range(length)]
        else:
            found = [self.at(index / max(1, length - 1)) for index in range(length)]
        if self.is_whole:
            return list(dict.fromkeys(round(value) for value in found))
        return [float(f"{value:.12g}") for value in found]

    def at(self, part: float) -> float:
        """The number at a part of the way, 0 to 1, on the range's own scale."""
        if self.scale == "log":
            return float(self.low * (self.high / self.low) ** part)
        return self.low + (self.high - self.low) * part


def _list_or_range(value: Any) -> str:
    return "range" if isinstance(value, dict | RangeSection) else "list"


Choices = Annotated[tuple[Any, ...], Field(min_length=1)]
Axis = Annotated[
    Annotated[Choices, Tag("list")] | Annotated[RangeSection, Tag("range")],
    Discriminator(_list_or_range),
]


class ObjectiveSection(Section):
    """What makes one trial better than another, among those within the budgets."""

    metric: Metric = Field("top1", description="that of the recipes' task, if left out")
    target: str | None = Field(None, description="of latency; of size, the largest if left out")

    @model_validator(mode="after")
    def _latency_has_a_target(self) -> "ObjectiveSection":
        if self.metric == "latency" and self.target is None:
            raise ValueError("latency is that of a target: name it")
        if self.metric not in ("latency", "size") and self.target is not None:
            raise ValueError(f"{self.metric} is the same for every target: leave target out")
        return self


class SweepBudgetSection(Section):
    """What the best trial may cost at most."""

    max_top1_drop: NonNegative | None = Field(None, description="in points; classification")
    max_miou_drop: NonNegative | None = Field(None, description="in points; segmentation")
    max_map50_drop: NonNegative | None = Field(None, description="in points; detection")
    max_latency: dict[str, Positive] = Field({}, description="ms of an image by target")
    min_speedup: dict[str, Positive] = Field({}, description="over the float model, by target")
    max_size: Positive | None = Field(None, description="of the largest exported model, in MB")
    max_energy: Positive | None = Field(None, description="of one image, in mJ, as planned")

    @property
    def limits(self) -> list[str]:
        """Names of the budgets that are set."""
        said = self.model_dump(exclude_defaults=True)
        nested = {key: value for key, value in said.items() if isinstance(value, dict)}
        return [key for key in said if key not in nested] + [
            f"{key} {target}" for key, value in nested.items() for target in value
        ]


class ResourcesSection(Section):
    """What one trial holds while it runs."""

    cpus: Positive = 1
    gpus: NonNegative = Field(0, description="2 or more: torchrun, a process for each")

    @model_validator(mode="after")
    def _whole_above_one(self) -> "ResourcesSection":
        for name, value in (("cpus", self.cpus), ("gpus", self.gpus)):
            if value > 1 and value != int(value):
                raise ValueError(f"{name} above 1 is a whole number")
        return self


class TimingSection(Section):
    """Which exported files are timed, each alone on its machine and in turns with the float one."""

    targets: Annotated[tuple[str, ...], Field(min_length=1)]
    batch: Count = 1
    threads: Count = 1
    seconds: Annotated[float, Field(gt=0, le=600)] = 1.5
    processor: str | None = Field(
        None, description="part of its name; that of most nodes if left out"
    )


class StoppingSection(Section):
    """When a training is held against the others (`care_compress.sweep.stopping`)."""

    first: Count = Field(1, description="validations before the first comparison")
    factor: Annotated[int, Field(ge=2, le=16)] = Field(
        3, description="the best 1 / factor go on, for factor times as many validations"
    )


class Sweep(Section):
    """Many trials of recipes."""

    name: str
    recipes: Annotated[tuple[str, ...], Field(min_length=1)]
    checkpoints: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="model.checkpoint of each; the recipes' own if left out"
    )
    data: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        None, description="data.source of each; the recipes' own if left out"
    )
    set: dict[str, Any] = Field({}, description="section.key: value, the same for every trial")
    overrides: dict[str, Axis] = Field({}, description="section.key: [values] or a range")
    search: Literal["grid", "random", "optuna"] = "grid"
    trials: Annotated[int, Field(ge=1, le=MOST_TRIALS)] | None = Field(
        None, description="at most; random and optuna need it"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    objective: ObjectiveSection = ObjectiveSection()
    budget: SweepBudgetSection = SweepBudgetSection()
    timing: TimingSection | None = None
    stopping: StoppingSection | None = Field(
        None, description="ends trainings that cannot win; left out: all go to their end"
    )
    resources: ResourcesSection = ResourcesSection()

    @model_validator(mode="after")
    def _has_an_end(self) -> "Sweep":
        if self.search != "grid":
            if self.trials is None:
                raise ValueError(f"search {self.search} needs trials: how many to draw")
            return self
        for key, axis in self.overrides.items():
            if isinstance(axis, RangeSection) and axis.length() is None:
                raise ValueError(f"overrides.{key}: a grid needs the range's count or step")
        if self.trials is None and self.combinations > MOST_UNASKED:
            raise ValueError(
                f"the grid has {self.combinations:,} combinations and no limit: set trials, "
                "or shorten a range"
            )
        return self

    @model_validator(mode="after")
    def _says_each_once(self) -> "Sweep":
        said = [*self.set, *self.overrides]
        said += ["model.checkpoint"] * (self.checkpoints is not None)
        said += ["data.source"] * (self.data is not None)
        for place, key in enumerate(said):
            if not all(key.split(".")):
                raise ValueError(f"{key!r} is no section.key")
            for other in said[place + 1 :]:
                if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                    raise ValueError(f"{key} and {other} set the same value")
        return self

    @model_validator(mode="after")
    def _watches_one_process(self) -> "Sweep":
        if self.stopping is not None and self.resources.gpus >= 2:
            raise ValueError("stopping watches trials of one process: resources.gpus at most 1")
        return self

    @model_validator(mode="after")
    def _times_what_it_judges(self) -> "Sweep":
        timed = () if self.timing is None else self.timing.targets
        judged = {*self.budget.max_latency, *self.budget.min_speedup}
        if self.objective.metric == "latency":
            judged.add(str(self.objective.target))
        for target in sorted(judged - set(timed)):
            raise ValueError(f"latency on {target} is judged and not measured: timing.targets")
        return self

    @property
    def combinations(self) -> int:
        """How many trials the whole grid has; without ranges that have no length."""
        lengths = [len(self.recipes), len(self.checkpoints or "1"), len(self.data or "1")]
        for axis in self.overrides.values():
            length = axis.length() if isinstance(axis, RangeSection) else len(axis)
            lengths.append(length or 1)
        return math.prod(lengths)


def read_sweep(name_or_path: str) -> Sweep:
    """Read a sweep by the name of a shipped one (``int8_grid``) or by path."""
    path = Path(name_or_path)
    if path.suffix not in ENDINGS:
        path = SWEEPS_DIR / f"{name_or_path}.yaml"
        if not os.path.isfile(path):
            known = [file.stem for file in sorted(SWEEPS_DIR.glob("*.yaml"))]
            fix = f"{did_you_mean(name_or_path, known)} Shipped sweeps: {', '.join(known)}"
            name = shortened(repr(name_or_path))
            raise RecipeError(f"there is no sweep {name}.", fix.lstrip())
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} holds no sections.", "see sweeps/int8_grid.yaml for the form")
    sweep = parse(Sweep, {"name": path.stem, **raw}, str(path))
    plain_name(sweep.name)
    timed = () if sweep.timing is None else sweep.timing.targets
    for target in (*timed, sweep.objective.target):
        if target is not None:
            load_target(target)  # a misspelt one is an error
    return sweep
