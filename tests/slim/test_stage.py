"""The slim stage in the line: a run, its numbers, going on after a kill, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from quantized import care
from rich.console import Console
from tiny import image_folder

import care_compress
from care_compress.cli import main
from care_compress.errors import CareError
from care_compress.evaluate.resolve import NamedModel, named_models
from care_compress.evaluate.slim_accuracy import slim_line
from care_compress.export import width_times
from care_compress.model.care import Care, Widths
from care_compress.model.checkpoint import save_checkpoint
from care_compress.model.cost import measure_cost
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.report import write
from care_compress.run.finished import read_run

QUIET = Console(quiet=True)
HEAL = {"max_steps": 3, "batch_size": 16, "learning_rate": 1e-3, "checkpoint_steps": 1}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images, a checkpoint, and a folder of runs."""
    folder = tmp_path_factory.mktemp("slim")
    image_folder(folder / "images", per_class=12)
    save_checkpoint(care(4), folder / "model.safetensors", {})
    return folder


def recipe(place: Path, name: str = "fp32", **values: object) -> Recipe:
    return load_recipe(
        name,
        [],
        {
            "model.checkpoint": str(place / "model.safetensors"),
            "data.source": str(place / "images"),
            "data.resolution": 32,
            "data.workers": 0,
            "data.crop_pct": 1.0,
            "export.targets": [],
            "slim": {"budget": {"macs": 0.7}, "images": 32, "multiple": 4, "heal": dict(HEAL)},
            **values,
        },
    )


@pytest.fixture(scope="module")
def finished(place: Path) -> dict[str, Any]:
    return run_recipe(recipe(place), place / "runs", "slim", QUIET)


def test_a_run_leaves_a_smaller_network_within_its_budget(
    place: Path, finished: dict[str, Any]
) -> None:
    run = read_run(place / "runs" / "slim")
    network = care_compress.load_checkpoint(run.checked_checkpoint())
    before, after = finished["slim"]["macs"]
    assert measure_cost(network, 32).macs == after
    assert 0.67 <= after / before <= 0.7
    plan = json.loads((run.path / "slim" / "plan.json").read_text())
    assert {one["name"]: one["width"] for one in plan["places"]}["2.0 inter1"] == (
        network.widths.hidden1[3]
    )
    assert finished["rewrites"][0]["macs"] == after


def test_drops_count_from_the_whole_network_with_the_same_training(
    place: Path, finished: dict[str, Any]
) -> None:
    models = finished["slim"]["models"]
    given, trained, slim = models.values()
    # Where training did not help, the network is held to as it was given.
    better = "float, trained as long" if trained["top1"] >= given["top1"] else "float"
    assert trained["against"] == "float" and slim["against"] == better
    assert slim["drop"] == pytest.approx(models[better]["top1"] - slim["top1"])
    assert slim["top1"] == pytest.approx(finished["accuracy"]["top1"])
    folder = place / "runs" / "slim" / "slim"
    steps = [
        json.loads((folder / name / "history.json").read_text()) for name in ("model", "whole")
    ]
    assert [one["validations"][-1]["epoch"] for one in steps] == [1.0, 1.0]
    given = care_compress.load_checkpoint(place / "model.safetensors")
    whole = care_compress.load_checkpoint(folder / "whole.safetensors")
    assert whole.widths == given.widths
    assert not torch.equal(whole.head.fc.weight, given.head.fc.weight)


