"""What `plan` says of the disk is what a run really takes, and too little is found before work."""

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from quantized import small_start
from rich.console import Console

from care_compress.cli import main
from care_compress.errors import RunError
from care_compress.model.rewrite import rewrite
from care_compress.pipeline import run_recipe
from care_compress.preflight import (
    Size,
    Space,
    check_space,
    model_of,
    needed_space,
    own_section,
    preflight,
)
from care_compress.quantize.ptq import planned
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.target import load_target
from care_compress.run.processes import World

QUIET = Console(quiet=True)
Usage = namedtuple("Usage", "total used free")


def taken(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def space_of(name: str, chosen: list[str]) -> Space:
    return preflight(load_recipe(name, chosen), World(), QUIET).space


def test_the_estimate_is_what_a_run_takes(tmp_path: Path) -> None:
    """Stated tolerance: 10 % short, or 40 % too much; tests/faults/ has all kinds of folders."""
    chosen = [*small_start(tmp_path), "quantize.calibrate.images=32"]
    chosen += ["export.targets=[onnxruntime-cpu]"]
    space = space_of("int8_ptq", chosen)
    run_recipe(load_recipe("int8_ptq", chosen), tmp_path, "run", QUIET)
    for name in ("ptq", "exports"):
        ratio = space.folders[name] / taken(tmp_path / "run" / name)
        assert 0.9 < ratio < 1.4, (name, space.folders[name])
    assert 0.9 < space.total / taken(tmp_path / "run") < 1.4


def test_a_search_and_a_float_training_have_an_estimate_too() -> None:
    space = space_of("mixed_auto", ["export.targets=[onnxruntime-cpu]"])
    assert space.folders["ptq"] > 1e6 and space.folders["exports"] > 4e5
    training = space_of("fp32_shapes", ["export.targets=[]"])
    floats = space_of("fp32", ["export.targets=[]"])
    assert training.folders["float"] > 7 * floats.total, "two states of an Adam, and the weights"


def test_too_little_room_ends_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 10**6, 10**6))
    with pytest.raises(RunError, match=r"needs about [\d.]+ MB .*has 1\.0 MB free.*--runs"):
        run_recipe(load_recipe("int8_ptq", small_start(tmp_path)), tmp_path / "runs", "run", QUIET)
    assert not (tmp_path / "runs").exists()


def test_what_a_run_left_is_room_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 5000, 5000))
    space = Space({"exports": 10_000}, 0)
    with pytest.raises(RunError):
        check_space(space, tmp_path / "run")
    for folder in ("bundles", "exports"):
        (tmp_path / "run" / folder).mkdir(parents=True)
    (tmp_path / "run" / "bundles" / "old.tar").write_bytes(bytes(9000))
    with pytest.raises(RunError):
        check_space(space, tmp_path / "run")  # a bundle stays
    (tmp_path / "run" / "exports" / "old.bin").write_bytes(bytes(9000))
    check_space(space, tmp_path / "run")


def test_plan_says_how_much_disk(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", "int8_ptq", "--target", "openvino-cpu"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "disk of a run: about" in shown and "MB in the run directory" in shown
    with pytest.raises(SystemExit):
        main(["plan", "int8_ptq", "--target", "openvino-cpu", "--json"])
    disk = json.loads(capsys.readouterr().out)["disk_bytes"]
    assert disk["total"] == sum(
        disk[name] for name in ("float", "ptq", "qat", "exports", "records")
    )


def test_four_bits_do_not_make_a_file_smaller_than_eight(tmp_path: Path) -> None:
    """Not every runtime packs them; an estimate must not fall short."""

    def exports(name: str) -> int:
        recipe = load_recipe(name)
        network = rewrite(model_of(recipe), recipe.rewrite)
        _, plan = planned(network, own_section(recipe), recipe.data.resolution)
        target = load_target("onnxruntime-cpu")
        return needed_space(recipe, Size.of_plan(plan), plan, [target]).folders["exports"]

    assert exports("w4a8_ptq") >= 0.95 * exports("int8_ptq")
