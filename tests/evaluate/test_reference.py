"""Accepted values: a drift fails with one line, what cannot be measured is said."""

import json
from pathlib import Path

import pytest
import yaml
from quantized import care
from rich.console import Console
from tiny import image_folder

from care_compress.cli import main
from care_compress.errors import RecipeError, TargetError
from care_compress.evaluate import reference
from care_compress.evaluate.reference import (
    REFERENCE_FILE,
    AcceptedRecipe,
    MeasuredFile,
    checked,
    one_by_one,
    read_reference,
    run_reference,
)
from care_compress.model.checkpoint import save_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.recipe import recipe as recipes
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.target import load_target

CPU, NPU = "onnxruntime-cpu", "openvino-npu"


def accepted(top1: float = 50.0, size: int = 1000, **targets: object) -> dict[str, object]:
    values = {"top1": top1, "size_bytes": size}
    return {"top1_tolerance": 0.2, "size_tolerance": 1.0, "targets": {CPU: values, **targets}}


def reference_file(folder: Path, **content: object) -> Path:
    path = folder / "reference.yaml"
    path.write_text(yaml.safe_dump({"recipes": content}))
    return path


@pytest.mark.parametrize(
    ("top1", "size", "drifting"),
    [
        (50.0, 1000, []),
        (50.2, 990, []),
        (49.79, 1000, ["top-1"]),
        (50.21, 1000, ["top-1"]),
        (50.0, 1011, ["bytes"]),
        (0.0, 1, ["top-1", "bytes"]),
    ],
)
def test_only_what_is_outside_its_tolerance_drifts(
    top1: float, size: int, drifting: list[str]
) -> None:
    known = AcceptedRecipe.model_validate(accepted())
    checks = list(checked("tiny", known, {CPU: MeasuredFile(top1, size)}))
    assert [check.what for check in checks if not check.holds] == drifting
    assert len(checks) == 2


def test_a_drift_says_what_where_and_by_how_much() -> None:
    known = AcceptedRecipe.model_validate(accepted())
    first, second = checked("tiny", known, {CPU: MeasuredFile(48.125, 1_002_003)})
    assert str(first) == f"DRIFT tiny on {CPU}: top-1 48.125, accepted 50 +- 0.2"
    assert str(second) == f"DRIFT tiny on {CPU}: bytes 1,002,003, accepted 1,000 +- 10"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of recipes with one tiny float recipe in it."""
    folder = tmp_path_factory.mktemp("recipes")
    save_checkpoint(care(4), folder / "four.safetensors", {})
    data = {"source": str(image_folder(folder / "images")), "resolution": 32, "workers": 0}
    recipe = {
        "claim": "a test",
        "model": {"checkpoint": str(folder / "four.safetensors")},
        "data": data,
        "export": {"images": 8},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def test_recipes_are_made_and_every_drift_fails(
    runs: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino", reason="needs the openvino extra")
    monkeypatch.setattr(recipes, "RECIPES_DIR", shipped)
    monkeypatch.setattr(reference, "git_revision", lambda: "abc")
    values = {"top1": 1.0, "size_bytes": 1}
    file = reference_file(shipped, tiny=accepted(0.0, 1, **{NPU: values}))
    assert run_reference([], file, runs, one_by_one(run_recipe), Console(width=200)) == 1
    shown = capsys.readouterr().out
    assert f"making {runs / 'reference_tiny'}" in shown
    results = json.loads((runs / "reference_tiny" / "results.json").read_text())
    top1 = results["accuracy"]["top1"]
    size = results["exports"][CPU]["models"]["fp32"]["size_bytes"]
    assert shown.count("DRIFT") == 2
    assert f"DRIFT tiny on {CPU}: top-1 {top1:.10g}, accepted 0 +- 0.2" in shown
    assert f"skipped tiny on {NPU}: OpenVINO sees no NPU here" in shown
    manifest = runs / "reference_tiny" / "manifest.json"
    manifest.write_text(
        json.dumps({**json.loads(manifest.read_text()), "git_revision": "abc"}), encoding="utf-8"
    )
    file = reference_file(shipped, tiny=accepted(top1, size, **{NPU: values}))
    assert run_reference(["tiny"], file, runs, one_by_one(run_recipe), Console(width=200)) == 0
    shown = capsys.readouterr().out
    assert "making" not in shown, "the run of this very commit is taken"
    assert "2 values, 0 of them drifted" in shown


def test_a_run_of_other_code_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = load_recipe("fp32")
    run = tmp_path / "reference_fp32"
    run.mkdir()
    (run / "results.json").write_text("{}")
    about = {"git_revision": "abc", "recipe": wanted.model_dump(mode="json")}
    (run / "manifest.json").write_text(json.dumps(about))
    for revision, current in (("abc", True), ("def", False), ("abc+changes", False), (None, False)):
        monkeypatch.setattr(reference, "git_revision", lambda revision=revision: revision)
        assert reference._is_current(run, wanted) is current
    monkeypatch.setattr(reference, "git_revision", lambda: "abc")
    assert not reference._is_current(run, load_recipe("fp32", ["seed=7"])), "another recipe"


def test_nothing_measured_is_no_success(
    runs: Path, shipped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "RECIPES_DIR", shipped)
    monkeypatch.setattr(reference, "_measured", lambda *_: ({}, {CPU: "not installed"}))
    file = reference_file(shipped, tiny=accepted())
    with pytest.raises(TargetError, match="no target of these recipes can be measured here"):
        run_reference([], file, runs, one_by_one(lambda *_: None), Console(quiet=True))


def test_every_shipped_value_is_of_a_recipe_and_a_target() -> None:
    known = read_reference(REFERENCE_FILE, [])
    assert {"fp32", "int8_ptq", "int8_qat"} <= set(known)
    for name, one in known.items():
        assert load_recipe(name).data.source == "builtin:shapes", "anybody can make it"
        for target in one.targets:
            load_target(target)


@pytest.mark.parametrize(
    ("content", "names", "message"),
    [
        ({"int8_ptqq": accepted()}, [], "there is no recipe 'int8_ptqq'"),
        ({"fp32": accepted()}, ["int8_qat"], "no accepted values of 'int8_qat'"),
        ({"fp32": accepted(**{"openvino": {"top1": 1.0, "size_bytes": 1}})}, [], "no target"),
        ({"fp32": {**accepted(), "top1_tolerance": -1}}, [], "top1_tolerance"),
        ({"fp32": {**accepted(), "targets": {}}}, [], "targets"),
        ({}, [], "recipes"),
    ],
)
def test_mistakes_are_named_before_anything_is_made(
    content: dict[str, object], names: list[str], message: str, tmp_path: Path
) -> None:
    file = reference_file(tmp_path, **content)
    with pytest.raises(RecipeError, match=message):
        run_reference(names, file, tmp_path / "runs", one_by_one(run_recipe), Console(quiet=True))
    assert not (tmp_path / "runs").exists()


def test_a_missing_file_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["reference", "--accepted", "absent.yaml"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip() == "RecipeError: absent.yaml does not exist."
