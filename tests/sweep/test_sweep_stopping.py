"""Successive halving: who is among the best so far goes on."""

from pathlib import Path

import pytest
from rich.console import Console
from tiny import image_folder, recipe_file

from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import load_recipe
from care_compress.sweep.stopping import Rungs, StoppedEarly


def test_the_best_third_goes_on_and_nobody_waits() -> None:
    rungs = Rungs(first=1, factor=3)
    said = [
        rungs.goes_on("g", str(place), 1, top1) for place, top1 in enumerate([50, 40, 60, 45, 55])
    ]
    assert said == [True, False, True, False, True]
    assert rungs.goes_on("another group", "x", 1, 1.0)


def test_only_at_rungs_and_each_by_itself() -> None:
    rungs = Rungs(first=2, factor=2)
    assert rungs.goes_on("g", "good", 2, 90.0)
    assert all(rungs.goes_on("g", "bad", validations, 10.0) for validations in (1, 3, 4, 5))
    assert not rungs.goes_on("g", "worse", 4, 5.0), "of those that got there"
    assert not rungs.goes_on("g", "bad", 2, 10.0)
    assert all(rungs.goes_on("g", "best", validations, 99.0) for validations in range(1, 17))
    ended = [n for n in range(1, 17) if not rungs.goes_on("g", "last", n, 1.0)]
    assert ended == [2, 4, 8, 16], "each comes after twice as many"


def test_a_training_tells_of_its_validations_and_can_be_ended(tmp_path: Path) -> None:
    recipe = load_recipe(str(recipe_file(tmp_path, image_folder(tmp_path / "data", 8), epochs=3)))
    told = []

    def watch(training: str, validations: int, top1: float) -> None:
        told.append((training, validations))
        if validations == 2:
            raise StoppedEarly("enough")

    with pytest.raises(StoppedEarly):
        run_recipe(recipe, tmp_path, "r", Console(quiet=True), watch=watch)
    assert told == [("float", 1), ("float", 2)]
    assert not (tmp_path / "r" / "results.json").exists()
    run_recipe(recipe, tmp_path, "r", Console(quiet=True))
    assert (tmp_path / "r" / "results.json").exists(), "unwatched, it goes on to its end"
