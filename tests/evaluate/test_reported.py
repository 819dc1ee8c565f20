"""What is reported was not chosen by its own number."""

from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console

from care_compress.evaluate.results import choice_check
from care_compress.evaluate.run_accuracy import Candidate, Scores, score
from care_compress.recipe.recipe import load_recipe
from care_compress.tasks.classification import Accuracy, Paired
from care_compress.tasks.distance import Distance

IMAGES = 1000


def candidate(name: str, lost: int, gained: int) -> Candidate:
    before, after = Accuracy(IMAGES, 800, 900), Accuracy(IMAGES, 800 - lost + gained, 900)
    paired = Paired(before, after, lost, gained, IMAGES - lost - gained, Distance())
    return Candidate(name, Path(name), paired, None)


def kept(ptq: tuple[int, int], qat: tuple[int, int]) -> tuple[str, str]:
    text = StringIO()
    context = cast(Any, SimpleNamespace(console=Console(file=text, width=200)))
    tried = [candidate("ptq", *ptq), candidate("qat", *qat)]
    found = score(context, load_recipe("int8_qat"), cast(Any, None), tried, cast(Any, None))
    assert found.best is not None and found.accuracy == found.best.paired.candidate
    return found.best.name, text.getvalue()


@pytest.mark.parametrize(("ptq", "qat"), [((9, 2), (7, 5)), ((5, 5), (9, 4)), ((0, 0), (3, 0))])
def test_what_was_trained_is_kept_whichever_number_is_higher(
    ptq: tuple[int, int], qat: tuple[int, int]
) -> None:
    assert kept(ptq, qat)[0] == "qat"


def test_a_training_that_is_beyond_doubt_worse_is_not_kept() -> None:
    name, said = kept((10, 5), (60, 5))
    assert name == "ptq" and "qat ended below ptq" in said


def test_results_say_what_was_chosen_and_by_which_images() -> None:
    nothing = Scores(Accuracy(IMAGES, 800, 900))
    said = {
        name: choice_check(load_recipe(name), nothing).text for name in ("int8_ptq", "int8_qat")
    }
    assert "QAT" in said["int8_qat"] and "QAT" not in said["int8_ptq"]
    searched = choice_check(load_recipe("mixed_auto"), nothing).text
    assert "training images that calibrate nothing" in searched


def test_results_warn_where_the_reported_images_did_choose() -> None:
    ptq, qat = candidate("ptq", 10, 5), candidate("qat", 60, 5)
    recipe = load_recipe("int8_qat")
    fallen = choice_check(recipe, Scores(ptq.paired.candidate, (ptq, qat), ptq))
    assert fallen.status == "warning" and "qat was beyond doubt worse" in fallen.text
    kept = choice_check(recipe, Scores(qat.paired.candidate, (ptq, qat), qat))
    assert kept.status == "fine"
