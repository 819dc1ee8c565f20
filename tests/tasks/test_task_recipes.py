"""Recipes for masks and boxes: what is refused before any work, and the whole line in two steps."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from every_task import NAMES, painted
from rich.console import Console

from care_compress.errors import RecipeError, TrainingError
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.tasks.known import TASKS

QUIET = Console(quiet=True)
DENSE = {"segmentation": ("seg_int8_ptq", "max_miou_drop"),
         "detection": ("det_int8_ptq", "max_map50_drop")}  # fmt: skip
EACH = pytest.mark.parametrize("name", DENSE)


@EACH
def test_a_budget_of_another_task_is_refused_by_name(name: str) -> None:
    recipe, own = DENSE[name]
    assert load_recipe(recipe).budget.max_drop == getattr(load_recipe(recipe).budget, own)
    for key, task in (
        ("max_top1_drop", "classification"),
        ("max_miou_drop", "segmentation"),
        ("max_map50_drop", "detection"),
    ):
        if task == name:
            continue
        with pytest.raises(RecipeError, match=f"budget.{key} is for {task}; .* {own} instead"):
            load_recipe(recipe, [f"budget.{key}=1.0"])
    with pytest.raises(RecipeError, match=f"budget.{own} is for {name}; .* max_top1_drop instead"):
        load_recipe("int8_ptq", [f"budget.{own}=1.0"])


def test_a_task_that_nobody_knows_is_refused() -> None:
    with pytest.raises(RecipeError, match="task.*segmentation"):
        load_recipe("int8_ptq", ["task=segmentaton", "budget.max_top1_drop=null"])


@EACH
def test_a_whole_network_needs_no_backbone(name: str) -> None:
    with pytest.raises(RecipeError, match="leave model.backbone out"):
        load_recipe(DENSE[name][0], ["model.backbone=builtin:care_nano_shapes"])


def made(folder: Path, name: str, **changed: Any) -> Recipe:
    """Two steps of training on a few images, and INT8 for one target."""
    source = folder / "images"
    if not source.exists():
        painted(source, name)
    content = {
        "claim": "a test",
        "base": DENSE[name][0],
        "model": {"checkpoint": None, "arch": "care_nano"},
        "data": {"source": str(source), "resolution": 96, "workers": 0},
        "train": {"epochs": 1, "max_steps": 2, "batch_size": 4, "learning_rate": 1e-3}
        | changed.pop("train", {}),
        "quantize": {"bias_correction": False, "norm_reestimation": False},
        "export": {"targets": ["onnxruntime-cpu"], "images": 4},
        "budget": {DENSE[name][1]: None},
        **changed,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_recipe(str(path))


@EACH
@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_images_are_refused_before_any_training(name: str, kind: str, tmp_path: Path) -> None:
    recipe = made(tmp_path, name, train={"augment": {kind: 0.5}})
    with pytest.raises(TrainingError, match=f"mixes images, and {name}.*leave out mixup"):
        run_recipe(recipe, tmp_path / "runs", "run", QUIET)
    assert not list(tmp_path.rglob("train_state.pt"))


@EACH
def test_the_whole_line_runs(name: str, tmp_path: Path) -> None:
    """From a folder of images to a file that is read back, with the numbers of its own task."""
    task, runs = TASKS[name], tmp_path / "runs"
    classes = ("ground", *NAMES) if name == "segmentation" else NAMES
    returned = run_recipe(made(tmp_path, name), runs, "run", QUIET)
    results = json.loads((runs / "run" / "results.json").read_text())
    assert returned == results, "what is returned is what is written"
    assert results["task"] == name
    assert list(results["accuracy"]) == ["images", *task.shown] and task.metric.key in task.shown
    assert results["accuracy"]["images"] == 6
    before, ptq = results["float"], results["candidates"]["ptq"]
    assert list(before) == list(task.shown) and results["budget"] is None
    assert ptq["drop"] == pytest.approx(before[task.metric.key] - ptq[task.metric.key])
    low, high = ptq["drop_ci95"]
    assert low <= ptq["drop"] <= high and low < high, "six images are not sure of anything"
    assert 0 <= ptq["agreement"] <= 100

    folder = runs / "run" / "exports" / "onnxruntime-cpu"
    predict = OnnxPredictor(folder / "int8.onnx")
    assert (predict.task, predict.num_classes) == (name, len(classes))
    export = json.loads((folder / "export.json").read_text())
    assert export["task"] == name and export["preprocessing"]["letterbox"] is True
    assert export["models"]["int8"]["holds"], "the file computes what its model does"
