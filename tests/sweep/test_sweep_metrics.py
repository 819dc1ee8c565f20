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
from care_compress.sweep.sections import ObjectiveSection, Sweep
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


CPU = "onnxruntime-cpu"


def timed(name: str, p50: float, speedup: float, kind: str = "with", **more: Any) -> dict[str, Any]:
    """A trial whose file was timed on a processor of one name, with dot products or without."""
    about = {"processor": "AMD EPYC", "processor_kind": kind, "noisy": False, "speedup": speedup}
    latency = {CPU: {"ms": {"p50": p50, "p90": 2 * p50, "p99": 9 * p50}, **about}}
    return {**row("classification", name, 69.5, 1000), "latency": latency, **more}


@pytest.mark.parametrize(
    ("p50", "speedup", "over"),
    [(2.0, 1.5, (0.0, 0.0)), (1.8, 1.6, (-0.2, -0.1)), (2.5, 1.4, (0.5, 0.1))],
)
def test_a_budget_is_a_least_speedup_and_a_most_of_everything_else(
    p50: float, speedup: float, over: tuple[float, float], tmp_path: Path
) -> None:
    limits = {"max_latency": {CPU: 2.0}, "min_speedup": {CPU: 1.5}, "max_top1_drop": 0.5}
    sweep = asked(tmp_path, "classification", budget=limits, timing={"targets": [CPU]})
    found = judged(sweep, timed("mine", p50, speedup))
    expected = {"max_top1_drop": 0.0, f"max_latency {CPU}": over[0], f"min_speedup {CPU}": over[1]}
    assert found["over"] == pytest.approx(expected)
    assert found["within"] == (max(over) <= 0) and found["objective"] == 69.5


def test_what_was_not_measured_holds_no_budget_and_is_no_objective(tmp_path: Path) -> None:
    timing = {"timing": {"targets": [CPU]}, "budget": {"max_latency": {CPU: 2.0}}}
    sweep = asked(tmp_path, "classification", **timing)
    missing = {"latency": {CPU: {"missing": "it does not run"}}}
    found = judged(sweep, timed("mine", 1.0, 2.0, **missing))
    assert found["over"] == {f"max_latency {CPU}": None}
    assert (found["within"], found["objective"]) == (False, None)
    assert best_of(sweep, [found]) is None
    faster = sweep.model_copy(update={"objective": ObjectiveSection(metric="latency", target=CPU)})
    rows = [judged(faster, timed(name, ms, 2.0)) for name, ms in (("a", 1.5), ("b", 1.2))]
    assert [one["objective"] for one in rows] == [1.5, 1.2], "the median"
    best = best_of(faster, rows)
    assert best is not None and best["name"] == "b"


def test_the_largest_file_counts_unless_a_target_is_named(tmp_path: Path) -> None:
    one = {**row("classification", "a", 69.5, 0), "size_bytes": {CPU: 2_000_000, "b": 3_000_000}}
    assert (size_of_row(one), size_of_row(one, CPU)) == (3_000_000, 2_000_000)
    sweep = asked(tmp_path, "classification", budget={"max_size": 2.5})
    assert judged(sweep, one)["over"] == {"max_size": pytest.approx(0.5)}


def test_of_equal_trials_the_one_that_lost_least_then_the_smallest_is_best(tmp_path: Path) -> None:
    sweep = asked(tmp_path, "classification")
    equal = [row("classification", name, 69.5, size) for name, size in (("a", 3), ("b", 2))]
    lost = {**row("classification", "c", 69.5, 1), "drop": 2.0}
    best = best_of(sweep, [judged(sweep, one) for one in [*equal, lost]])
    assert best is not None and best["name"] == "b"


def test_a_front_has_no_trial_that_costs_more_for_the_same() -> None:
    given = [("a", 60.0, 1), ("b", 62.0, 1), ("c", 62.0, 2), ("d", 63.0, 3), ("e", 61.0, 4)]
    rows = [row("classification", name, top1, size) for name, top1, size in given]
    assert [one["name"] for one in front(rows, size_of_row, "top1")] == ["b", "d"]


def test_processors_of_one_name_have_fronts_of_their_own(tmp_path: Path) -> None:
    sweep = asked(tmp_path, "classification", timing={"targets": [CPU]})
    kinds = (("a", 1.0, "with"), ("b", 3.0, "without"), ("c", 2.0, "with"))
    rows = [judged(sweep, timed(name, ms, 1.5, kind)) for name, ms, kind in kinds]
    about = {"seconds": 1.0, "machine": {}, "nodes": [], "total": 3, "runs": "runs"}
    value = sweep_as_json(sweep, task_called("classification"), rows, [], about)
    found = [one["trials"] for one in value["fronts"] if one["cost"] == "latency"]
    assert found == [["a"], ["b"]], "c is slower than a on the same kind, and no better"


def test_the_page_shows_what_varied_and_megabytes(tmp_path: Path) -> None:
    sweep = asked(tmp_path, "classification", overrides={"seed": [1, 2]})
    rows = [judged(sweep, row("classification", "a", 69.5, 7_650_000))]
    rows.append(judged(sweep, row("classification", "b", 69.6, 8_000_000)))
    for seed, one in enumerate(rows, 1):
        one["point"] = {**one["point"], "seed": seed, "quantize.equalize": "off"}
    about = {"seconds": 1.0, "machine": {}, "nodes": [], "total": 2, "runs": "runs"}
    value = sweep_as_json(sweep, task_called("classification"), rows, [], about)
    write_page(value, tmp_path / "sweep.html")
    page = (tmp_path / "sweep.html").read_text()
    assert "seed" in page and "quantize.equalize" not in page
    front_only = page.partition('id="fronts"')[2].partition('id="trials"')[0]
    assert "7.65" in front_only and "7650" not in front_only
