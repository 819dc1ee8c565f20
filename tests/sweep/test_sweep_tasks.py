"""What a node does with a trial, without Ray around it."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from faulty import small_recipe

from care_compress.errors import BusyRunError
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.sweep import tasks
from care_compress.sweep.tasks import MARK, Job, Place, do_trial, pipeline_digest, record_file


def place(folder: Path, **changed: str) -> Place:
    (folder / ".trials").mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text("mark")
    given = {"mark": "mark", "code": pipeline_digest(), **changed}
    return Place(folder, Path.cwd(), **given)


def job(where: Place, recipe: Recipe, **more: Any) -> Job:
    return Job("trial", recipe, where, {"key": "k"}, threads=1, **more)


def nothing(*given: Any) -> Mapping[str, Any]:
    raise AssertionError("no run begins")


@pytest.mark.parametrize(
    ("changed", "told"),
    [({"mark": "another"}, "does not see"), ({"code": "another"}, "another care-compress")],
)
def test_a_node_that_cannot_take_part_says_why(
    changed: dict[str, str], told: str, tmp_path: Path
) -> None:
    row = do_trial(job(place(tmp_path / "runs", **changed), load_recipe("int8_ptq")), nothing)
    assert row["status"] == "failed" and told in row["reason"]


def test_without_its_float_model_a_trial_does_not_begin(tmp_path: Path) -> None:
    before = {"status": "failed", "reason": "the loss is nan"}
    row = do_trial(job(place(tmp_path / "runs"), load_recipe("int8_ptq")), nothing, before)
    assert row["status"] == "failed" and "the loss is nan" in row["reason"]


def test_a_run_that_another_process_still_holds_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [BusyRunError("held"), BusyRunError("held")]

    def work(*given: Any) -> Any:
        if held:
            raise held.pop()
        accuracy = {"images": 8, "top1": 50.0, "top5": 90.0}
        return {"precision": "fp32", "accuracy": accuracy, "exports": {}}

    where = place(tmp_path / "runs")
    row = do_trial(job(where, load_recipe("fp32")), work)
    assert row["status"] == "finished" and row["drop"] == 0.0
    record = json.loads(record_file(where.runs, "trial").read_text())
    assert record["key"] == "k" and record["row"]["top1"] == 50.0
    held.append(BusyRunError("held for ever"))
    monkeypatch.setattr(tasks, "PATIENCE", -1.0)
    assert "held for ever" in do_trial(job(where, load_recipe("fp32")), work)["reason"]


@pytest.mark.slow
def test_a_trial_of_several_processes_is_started_by_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(Path(__file__).resolve().parents[2])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))
    recipe = load_recipe(str(small_recipe(tmp_path / "recipe", ["onnxruntime-cpu"])))
    where = place(tmp_path / "runs")
    row = do_trial(job(where, recipe, processes=2), run_recipe)
    assert row["status"] == "finished", (where.runs / "logs" / "trial.txt").read_text()
    manifest = json.loads((where.runs / "trial" / "manifest.json").read_text())
    assert manifest["recipe"] == recipe.model_dump(mode="json")
    assert row["size_bytes"]["onnxruntime-cpu"] > 0