def test_a_killed_run_goes_on_in_the_middle_of_healing(
    place: Path, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from care_compress.train import loop

    class Killed(BaseException):
        pass

    saved = 0
    real = loop._save

    def save(*arguments: Any) -> None:
        nonlocal saved
        real(*arguments)
        saved += 1
        if saved == 3:  # the beginning, and two steps of three
            raise Killed

    monkeypatch.setattr(loop, "_save", save)
    with pytest.raises(Killed):
        run_recipe(recipe(place), place / "runs", "killed", QUIET)
    monkeypatch.undo()
    cut = (place / "runs" / "killed" / "slim" / "cut.safetensors").stat().st_mtime_ns
    said = Console(record=True, width=200)
    again = run_recipe(recipe(place), place / "runs", "killed", said)
    text = said.export_text()
    assert "slim: unchanged, taken over" in text and "resuming after step 2/3" in text
    assert (place / "runs" / "killed" / "slim" / "cut.safetensors").stat().st_mtime_ns == cut
    assert again["slim"] == finished["slim"]
    for name in ("cut", "model", "whole"):
        files = [
            place / "runs" / run / "slim" / f"{name}.safetensors" for run in ("slim", "killed")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_another_healing_keeps_the_cut_and_another_budget_does_not(
    place: Path, finished: dict[str, Any]
) -> None:
    shutil.copytree(place / "runs" / "slim", place / "runs" / "changed")
    said = Console(record=True, width=200)
    healed = recipe(place, **{"slim.heal": {**HEAL, "max_steps": 2}})
    run_recipe(healed, place / "runs", "changed", said)
    text = said.export_text()
    assert "slim: unchanged, taken over" in text and "slim model: course changed" in text
    said = Console(record=True, width=200)
    results = run_recipe(
        recipe(place, **{"slim.budget": {"parameters": 0.8}, "slim.importance": "module_aware"}),
        place / "runs",
        "changed",
        said,
    )
    assert "slim: slim changed, made again" in said.export_text()
    before, after = results["slim"]["parameters"]
    assert 0.77 <= after / before <= 0.8


def test_qat_heals_where_nothing_else_does(place: Path) -> None:
    qat = {"max_steps": 2, "batch_size": 16}
    made = recipe(
        place,
        "int8_qat",
        **{
            "slim.heal": None,
            "slim.hidden": 0.9,
            "quantize.qat": qat,
            "quantize.calibrate.images": 16,
        },
    )
    results = run_recipe(made, place / "runs", "int8", QUIET)
    models = results["slim"]["models"]
    assert list(models) == ["float", "float, trained as long", "slim", results["kept"]]
    assert models[results["kept"]]["against"] in ("float", "float, trained as long")
    told = care_compress.Result(place / "runs" / "int8").accuracy
    assert told.drop == models[results["kept"]]["drop"]
    folder = place / "runs" / "int8" / "slim"
    assert (folder / "whole_qat.safetensors").is_file()
    assert not (folder / "model.safetensors").exists()
    assert results["budget"]["met"] == (models[results["kept"]]["drop"] <= 0.3)
    run = read_run(place / "runs" / "int8")
    assert run.checkpoint.name == "cut.safetensors"
    schema = Path(write.__file__).with_name("results.schema.json")
    jsonschema.validate(results, json.loads(schema.read_text()))
    # Everything that goes on from a run works on the slim network.
    for arguments in (["fidelity", "int8"], ["report", "int8"]):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, "--runs", str(place / "runs")])
        assert ended.value.code == 0, arguments
    page = (run.path / "report.md").read_text()
    assert "What was cut, and what it cost" in page and "fewer multiply-accumulates" in page
    assert "| 2.0 inter1 |" in page
    plan = json.loads((run.path / "slim" / "plan.json").read_text())
    hidden = plan.pop("hidden")
    assert hidden["allowed"] == pytest.approx(0.9 * 0.7)
    shown = (run.path / "report.html").read_text()
    assert f"positions) {100 * hidden['left']:.1f} % stay, and 63.0 % were allowed" in shown
    (run.path / "slim" / "plan.json").write_text(json.dumps(plan))  # of an older run
    with pytest.raises(SystemExit) as ended:
        main(["report", "int8", "--runs", str(place / "runs")])
    assert ended.value.code == 0
    assert "| 2.0 inter1 |" in (run.path / "report.md").read_text()


def test_a_slimmed_checkpoint_is_quantized_like_any_other(
    place: Path, finished: dict[str, Any]
) -> None:
    network = place / "runs" / "slim" / "slim" / "model.safetensors"
    values = {"model.checkpoint": str(network), "slim": None, "quantize.calibrate.images": 16}
    results = run_recipe(recipe(place, "int8_ptq", **values), place / "runs", "after", QUIET)
    assert results["rewrites"][0]["macs"] == finished["slim"]["macs"][1]
    assert results["candidates"]["ptq"]["images"] == results["accuracy"]["images"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"slim.budget": {"macs": 0.05}}, "cannot be met"),
        ({"slim.budget": {"macs": 0.5, "parameters": 0.5}}, "name one of macs"),
        ({"slim.budget": {"macs": 1.5}}, "slim.budget.macs"),
        ({"slim.hidden": 0.01}, r"slim\.hidden 0\.01 cannot be met"),
        ({"slim.hidden": 1.5}, "slim.hidden"),
        ({"slim.rules": [{"stage": 3, "block": 9, "least": 1.0}]}, "matches no interaction"),
        (
            {"slim.budget": {"latency": 0.8}, "slim.target": "tensorrt-jetson-orin"},
            "cannot be measured here",
        ),
        ({"slim.heal.batch_size": 640}, "fewer than one batch"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    place: Path, values: dict[str, object], message: str
) -> None:
    with pytest.raises(CareError, match=message) as refused:
        run_recipe(recipe(place, **values), place / "runs", "refused", QUIET)
    assert "\n" not in str(refused.value)
    assert not (place / "runs" / "refused").exists()


