"""A ``compare.json`` read again, somebody else's too: what was found of one model in it.

What is asked of the file is strict and bounded, so that nothing in it can make a sum overflow or a
limit unreachable; what else it says is left alone and may grow.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from care_compress.console import listed, shortened
from care_compress.errors import RunError
from care_compress.files import MOST_JSON, read_text
from care_compress.recipe.sections import Task as TaskName
from care_compress.tasks.intervals import Interval
from care_compress.tasks.known import task_called
from care_compress.tasks.task import Task

Percent = Annotated[float, Field(ge=0, le=100)]
Points = Annotated[float, Field(ge=-100, le=100)]
Ratio = Annotated[float, Field(ge=1e-6, le=1e6)]
Whole = Annotated[int, Field(ge=1, le=1 << 50)]


class _Stored(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)


class StoredModel(_Stored):
    """What a compared model was made from; None in files older than these keys."""

    precision: str | None = None
    checkpoint_sha256: str | None = None


class StoredPair(_Stored):
    """The metric of the first model minus that of another, on one target's files."""

    target: str
    baseline: str
    candidate: str
    drop: Points
    drop_ci95: tuple[Points, Points]


class StoredFile(_Stored):
    """One model's file on one target, with the metric of each task: it has that of its own."""

    available: bool
    why: str | None = None
    top1: Percent | None = None
    miou: Percent | None = None
    miou_ci95: tuple[Percent, Percent] | None = None
    map50: Percent | None = None
    map50_ci95: tuple[Percent, Percent] | None = None
    size_bytes: Whole | None = None
    sha256: str | None = None


class StoredTimes(_Stored):
    """How many times as fast a file is as the first model's on its target."""

    target: str
    name: str
    speedup: Ratio | None
    speedup_ci95: tuple[Ratio, Ratio] | None


class StoredSetting(_Stored):
    """Files that were timed in turns."""

    batch: int
    threads: int
    rows: list[StoredTimes]


class StoredImages(_Stored):
    """The validation images and how they are prepared; not where they lie."""

    samples: str
    resolution: int
    crop_pct: float
    mean: list[float]
    std: list[float]
    exif_rotate: bool


class StoredProcessor(_Stored):
    """What executed the files."""

    name: str
    features: dict[str, bool]


class StoredMachine(_Stored):
    """The machine, as far as figures depend on its kind."""

    arch: str
    cpu: StoredProcessor

    def __str__(self) -> str:
        features = [name for name, there in sorted(self.cpu.features.items()) if there]
        return f"{self.cpu.name} ({self.arch}, {' '.join(features) or 'features unknown'})"

    def is_kind_of(self, other: "StoredMachine") -> bool:
        """Whether both execute files alike, by every feature that both files speak of."""
        mine, theirs = self.cpu.features, other.cpu.features
        alike = all(mine[name] == theirs[name] for name in mine.keys() & theirs.keys())
        known = bool(mine) == bool(theirs)
        return known and alike and (self.arch, self.cpu.name) == (other.arch, other.cpu.name)


class StoredComparison(_Stored):
    """What is asked of a compare.json; one without a task is of the first there was."""

    task: TaskName = "classification"
    images: Whole
    models: dict[str, StoredModel]
    pairs: list[StoredPair]
    targets: dict[str, dict[str, StoredFile]]
    latency: list[StoredSetting]
    data: StoredImages
    machine: StoredMachine


@dataclass(frozen=True)
class ComparedModel:
    """One model of one comparison, beside the first model of it."""

    file: Path
    found: StoredComparison
    name: str
    beside: str

    @property
    def task(self) -> Task:
        """What the models answer."""
        return task_called(self.found.task)

    @property
    def targets(self) -> list[str]:
        """Where its file could be run."""
        return [target for target in self.found.targets if self.row(target)]

    @property
    def made_from(self) -> StoredModel:
        """What it was made from."""
        return self.found.models[self.name]

    @property
    def beside_made_from(self) -> StoredModel:
        """What the first model was made from."""
        return self.found.models.get(self.beside, StoredModel())

    def row(self, target: str) -> StoredFile | None:
        """Return its file, if that could be run."""
        row = self.found.targets.get(target, {}).get(self.name)
        return row if row is not None and row.available else None

    def metric_beside(self, target: str) -> float | None:
        """The metric of the first model's file, in percent."""
        row = self.found.targets.get(target, {}).get(self.beside)
        value: float | None = getattr(row, self.task.metric.key, None)
        return value

    def interval_beside(self, target: str) -> Interval | None:
        """The metric of the first model's file with its own interval, where that is stored."""
        row = self.found.targets.get(target, {}).get(self.beside)
        value = self.metric_beside(target)
        ends = getattr(row, f"{self.task.metric.key}_ci95", None)
        return None if value is None or ends is None else (value, *ends)

    def drop(self, target: str) -> Interval | None:
        """Points lost against the first model; None where one of them did not run."""
        for pair in self.found.pairs:
            if (pair.target, pair.baseline, pair.candidate) == (target, self.beside, self.name):
                known = self.metric_beside(target) is not None
                return (pair.drop, *pair.drop_ci95) if known else None
        return None

    def speedup(self, target: str) -> Interval | None:
        """Speed over the first model's at batch 1 on one thread, as verdicts take it."""
        for setting in self.found.latency:
            if (setting.batch, setting.threads) != (1, 1):
                continue
            for row in setting.rows:
                if (row.target, row.name) == (target, self.name) and row.speedup_ci95:
                    return None if row.speedup is None else (row.speedup, *row.speedup_ci95)
        return None

    def size(self, target: str) -> int | None:
        """Bytes of its file."""
        row = self.row(target)
        return None if row is None else row.size_bytes


def read_compared(file: Path, name: str, fix: str) -> ComparedModel:
    """Read a compare.json and find a model in it; the only one, if none has this name."""
    try:
        # From JSON, not from Python values: NaN, which json.loads takes, is then refused too.
        found = StoredComparison.model_validate_json(read_text(file, MOST_JSON))
    except FileNotFoundError:
        raise RunError(f"{file} does not exist.", fix) from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = shortened(".".join(map(str, problem["loc"]))) or "the file"
        raise RunError(f"{file} is no compare.json: {where}: {problem['msg']}.", fix) from None
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read: {error}.", fix) from error
    first = {pair.baseline for pair in found.pairs}
    others = [one for one in found.models if one not in first]
    if len(first) != 1 or not others:
        raise RunError(f"{file} has no model beside another.", fix)
    if name not in others and len(others) > 1:
        raise RunError(f"{file} is of {shortened(listed(others))}, and not of {name}.", fix)
    return ComparedModel(file, found, name if name in others else others[0], first.pop())
