"""What a node does with a trial, without Ray around it."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from faulty import small_recipe

from care_compress.errors import BusyRunError
from care_compress.evaluate.comparison import Entry
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.sweep import tasks
from care_compress.sweep.sections import TimingSection
from care_compress.sweep.stopping import Rungs, StoppedEarly
from care_compress.sweep.tasks import (
    MARK,
    Job,
    Place,
    do_timing,
    do_trial,
    figures,
    pipeline_digest,
    record_file,
)

XML = "openvino-cpu"


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


def results(**more: Any) -> dict[str, Any]:
    accuracy = {"images": 8, "top1": 50.0, "top5": 90.0}
    return {"precision": "int8", "accuracy": accuracy, "exports": {}, "kept": "qat", **more}


def test_a_row_has_the_drop_of_the_model_that_was_kept() -> None:
    drops = {name: {"drop": drop, "drop_ci95": [0, 9]} for name, drop in (("ptq", 3), ("qat", 1))}
    assert figures(results(candidates=drops))["drop"] == 1
    slim = {name: {"drop": 10 + one["drop"], "drop_ci95": [0, 20]} for name, one in drops.items()}
    slim["slim"] = {"drop": 5, "drop_ci95": [0, 20]}
    both = results(candidates=drops, slim={"models": slim})
    assert figures(both)["drop"] == 11, "from the whole network, and not from the slimmed one"
    narrow = {**both, "precision": "fp32", "kept": None}
    del narrow["kept"], narrow["candidates"]
    assert figures(narrow)["drop"] == 5


def test_trainings_on_other_images_are_not_held_against_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rungs = Rungs(first=1, factor=2)
    actor = SimpleNamespace(goes_on=SimpleNamespace(remote=rungs.goes_on))
    monkeypatch.setattr(tasks, "load_ray", lambda: SimpleNamespace(get=lambda one: one))
    where = place(tmp_path / "runs")

    def told(name: str, reached: float, *overrides: str) -> None:
        one = replace(job(where, load_recipe("int8_ptq", overrides)), name=name)
        tasks.watching(one, actor)("float", 1, reached)

    told("easy", 90.0)
    told("hard", 20.0, "data.resolution=128")
    with pytest.raises(StoppedEarly, match="20.00 %"):
        told("bad", 20.0)


class Timed:
    """Stands for a file that takes so long."""

    def __init__(self, ms: float, noisy: bool = False) -> None:
        self.ms, self.is_noisy = ms, noisy

    def percentiles(self) -> dict[str, float]:
        return {"p50": self.ms}

    def speedup_over(self, other: "Timed") -> tuple[float, float, float]:
        return other.ms / self.ms, 0.9 * other.ms / self.ms, 1.1 * other.ms / self.ms


@pytest.fixture
def timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Times a made-up pair of files, 6 ms in float and 2 ms in integers; counts how often."""
    cpu, seen = "onnxruntime-cpu", SimpleNamespace(count=0, kind="a processor", noisy="")
    entries = [Entry(cpu, name, tmp_path / f"{name}.onnx", "f32") for name in ("float", "mine")]
    for entry in entries:
        entry.path.write_bytes(b"file")
    where = place(tmp_path / "runs")
    (where.runs / tasks.TIMINGS).mkdir()

    def measured(runs: Any, batch: int, plan: Any) -> Any:
        seen.count += 1
        return {name: Timed({"float": 6.0, "mine": 2.0}[name], name == seen.noisy) for name in runs}

    known = SimpleNamespace(run=None)
    for name, stand_in in {
        "named_models": lambda *given: [],
        "find_entries": lambda *given: (entries, {(XML, "mine"): "it has no such bits"}),
        "input_size": lambda *given: (8, 8),
        "open_runner": lambda *given: known,
        "measure_latency": measured,
        "processor": lambda: {"name": "x", "kind": seen.kind, "node": "here"},
    }.items():
        monkeypatch.setattr(tasks, name, stand_in)

    def ask(**more: Any) -> dict[str, Any]:
        section = TimingSection(targets=(cpu, XML), **more)
        return do_timing(where, "float", "mine", section)

    seen.ask, seen.path = ask, entries[1].path
    return seen


def test_a_files_speed_is_over_its_float_models(timings: Any) -> None:
    found = timings.ask()
    assert found["onnxruntime-cpu"]["speedup"] == pytest.approx(3.0)
    assert (found["onnxruntime-cpu"]["ms"], found["onnxruntime-cpu"]["float_ms"]) == (
        *({"p50": 2.0}, {"p50": 6.0}),
    )
    assert found[XML] == {"missing": "it has no such bits"}


@pytest.mark.parametrize("restless", ["float", "mine"])
def test_a_speed_is_noisy_where_either_file_is(timings: Any, restless: str) -> None:
    timings.noisy = restless
    assert timings.ask()["onnxruntime-cpu"]["noisy"] is True


def test_a_timing_is_of_its_files_setting_and_processor(timings: Any) -> None:
    first = timings.ask()
    assert timings.ask() == first and timings.count == 1
    timings.ask(batch=2)
    assert timings.count == 2
    timings.kind = "another processor"
    timings.ask(batch=2)
    assert timings.count == 3
    timings.path.write_bytes(b"another file")
    timings.ask(batch=2)
    assert timings.count == 4
