"""The functions of `care_compress`: what the verbs make, and nothing on the console."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import care_compress as cc
from care_compress.cli import main
from care_compress.data.shapes import Shapes
from care_compress.data.sources import open_samples
from care_compress.files import sha256_file
from care_compress.recipe.sections import DataSection

ROOT = Path(__file__).resolve().parent.parent
BUILTIN = "builtin:care_nano_shapes"
FEW = {
    "quantize.calibrate.images": 16,
    "evaluate.images": 120,
    "export.images": 16,
    "export.targets": ["onnxruntime-cpu"],
}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> cc.Result:
    runs = tmp_path_factory.mktemp("runs")
    model = cc.load_checkpoint(BUILTIN)
    return cc.quantize(model, recipe="int8_ptq", settings=FEW, runs=runs)


def test_a_function_makes_what_the_verb_makes(result: cc.Result, tmp_path: Path) -> None:
    settings = [f"{key}={value}" for key, value in FEW.items()]
    given = ["quantize", "int8_ptq", "--runs", str(tmp_path), "--ckpt", BUILTIN]
    with pytest.raises(SystemExit) as ended:
        main([*given, *(part for one in settings for part in ("--set", one))])
    assert ended.value.code == 0
    theirs = tmp_path / "int8_ptq"
    weights = [file.relative_to(theirs) for file in theirs.rglob("*.safetensors")]
    files = [file.relative_to(theirs) for file in theirs.rglob("*.onnx")]
    assert weights and files
    for file in (*weights, *files):
        assert sha256_file(result.path / file) == sha256_file(theirs / file), file


def test_a_result_tells_what_was_found(result: cc.Result) -> None:
    accuracy = result.accuracy
    assert accuracy.images == 120 and accuracy.top1 > 80 and accuracy.top5 >= accuracy.top1
    assert accuracy.drop_ci95 is not None and accuracy.drop is not None
    assert accuracy.drop_ci95[0] <= accuracy.drop <= accuracy.drop_ci95[1]
    assert result.plan is not None
    assert {d.weight.bits for d in result.plan.decisions if d.weight is not None} == {8}
    images = Shapes("val")
    pixels = torch.from_numpy(np.array(images.image(0))).permute(2, 0, 1)[None].float() / 255
    assert result.model(pixels).shape == (1, len(images.classes))
    assert "onnxruntime-cpu" in result._repr_html_() and "int8.onnx" in result._repr_html_()


def test_nothing_is_printed_and_a_second_call_takes_over(
    result: cc.Result, capfd: pytest.CaptureFixture[str]
) -> None:
    lines: list[str] = []
    model = cc.load_checkpoint(BUILTIN)
    runs = result.path.parent
    cc.quantize(model, recipe="int8_ptq", settings=FEW, runs=runs, progress=lines.append)
    assert any("ptq: unchanged, taken over" in line for line in lines)
    assert capfd.readouterr() == ("", "")


def test_other_weights_make_another_run(result: cc.Result, tmp_path: Path) -> None:
    model = cc.load_checkpoint(BUILTIN)
    with torch.no_grad():
        model.head.fc.weight.add_(0.01)
    runs = result.path.parent
    lines: list[str] = []
    before = sha256_file(result.path / "ptq" / "model.safetensors")
    other = cc.quantize(
        model, recipe="int8_ptq", settings=FEW, runs=runs, name="other", progress=lines.append
    )
    assert sha256_file(other.path / "ptq" / "model.safetensors") != before
    assert len(list((runs / ".checkpoints").iterdir())) == 2


def test_exports_are_made_when_asked_for(result: cc.Result) -> None:
    assert set(result.exports) == {"onnxruntime-cpu"}
    there = result.exports["onnxruntime-cpu"]
    assert result.export("onnxruntime-cpu") == there
    made = result.export("tensorrt-gpu")
    assert made.is_file() and set(result.exports) == {"onnxruntime-cpu", "tensorrt-gpu"}
    assert result.run.results["exports"]["tensorrt-gpu"]["models"]["int8"]["holds"]
    with pytest.raises(cc.CareError, match="there is no target 'openvino-cup'"):
        result.export("openvino-cup")


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("int8_qqq", "there is no recipe 'int8_qqq'"),
        ({"base": "int8_ptq", "sed": 1}, "unknown key sed"),
        ({"base": "int8_ptq", "seed": object()}, "more than plain values"),
        ("missing.yaml", "does not exist"),
    ],
)
def test_a_wrong_recipe_is_a_care_error(recipe: object, says: str, tmp_path: Path) -> None:
    with pytest.raises(cc.CareError, match=says):
        cc.quantize(BUILTIN, recipe=recipe, runs=tmp_path)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_a_run_stays_in_its_folder(tmp_path: Path) -> None:
    with pytest.raises(cc.CareError, match="is no run name"):
        cc.quantize(BUILTIN, recipe="int8_ptq", runs=tmp_path / "runs", name="../elsewhere")
    assert not any(tmp_path.iterdir())


def test_images_of_ones_own_need_a_resolution(tmp_path: Path) -> None:
    with pytest.raises(cc.CareError, match="give resolution=224"):
        cc.quantize(BUILTIN, data=tmp_path, recipe="int8_ptq", runs=tmp_path)


def test_a_recipe_may_be_a_mapping_or_a_recipe() -> None:
    from care_compress.api import _load

    plain = cc.load_recipe("int8_ptq", ["seed=7"])
    assert _load({"base": "int8_ptq"}, {"seed": 7}) == plain
    assert _load(plain, {}) == plain


class Drawn:
    """A dataset as torch has them, over the included validation images."""

    def __init__(self, images: int) -> None:
        self.samples = open_samples(DataSection(), "val")
        places = range(0, len(self.samples), len(self.samples) // images)
        self.places = list(places)[:images]
        self.targets = self.samples.labels[self.places].tolist()
        self.classes = self.samples.classes

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        return self.samples.image(self.places[place]), self.targets[place]


def test_images_in_memory_are_quantized_on(tmp_path: Path) -> None:
    drawn = Drawn(160)
    settings = {**FEW, "quantize.calibrate.method": "random", "export.targets": []}
    said = {"train": drawn, "val": drawn}
    result = cc.quantize(BUILTIN, said, "int8_ptq", resolution=64, settings=settings, runs=tmp_path)
    assert result.accuracy.top1 > 85
    # Who has not been handed the images cannot go on with the run, and is told so.
    asked = [sys.executable, "-m", "care_compress", "quantize", str(result.path / "recipe.yaml")]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path, env=os.environ)
    assert done.returncode == 2
    assert "handed over by a Python program" in " ".join(done.stderr.split())


@pytest.fixture
def somewhere(tmp_path: Path) -> Iterator[Path]:
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def test_the_guide_runs_and_names_everything(
    somewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guide = (ROOT / "docs" / "API.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", guide, flags=re.S)
    found: dict[str, Any] = {}
    exec(compile(example, "docs/API.md", "exec"), found)
    said = capsys.readouterr().out
    assert "below the float model" in said and "onnxruntime-cpu" in said
    (verdict,) = found["found"].verdicts
    assert verdict.target == "onnxruntime-cpu" and verdict.candidate == "int8_ptq"
    assert verdict.text[:20] in found["found"]._repr_html_()
    assert (somewhere / "runs" / "int8_ptq" / "compare.json").is_file()
    for name in cc.__all__:
        assert re.search(rf"^\|.*`{name}\b", guide, flags=re.M), f"{name} is not in the guide"
        assert getattr(cc, name) is not None
