"""What is reported was not chosen by its own number."""

from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from care_compress.data.checks import Contents
from care_compress.data.loader import BadImages
from care_compress.evaluate import results
from care_compress.evaluate.results import choice_check, write_results
from care_compress.evaluate.run_accuracy import Candidate, Scores, score
from care_compress.recipe.recipe import Recipe, load_recipe
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


def told(recipe: Recipe, scores: Scores) -> dict[str, Any]:
    """What a process that is not the main one would write: it makes no checks."""
    about = SimpleNamespace(path=Path("."), name="mine")
    world, bad = SimpleNamespace(is_main=False), BadImages()
    context: Any = SimpleNamespace(
        run=about, world=world, bad=bad, console=Console(quiet=True), seconds={}
    )
    samples: Any = SimpleNamespace(classes=("a",), fingerprint=lambda: "images")
    return write_results(context, recipe, samples, [], scores, {})


@pytest.mark.parametrize(("lost", "met"), [(12, True), (15, True), (16, False)])
def test_a_budget_is_met_up_to_its_limit(lost: int, met: bool) -> None:
    one = candidate("ptq", lost, 5)
    recipe = load_recipe("int8_ptq", ["budget.max_top1_drop=1.0"])
    found = told(recipe, Scores(one.paired.candidate, (one,), one))
    assert found["budget"] == {"max_top1_drop": 1.0, "met": met}
    assert (found["kept"], found["candidates"]["ptq"]["drop"]) == ("ptq", (lost - 5) / 10)
    free = load_recipe("int8_ptq", ["budget.max_top1_drop=null"])
    assert told(free, Scores(one.paired.candidate, (one,), one))["budget"] is None


def test_a_class_that_only_images_left_out_show_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Four:
        labels, classes = np.array([0, 1, 0, 1]), ("cat", "dog")

        def __len__(self) -> int:
            return 4

    samples: Any = Four()
    monkeypatch.setattr(results, "seen_images", lambda *given: Contents())
    for images, status in ((4, "fine"), (2, "warning")):  # the first and the third
        recipe = load_recipe("fp32", [f"evaluate.images={images}"])
        scores = Scores(Accuracy(IMAGES, 800, 900))
        checks = results.run_checks(cast(Any, None), recipe, samples, scores, {})
        (classes,) = [one for one in checks if one.check == "classes"]
        assert classes.status == status
    assert classes.items == ("dog",)
