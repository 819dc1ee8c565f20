"""Which runs the names of a comparison mean, and the float baseline that is made for one."""

import os
from pathlib import Path
from typing import Any

from care_compress.evaluate.resolve import NamedModel, float_recipe_of, named_models
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.run.directory import Run

MINE = "model.checkpoint=mine.safetensors"
OTHER = "model.checkpoint=other.safetensors"


def finished(runs: Path, name: str, asked: Recipe, age: int, **results: Any) -> None:
    """A run that ended so many seconds ago."""
    said = {"recipe": asked.name, "precision": asked.precision, "exports": {}, **results}
    with Run(runs, name).open(asked, {}) as run:
        path = run.write_json("results.json", said)
    when = path.stat().st_mtime - age
    os.utime(path, (when, when))


def names(asked: list[str], runs: Path) -> list[str]:
    """Names of the runs that are meant; a name that means none as it is."""
    found = named_models(asked, runs)
    return [one.name if isinstance(one, NamedModel) else f"no {one}" for one in found]


def test_of_several_runs_the_newest_is_meant(tmp_path: Path) -> None:
    for name, age in (("a", 20), ("b", 10), ("c", 30)):
        finished(tmp_path, name, load_recipe("int8_ptq"), age)
    assert names(["int8_ptq"], tmp_path) == names(["int8"], tmp_path) == ["b"]
    assert names(["c"], tmp_path) == ["c"], "a run's own name means that run"


def test_the_last_name_says_which_model_and_images_are_meant(tmp_path: Path) -> None:
    finished(tmp_path, "mine", load_recipe("int8_ptq", [MINE]), 50)
    finished(tmp_path, "fitting", load_recipe("fp32", [MINE, "data.workers=1"]), 40)
    finished(tmp_path, "of_other_weights", load_recipe("fp32", [OTHER]), 30)
    finished(tmp_path, "of_other_pixels", load_recipe("fp32", [MINE, "data.resolution=96"]), 20)
    assert names(["fp32", "mine"], tmp_path) == ["fitting", "mine"], "however its images are read"
    finished(tmp_path, "alone", load_recipe("int8_ptq", [MINE, "data.resolution=160"]), 10)
    assert names(["fp32", "alone"], tmp_path) == ["no fp32", "alone"], "there is none to hold it to"


def test_a_slimmed_float_run_is_meant_by_its_name_only(tmp_path: Path) -> None:
    finished(tmp_path, "whole", load_recipe("fp32"), 20)
    finished(tmp_path, "narrow", load_recipe("fp32"), 10, recipe="narrow", slim={})
    assert names(["fp32"], tmp_path) == ["whole"]
    assert names(["narrow"], tmp_path) == ["narrow"]


def test_a_baseline_is_scored_and_exported_as_what_it_is_compared_with(tmp_path: Path) -> None:
    asked = [MINE, "data.resolution=96", "evaluate.images=70", "export.batch=2"]
    recipe = load_recipe("int8_ptq", asked)
    file = {"models": {"int8": {"file": "int8.onnx"}}}
    exports = {"onnxruntime-cpu": file, "tensorrt-gpu": {"failed": "no such operation"}}
    finished(tmp_path, "mine", recipe, 0, exports=exports)
    (one,) = named_models(["mine"], tmp_path)
    assert isinstance(one, NamedModel) and one.targets == ["onnxruntime-cpu", "tensorrt-gpu"]
    baseline = float_recipe_of(one)
    assert (baseline.precision, baseline.quantize) == ("fp32", None)
    assert (baseline.model, baseline.data) == (recipe.model, recipe.data)
    assert baseline.evaluate == recipe.evaluate and baseline.evaluate.images == 70
    assert baseline.export.targets == ("onnxruntime-cpu",), "the others have nothing beside them"
    assert baseline.export.batch == 2
