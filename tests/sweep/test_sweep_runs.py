"""Real runs in a sweep: what trials share is made once, and each has the bits of a run alone."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from rich.console import Console
from sweeping import SCHEMA
from tiny import image_folder, recipe_file

from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import load_recipe
from care_compress.sweep.driver import SweepOptions, run_sweep
from care_compress.sweep.sections import read_sweep

pytest.importorskip("ray", reason="needs the ray extra")

IMAGES = "quantize.calibrate.images"


def recipe_that_trains(folder: Path) -> Path:
    """Train a tiny float model, then quantize it."""
    path = recipe_file(folder, image_folder(folder / "data"), epochs=1)
    said = yaml.safe_load(path.read_text())
    said |= {
        "precision": "int8",
        "rewrite": {"fold_norms": False},
        "quantize": {"rules": [{"weight": 8, "input": 8}], "calibrate": {"batch_size": 8}},
        "export": {"targets": ["onnxruntime-cpu"], "images": 8},
    }
    path.write_text(yaml.safe_dump(said))
    return path


@pytest.mark.slow
def test_what_trials_share_is_made_once_and_has_the_bits_of_a_run_alone(tmp_path: Path) -> None:
    recipe, runs = recipe_that_trains(tmp_path), tmp_path / "runs"
    # Another recipe that begins with the same training.
    other = recipe.with_name("other.yaml")
    other.write_text(recipe.read_text())
    asked = {
        "recipes": [str(recipe), str(other)],
        "overrides": {IMAGES: [8, 16]},
        "timing": {"targets": ["onnxruntime-cpu"], "seconds": 0.05},
        "budget": {"max_latency": {"onnxruntime-cpu": 1e6}},
    }
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(asked))
    sweep = read_sweep(str(tmp_path / "s.yaml"))
    assert run_sweep(sweep, runs, SweepOptions(), run_recipe, Console(quiet=True)) == 0
    value: dict[str, Any] = json.loads((runs / "s" / "sweep.json").read_text())
    jsonschema.validate(value, json.loads(SCHEMA.read_text()))

    names = [row["name"] for row in value["trials"]]
    trained = [path for path in (runs / "s").glob("*/float/train_state.pt")]
    assert len(names) == 4 and len(trained) == 1, "one process trained the float model"
    for row in value["trials"]:
        assert row["latency"]["onnxruntime-cpu"]["ms"]["p50"] > 0
        assert row["within"] and row["objective"] == row["top1"]
    assert len(value["baselines"]) == 1, "all have one float model"

    alone = load_recipe(str(recipe), [f"{IMAGES}=16"])
    run_recipe(alone, tmp_path / "alone", "alone", Console(quiet=True))
    same = next(row["name"] for row in value["trials"] if row["point"][IMAGES] == 16)
    for file in ("float/model.safetensors", "ptq/model.safetensors", "calibration.json"):
        made = [
            (where / file).read_bytes() for where in (runs / "s" / same, tmp_path / "alone/alone")
        ]
        assert made[0] == made[1], file
