"""A finished run, read again: its recipe, its results, and the models it was made of."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_compress.console import one_line, shortened
from care_compress.errors import CheckpointError, RunError
from care_compress.files import read_json, sha256_file
from care_compress.model.checkpoint import resolve_checkpoint
from care_compress.recipe.reading import read_yaml
from care_compress.recipe.recipe import Recipe, parse
from care_compress.recipe.target import load_target
from care_compress.run.directory import TARGETS_FOLDER
from care_compress.shipped import quantize_command

# What the slim stage leaves: the narrow network as it was cut, and after it healed.
SLIM_CUT = "slim/cut.safetensors"
SLIM_HEALED = "slim/model.safetensors"


@contextlib.contextmanager
def as_written(what: Path) -> Iterator[None]:
    """Raise `RunError` where the block finds that `what` holds something a run does not write."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        reason = shortened(one_line(f"{type(error).__name__}: {error}"))
        raise RunError(
            f"{what} does not hold what a run writes there ({reason}).",
            "restore it, or make the run again",
        ) from error


@dataclass(frozen=True)
class FinishedRun:
    """What a run left."""

    path: Path
    recipe: Recipe
    results: dict[str, Any]

    @property
    def kept(self) -> Path | None:
        """The quantized model that was kept; none of a float run."""
        return self.path / self.results["model"] if "model" in self.results else None

    @property
    def checkpoint(self) -> Path:
        """The float weights of what the run quantized and exported."""
        slim = self.recipe.slim
        if slim is None:
            return self.start
        return self.path / (SLIM_CUT if slim.heal is None else SLIM_HEALED)

    @property
    def start(self) -> Path:
        """The float weights it began with: those the run trained, or those the recipe names."""
        if self.recipe.train is not None:
            return self.path / "float" / "model.safetensors"
        assert self.recipe.model.checkpoint is not None  # the recipe's own check
        return resolve_checkpoint(self.recipe.model.checkpoint)

    @property
    def start_sha256(self) -> str | None:
        """Digest of the float weights it began with, as the run noted it."""
        return self._noted(self.start)

    def _noted(self, weights: Path) -> str | None:
        """What the manifest says of a file of weights; None where it is gone or says nothing."""
        manifest = self.path / "manifest.json"
        if not manifest.is_file():
            return None
        with as_written(manifest):
            recorded = read_json(manifest)
            if self.recipe.train is None and weights == self.start:  # it may lie anywhere
                known = recorded["inputs"].get("checkpoint", {}).get("sha256")
            else:
                known = recorded["outputs"].get(str(weights.relative_to(self.path)))
        return None if known is None else str(known)

    def checked_checkpoint(self) -> Path:
        """The float weights, if they are still where they were and what they were."""
        path = self.checkpoint
        if not path.is_file():
            raise CheckpointError(
                f"the float model of {self.path.name}, {path}, is gone.",
                "put it back, or make the run again",
            )
        known = self._noted(path)
        if known is not None and sha256_file(path) != known:
            raise CheckpointError(
                f"{path} is not the float model that {self.path.name} was made from.",
                "put that one back, or make the run again",
            )
        return path


def read_run(path: Path) -> FinishedRun:
    """The run in a directory; `RunError` where it cannot be read."""
    try:
        for file in sorted((path / TARGETS_FOLDER).glob("*.yaml")):
            load_target(str(file))
        results = read_json(path / "results.json")
        recipe = parse(Recipe, read_yaml(path / "recipe.yaml"), str(path / "recipe.yaml"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"run {path} cannot be read: {error}.", "make it again") from error
    if not isinstance(results, dict):
        raise RunError(f"{path / 'results.json'} holds no results.", "make the run again")
    return FinishedRun(path, recipe, results)


def find_run(runs: Path, name: str) -> FinishedRun:
    """The run of this name; those that are there are named where it is not."""
    if not os.path.isfile(runs / name / "results.json"):
        known = sorted(path.parent.name for path in runs.glob("*/results.json"))
        there = f"there are {', '.join(known)}; or " if known else ""
        raise RunError(
            f"there is no finished run called {name} in {runs}.",
            f"{there}make one: {quantize_command(name)}",
        )
    found = read_run(runs / name)
    with as_written(runs / name / "results.json"):
        # What everything that goes on from a run asks it.
        _ = found.results["precision"], [dict(one) for one in found.results["exports"].values()]
    return found
