"""What a stored number was made from: with anything else of it, it is measured again."""

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantized import network
from rich.console import Console

from care_compress.evaluate import evidence, run_accuracy
from care_compress.evaluate.evidence import gather
from care_compress.evaluate.run_accuracy import Candidate, evaluated, score
from care_compress.files import fingerprint
from care_compress.model.compact import CompactCare
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.run.context import RunContext
from care_compress.run.directory import Run
from care_compress.run.processes import World
from care_compress.tasks.classification import Accuracy, Paired
from care_compress.tasks.distance import Distance

QUIET = Console(quiet=True)
shared = functools.cache(network)


def validation(content: str = "images") -> Any:
    return SimpleNamespace(content_digest=lambda: content)


Keys = Callable[..., dict[str, str]]


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    """What the stages that score a run compare with an earlier run's: the float model's, or INT8's.

    Nothing is scored: a stage is asked only for what it would be made from.
    """
    counts = {"images": 8, "correct": 7, "correct_in_top5": 8}
    pair = {
        "baseline": counts, "candidate": counts, "lost": 0, "gained": 0, "agreeing": 8,
        "distance": {"signal": 1.0, "noise": 0.0},
    }  # fmt: skip
    seen: dict[str, str] = {}

    def once(context: Any, stage: str, made_from: Any, make: Any, **more: Any) -> Any:
        seen.update({key: fingerprint(value) for key, value in made_from.items()})
        return counts if stage == "evaluate" else pair

    monkeypatch.setattr(run_accuracy, "once", once)
    monkeypatch.setattr(run_accuracy, "load_quantized", lambda path: SimpleNamespace(plan=None))
    context = RunContext(Run(tmp_path, "run"), World(), QUIET)
    model = tmp_path / "model.safetensors"

    def ask(
        quantized: bool,
        recipe: Recipe | None = None,
        compact: CompactCare | None = None,
        images: str = "images",
        content: bytes = b"model",
    ) -> dict[str, str]:
        seen.clear()
        model.write_bytes(content)
        recipe = recipe or load_recipe("int8_ptq")
        compact = compact or shared()
        if quantized:
            evaluated(context, recipe, "ptq", model, compact, validation(images))
        else:
            score(context, recipe, compact, [], validation(images))
        return dict(seen)

    return ask


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_scores_are_of_these_images_and_this_recipe(keys: Keys, quantized: bool) -> None:
    before = keys(quantized)
    assert keys(quantized) == before, "the same run takes its scores over"
    assert keys(quantized, images="others of the same names") != before
    for change in ("evaluate.images=9", "data.crop_pct=0.5", "data.mean=[0, 0, 0]"):
        assert keys(quantized, load_recipe("int8_ptq", [change])) != before, change
    unread = load_recipe("int8_ptq", ["data.workers=3", "claim=other"])
    assert keys(quantized, unread) == before, "nothing that the numbers come from"


def test_scores_are_of_this_model(keys: Keys) -> None:
    other = copy.deepcopy(shared())
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    assert keys(False, compact=other) != keys(False)
    assert keys(True, compact=other) != keys(True), "it is compared with the float model"
    assert keys(True, content=b"other") != keys(True)


def candidate(name: str, correct: int) -> Candidate:
    counted = Accuracy(100, correct, 100)
    pair = Paired(Accuracy(100, 95, 100), counted, 95 - correct, 0, 90, Distance(1.0, 0.1))
    return Candidate(name, Path(f"{name}.safetensors"), pair, None)


@pytest.fixture
def gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int]]:
    """The evidence of a run: how often it was measured so far, and on how many images."""
    measured: list[int] = []

    def measure(run: Any, model: Path, count: int) -> dict[str, Any]:
        measured.append(count)
        return {"answers": count}

    monkeypatch.setattr(evidence, "_measured", measure)

    def gather_it(
        macs: float = 1e7,
        model: bytes = b"model",
        checkpoint: bytes = b"float",
        change: str = "claim=mine",
        images: int = 100_000,
    ) -> tuple[int, int]:
        (tmp_path / "int8.safetensors").write_bytes(model)
        (tmp_path / "float.safetensors").write_bytes(checkpoint)
        recipe = load_recipe("int8_ptq", [change])
        run = SimpleNamespace(checkpoint=tmp_path / "float.safetensors", recipe=recipe)
        monkeypatch.setattr(evidence, "read_run", lambda path: run)
        results = {
            "model": "int8.safetensors",
            "rewrites": [{"macs": 1.0}, {"macs": macs}],
            "accuracy": {"images": images},
        }
        found = gather(tmp_path, results, QUIET)
        assert found["answers"] == measured[-1]
        return len(measured), measured[-1]

    return gather_it


def test_evidence_is_gathered_again_for_another_model_or_other_images(
    gathered: Callable[..., tuple[int, int]],
) -> None:
    assert gathered()[0] == gathered()[0] == 1
    assert gathered(model=b"other")[0] == 2
    assert gathered(model=b"other", checkpoint=b"other")[0] == 3
    assert gathered(change="data.crop_pct=0.5")[0] == 4
    assert gathered(change="data.crop_pct=0.5", images=300)[0] == 5
    assert gathered(change="data.workers=2", images=300)[0] == 6, "crop_pct is back"
    assert gathered(change="data.workers=3", images=300)[0] == 6


@pytest.mark.parametrize(
    ("macs", "images", "wanted"),
    [
        (25e6, 100_000, 1000),  # 25e9 MACs in all
        (1e3, 100_000, 4000),  # a small network is not shown every image
        (1e12, 100_000, 256),  # a large one at least so many
        (25e6, 48, 48),  # no more than the run was measured on
    ],
)
def test_a_large_network_answers_fewer_images(
    gathered: Callable[..., tuple[int, int]], macs: float, images: int, wanted: int
) -> None:
    assert gathered(macs=macs, images=images) == (1, wanted)


def test_a_share_of_a_pair_adds_up() -> None:
    one, other = candidate("a", 90).paired, candidate("b", 80).paired
    both = one + replace(other, gained=2)
    assert (both.images, both.lost, both.gained, both.agreeing) == (200, 20, 2, 180)
    assert both.drop == pytest.approx(100 * 18 / 200)
    assert both.distance.sqnr_db == pytest.approx(10.0)
