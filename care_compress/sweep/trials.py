"""Which trials a sweep has: every combination, some drawn by a seed, or those that Optuna asks for.

A trial is a recipe and the values that are set in it. It is named after the digest of the recipe
that comes out, so the same trial has the same run directory in every sweep file that asks for it.
"""

import json
import math
import random
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from care_compress.console import shortened
from care_compress.errors import RecipeError
from care_compress.files import fingerprint
from care_compress.libraries import load_optuna, silent
from care_compress.recipe.recipe import Recipe, load_recipe, plain_name
from care_compress.sweep.sections import METRICS, RangeSection, Sweep

Json = Any
Row = dict[str, Any]  # what became of a trial: `care_compress.sweep.results`
RECIPE, CHECKPOINT, SOURCE = "recipe", "model.checkpoint", "data.source"
DIGITS = 8  # of a digest in a name
DRAWS = 50  # of points that were drawn before, after which a space counts as exhausted
LONGEST_STEM = 80  # letters of a recipe's name in that of a run


@dataclass(frozen=True)
class Trial:
    """One run to make."""

    name: str
    recipe: Recipe
    point: Mapping[str, Json]  # what was chosen, by key
    command: str  # that makes this run alone
    number: int = field(default=-1, compare=False)  # Optuna's


class Search(Protocol):
    """Where trials come from."""

    total: int
    waits: bool  # what comes next depends on what came out
    shown: Sequence[Trial]  # all trials, or the ends of a space that is not gone through

    def ask(self) -> Trial | None:
        """Return the next trial; None where there is none any more."""

    def tell(self, trial: Trial, row: Row) -> None:
        """Take in what came of a trial."""


def axes_of(sweep: Sweep) -> dict[str, Sequence[Json] | RangeSection]:
    """Everything that a trial chooses: its recipe, its checkpoint, its images, its values."""
    axes: dict[str, Sequence[Json] | RangeSection] = {RECIPE: sweep.recipes}
    if sweep.checkpoints is not None:
        axes[CHECKPOINT] = sweep.checkpoints
    if sweep.data is not None:
        axes[SOURCE] = sweep.data
    for key, axis in sweep.overrides.items():
        # A range that says its values is a list, however the search goes about.
        is_list = isinstance(axis, RangeSection) and axis.length() is not None
        axes[key] = tuple(axis.values()) if is_list else axis  # type: ignore[union-attr]
    return axes


def trial_of(sweep: Sweep, point: Mapping[str, Json], runs: Path, number: int = -1) -> Trial:
    """The trial at a point; `RecipeError` names the point whose values make no recipe."""
    values = {**sweep.set, **{key: value for key, value in point.items() if key != RECIPE}}
    try:
        recipe = load_recipe(point[RECIPE], [], values)
    except RecipeError as error:
        chosen = shortened(", ".join(f"{key}={_text(value)}" for key, value in point.items()))
        raise RecipeError(f"with {chosen}: {error.message}", error.fix) from error
    digest = fingerprint(recipe.model_dump(mode="json"))[:DIGITS]
    name = plain_name(f"{recipe.name[:LONGEST_STEM]}-{digest}")
    words = ["care-compress", "quantize", str(point[RECIPE])]
    for key, value in values.items():
        words += ["--set", f"{key}={_text(value)}"]
    words += ["--runs", str(runs / sweep.name), "--name", name]
    return Trial(name, recipe, dict(point), shlex.join(words), number)


def _text(value: Json) -> str:
    """A value as ``--set`` reads it back: JSON, but for words that are no other value."""
    plain = isinstance(value, str) and value.replace("_", "").replace("-", "").isalpha()
    keeps = plain and value.lower() not in {"null", "true", "false", "yes", "no", "on", "off"}
    return str(value) if keeps else json.dumps(value)


def make_search(sweep: Sweep, runs: Path, known: Sequence[Row] = ()) -> Search:
    """The search that a sweep asks for; `known` are rows that earlier processes left."""
    if sweep.search == "optuna":
        return Asked(sweep, runs, known)
    points = _grid(sweep) if sweep.search == "grid" else _drawn(sweep)
    return Listed([trial_of(sweep, point, runs) for point in points])


class Listed:
    """Trials that are known before the first one runs."""

    waits = False

    def __init__(self, trials: Sequence[Trial]) -> None:
        # Two points may make one recipe, where a value is the recipe's own.
        self.shown: Sequence[Trial] = list({trial.name: trial for trial in trials}.values())
        self.total = len(self.shown)
        self._ahead = iter(self.shown)

    def ask(self) -> Trial | None:
        """Return the next one, in the order of the file."""
        return next(self._ahead, None)

    def tell(self, trial: Trial, row: Row) -> None:
        """Nothing follows from what came out."""


