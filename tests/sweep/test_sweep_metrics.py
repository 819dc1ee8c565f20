"""A sweep of networks for masks or boxes is judged by their metric, as one of classifiers is."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console
from sweeping import SCHEMA, sweep_of

from care_compress.errors import RecipeError
from care_compress.sweep.driver import check_trials, judged_as_task
from care_compress.sweep.page import write_page
from care_compress.sweep.results import best_of, front, judged, size_of_row, sweep_as_json
from care_compress.sweep.sections import Sweep
from care_compress.sweep.tasks import figures
from care_compress.sweep.trials import make_search
from care_compress.tasks.known import TASKS, task_called

RECIPE = {"classification": "int8_ptq", "segmentation": "seg_int8_ptq", "detection": "det_int8_ptq"}
SECOND = {"classification": "top5", "segmentation": "pixel_accuracy", "detection": "map"}
QUIET = Console(quiet=True)


def asked(folder: Path, task: str, **more: Any) -> Sweep:
    """The sweep as it is judged."""
    sweep = sweep_of(folder, recipes=[RECIPE[task]], **more)
    return judged_as_task(sweep, make_search(sweep, folder), folder)


def row(task: str, name: str, accuracy: float, size: int) -> dict[str, Any]:
    """What a table shows of a run that says this of itself."""
    results = {
        "task": task,
        "precision": "int8",
        "accuracy": {"images": 50, TASKS[task].metric.key: accuracy, SECOND[task]: 40.0},
        "kept": "ptq",
        "candidates": {"ptq": {"drop": 70.0 - accuracy, "drop_ci95": [-0.1, 2.0]}},
        "exports": {
            "onnxruntime-cpu": {
                "models": {"int8": {"holds": True, "size_bytes": size, "file": "i.onnx"}}
            }
        },
    }
    about = {"name": name, "recipe": RECIPE[task], "point": {"recipe": RECIPE[task]}}
    done = {"status": "finished", "reason": "", "seconds": 1.0, "node": "here"}
    rest = {"command": "c", "taken_over": False, "latency": {}, "baseline": None}
    return {**about, **done, **rest, **figures(results)}


@pytest.mark.parametrize("task", sorted(TASKS))
def test_the_best_the_front_and_the_page_are_of_the_tasks_metric(task: str, tmp_path: Path) -> None:
    own = task_called(task)
    limit = {f"max_{own.metric.key}_drop": 1.0}
    sweep = asked(tmp_path, task, budget={**limit, "max_size": 0.003})
    assert sweep.objective.metric == own.metric.key
    found = [row(task, "small", 68.0, 1000), row(task, "good", 69.5, 2000)]
    found += [row(task, "beaten", 69.4, 2500), row(task, "large", 69.9, 4000)]
    rows = [judged(sweep, one) for one in found]
    assert [one["objective"] for one in rows] == [68.0, 69.5, 69.4, 69.9]
    assert rows[0]["over"] == pytest.approx({next(iter(limit)): 1.0, "max_size": -0.002})
    best = best_of(sweep, rows)
    assert best is not None and best["name"] == "good"
    names = [one["name"] for one in front(rows, size_of_row, own.metric.key)]
    assert names == ["small", "good", "large"]
    about = {"seconds": 1.0, "machine": {}, "nodes": [], "total": 4, "runs": "runs"}
    value = sweep_as_json(sweep, own, rows, [], about)
    jsonschema.validate(value, json.loads(SCHEMA.read_text()))
    assert value["task"] == task and value["fronts"][0]["trials"] == names
    write_page(value, tmp_path / "sweep.html")
    page = (tmp_path / "sweep.html").read_text()
    assert f"{own.metric.name} %" in page
    assert ("top-1" in page) == (task == "classification")


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_a_sweep_of_another_task_is_checked_as_any_other(task: str, tmp_path: Path) -> None:
    sweep = asked(tmp_path, task, overrides={"quantize.calibrate.images": [4, 8]})
    check_trials(sweep, make_search(sweep, tmp_path))
    assert asked(tmp_path, task, objective={"metric": "size"}).objective.metric == "size"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"recipes": ["seg_int8_ptq", "int8_ptq"]}, "a sweep for each task"),
        ({"budget": {"max_top1_drop": 1.0}}, "set budget.max_miou_drop instead"),
        ({"objective": {"metric": "top1"}}, "use miou, or leave it out"),
        ({"objective": {"metric": "map50"}}, "use miou, or leave it out"),
    ],
)
def test_what_is_of_another_task_is_refused(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sweep = sweep_of(tmp_path, **{"recipes": ["seg_int8_ptq"], **more})
    with pytest.raises(RecipeError, match=message):
        judged_as_task(sweep, make_search(sweep, tmp_path), tmp_path)