def test_a_network_that_was_slimmed_is_not_slimmed_again(place: Path) -> None:
    whole = Widths.published("care_nano")
    narrow = Care("care_nano", 4, widths=Widths(whole.hidden1, (16, *whole.hidden2[1:])))
    save_checkpoint(narrow, place / "narrow.safetensors", {})
    with pytest.raises(CareError, match="slimmed already"):
        run_recipe(
            recipe(place, **{"model.checkpoint": str(place / "narrow.safetensors")}),
            place / "runs",
            "twice",
            QUIET,
        )


def test_a_plan_shows_widths_before_and_after(
    place: Path, finished: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["slim.budget.macs=0.7", "slim.images=32", "slim.multiple=4", "slim.heal=null"]
    flags = [part for one in settings for part in ("--set", one)]
    model, images = str(place / "model.safetensors"), str(place / "images")
    data = ["--ckpt", model, "--data", images, "--res", "32", "--crop", "1.0"]
    for more in ([], ["--json"]):
        with pytest.raises(SystemExit) as ended:
            main(["plan", "slim_fp32", *data, *flags, *more])
        assert ended.value.code == 0
    shown = capsys.readouterr().out
    table, _, content = shown.partition("\n{")
    assert "slim: macs to 0.7, by reconstruct" in table and "2.0 inter1" in table
    widths = {one["name"]: one["width"] for one in json.loads("{" + content)["slim"]["places"]}
    assert widths == {
        one["name"]: one["width"]
        for one in json.loads((place / "runs" / "slim" / "slim" / "plan.json").read_text())[
            "places"
        ]
    }


def test_a_slimmed_run_is_no_float_baseline(place: Path, finished: dict[str, Any]) -> None:
    runs = place / "runs_of_one"
    shutil.copytree(place / "runs" / "slim", runs / "slim")
    results = json.loads((runs / "slim" / "results.json").read_text())
    (runs / "slim" / "results.json").write_text(json.dumps({**results, "recipe": "mine"}))
    assert named_models(["fp32"], runs) == ["fp32"]
    (found,) = named_models(["mine"], runs)
    assert isinstance(found, NamedModel)


def test_a_comparison_tells_what_equal_training_gave(finished: dict[str, Any]) -> None:
    told = slim_line(finished)
    models = finished["slim"]["models"]
    assert f"{models['float']['top1']:.2f} % as given" in told
    assert f"{models['float, trained as long']['top1']:.2f} % after the same training" in told
    assert f"the drop is {models['slim']['drop']:.2f} [" in told


def test_times_of_widths_are_measured_once_and_decide_a_latency_budget(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float and in ONNX Runtime, which are the quickest to make and to profile."""
    asked = {
        # Where products are quick, little of so small a network's time can be cut away.
        "slim.budget": {"latency": 0.96},
        "slim.target": "onnxruntime-cpu",
        "slim.heal": None,
        "slim.refit": False,
        "data.resolution": 96,
    }
    monkeypatch.setattr(width_times, "SHARES", (1.0,))  # and the narrowest: each is an export
    monkeypatch.setattr(width_times, "TURNS", 2)
    timed = recipe(place, **asked)
    results = run_recipe(timed, place / "runs", "timed", QUIET)
    plan = json.loads((place / "runs" / "timed" / "slim" / "plan.json").read_text())
    assert plan["budget"]["unit"] == "ms" and plan["after"] <= 0.96 * plan["before"]
    assert results["slim"]["macs"][1] < results["slim"]["macs"][0]
    (table,) = (place / "runs" / width_times.FOLDER).glob("*.json")
    row = dict(json.loads(table.read_text())["places"]["3.0 inter1"])
    assert list(row) == sorted(row) and row[max(row)] > 0
    measured = table.stat().st_mtime_ns
    shutil.rmtree(place / "runs" / "timed")
    run_recipe(timed, place / "runs", "timed", QUIET)
    assert table.stat().st_mtime_ns == measured