def _grid(sweep: Sweep) -> Iterator[dict[str, Json]]:
    """Every combination, the last key turning fastest; so many of them as `trials` allows."""
    axes = {key: _listed(axis) for key, axis in axes_of(sweep).items()}
    count = math.prod(len(values) for values in axes.values())
    chosen: Sequence[int] = range(count)
    if sweep.trials is not None and sweep.trials < count:
        # Drawn, and not the first ones: those would all have the first recipe.
        drawn = random.Random(sweep.seed).sample(chosen, sweep.trials)  # nosec B311 # no secret
        chosen = sorted(drawn)
    for place in chosen:
        point = {}
        for key, values in reversed(axes.items()):
            place, index = divmod(place, len(values))
            point[key] = values[index]
        yield dict(reversed(point.items()))


def _listed(axis: Sequence[Json] | RangeSection) -> Sequence[Json]:
    assert not isinstance(axis, RangeSection)  # the sections' own check: a grid knows its values
    return axis


def _drawn(sweep: Sweep) -> Iterator[dict[str, Json]]:
    """Points drawn by the seed, none of them twice."""
    assert sweep.trials is not None
    rng, axes = random.Random(sweep.seed), axes_of(sweep)  # nosec B311 # no secret
    seen: set[str] = set()
    draws = 0
    while len(seen) < sweep.trials and draws < DRAWS:
        point = {key: _draw(axis, rng) for key, axis in axes.items()}
        digest = fingerprint(point)
        if digest in seen:
            draws += 1
            continue
        draws = 0
        seen.add(digest)
        yield point


def _draw(axis: Sequence[Json] | RangeSection, rng: random.Random) -> Json:
    if not isinstance(axis, RangeSection):
        return axis[rng.randrange(len(axis))]
    value = axis.at(rng.random())
    return round(value) if axis.is_whole else float(f"{value:.6g}")


class Asked:
    """Trials that Optuna's TPE sampler asks for, told what came of those before.

    TPE: Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011.
    """

    waits = True

    def __init__(self, sweep: Sweep, runs: Path, known: Sequence[Row]) -> None:
        assert sweep.trials is not None
        self.sweep, self.runs, self.total = sweep, runs, sweep.trials
        optuna = load_optuna()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._optuna, self._axes = optuna, axes_of(sweep)
        self._asked: list[Any] = []  # Optuna's own trials, by number
        ends = [{key: _end(axis, end) for key, axis in self._axes.items()} for end in (0, -1)]
        self.shown: Sequence[Trial] = [trial_of(sweep, point, runs) for point in ends]
        self._spread = {key: self._distribution(axis) for key, axis in self._axes.items()}
        with silent():
            # Constant liar: what is under way counts as bad, so that two workers do not go to the
            # same place.
            sampler = optuna.samplers.TPESampler(
                seed=sweep.seed,
                constant_liar=True,
                constraints_func=_over_budget if sweep.budget.limits else None,
            )
            direction = "maximize" if METRICS[sweep.objective.metric][1] else "minimize"
            self._study = optuna.create_study(direction=direction, sampler=sampler)
        # In an order of their own: they came in any.
        self._again = [row["point"] for row in sorted(known, key=lambda row: str(row["name"]))]

    def _distribution(self, axis: Sequence[Json] | RangeSection) -> Any:
        spread = self._optuna.distributions
        if not isinstance(axis, RangeSection):  # by place: values may be lists
            return spread.CategoricalDistribution(list(range(len(axis))))
        log = axis.scale == "log"
        if axis.is_whole:
            return spread.IntDistribution(int(axis.low), int(axis.high), log=log)
        return spread.FloatDistribution(float(axis.low), float(axis.high), log=log)

    def ask(self) -> Trial | None:
        """Return one that an earlier process began, then what the sampler wants to see."""
        if len(self._asked) == self.total:
            return None
        if self._again:
            self._study.enqueue_trial(self._places(self._again.pop(0)))
        with silent():
            asked = self._study.ask(self._spread)
        self._asked.append(asked)
        point = {
            key: asked.params[key] if isinstance(axis, RangeSection) else axis[asked.params[key]]
            for key, axis in self._axes.items()
        }
        return trial_of(self.sweep, point, self.runs, asked.number)

    def _places(self, point: Mapping[str, Json]) -> dict[str, Json]:
        """A point as the study holds it."""
        return {
            key: point[key] if isinstance(axis, RangeSection) else list(axis).index(point[key])
            for key, axis in self._axes.items()
        }

    def tell(self, trial: Trial, row: Row) -> None:
        """Let the sampler know the objective, and by how much each budget was missed."""
        asked = self._asked[trial.number]
        with silent():
            if row["objective"] is None:
                self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
                return
            asked.set_user_attr("over", list(row["over"].values()))
            self._study.tell(asked, row["objective"])


def _end(axis: Sequence[Json] | RangeSection, end: int) -> Json:
    """The first value of an axis, or its last."""
    if isinstance(axis, RangeSection):
        return axis.high if end else axis.low
    return axis[end]


def _over_budget(trial: Any) -> Sequence[float]:
    """How far a trial is over each budget, as Optuna asks it; at most zero is within."""
    return tuple(trial.user_attrs["over"])
