"""``init`` and ``recipes --copy``: a recipe of one's own, tried before it is written."""

import io
import re
import sys
from pathlib import Path

import pytest
from quantized import care
from tiny import CLASSES, image_folder

from care_compress.cli import main
from care_compress.model.checkpoint import save_checkpoint
from care_compress.recipe.recipe import RECIPES_DIR, load_recipe

BUILTIN = "builtin:care_nano_shapes"


class Keyboard(io.StringIO):
    """Somebody at a terminal who types these lines."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO())


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", Keyboard("".join(f"{line}\n" for line in lines)))


def code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(list(arguments))
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four classes, and images of them: divided, not divided, one class short."""
    folder = tmp_path_factory.mktemp("mine")
    save_checkpoint(care(4), folder / "four.safetensors", {})
    images = image_folder(folder / "images")
    (folder / "whole").symlink_to(images / "train")
    (folder / "three").mkdir()
    for name in CLASSES[1:]:
        (folder / "three" / name).symlink_to(images / "train" / name)
    (folder / "classes.txt").write_text("\n".join(CLASSES))
    return folder


def test_the_included_model_needs_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("init", "--yes") == 0
    shown = capsys.readouterr().out
    assert "care_nano, 40 classes" in shown
    assert "care-compress plan my_int8_qat.yaml" in shown, "what to type next"
    recipe, shipped = load_recipe("my_int8_qat.yaml"), load_recipe("int8_qat")
    assert recipe.quantize == shipped.quantize and recipe.data == shipped.data
    assert recipe.export.targets == ("openvino-cpu",)
    assert code("plan", "my_int8_qat.yaml") == 0
    assert "recipe: my_int8_qat over int8_qat over int8_ptq" in capsys.readouterr().out
    text = Path("my_int8_qat.yaml").read_text()
    assert re.search("^base: int8_qat #", text, re.M) and "learning_rate" not in text


def test_a_folder_of_images_and_a_checkpoint_of_ones_own(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--ckpt", str(mine / "four.safetensors"), "--data", str(mine / "images")]
    more = ["--res", "32", "--base", "int8_ptq", "--target", "onnxruntime-cpu", "--crop", "1.0"]
    assert code("init", *given, *more, "--out", "sub/own.yaml") == 0, "all is given: no question"
    recipe = load_recipe("sub/own.yaml")
    assert recipe.data.source == str(mine / "images") and recipe.data.val_fraction is None
    assert (recipe.data.resolution, recipe.data.crop_pct) == (32, 1.0)
    assert recipe.quantize is not None and recipe.quantize.target == "onnxruntime-cpu"
    assert recipe.export.targets == ("onnxruntime-cpu",)
    assert code("plan", "sub/own.yaml") == 0
    capsys.readouterr()

    given[-1] = str(mine / "whole")
    assert code("init", *given, *more, "--out", "whole.yaml") == 0
    assert "10% will be kept for validation" in capsys.readouterr().out
    assert load_recipe("whole.yaml").data.val_fraction == 0.1

    given[-1] = str(mine / "three")
    assert code("init", *given, *more, "--out", "three.yaml") == 2
    assert "--classes FILE" in capsys.readouterr().err and not Path("three.yaml").exists()
    classes = ["--classes", str(mine / "classes.txt"), "--val-fraction", "0.25"]
    assert code("init", *given, *more, *classes, "--out", "three.yaml") == 0
    data = load_recipe("three.yaml").data
    assert (data.classes, data.val_fraction) == (str(mine / "classes.txt"), 0.25)


def test_a_wrong_answer_is_told_and_asked_again(
    mine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [
        *("nowhere.pth", str(mine / "four.safetensors")),
        *("nowhere", "builtin:shapes", str(mine / "images")),
        *("8", "big", "32"),
        *("fp32_shapes", "int8", "w4a4_ptq"),
        *("openvino", "tensorrt-gpu"),  # it has no 4-bit activations: asked again from the method
        "own.txt",
        "own.yaml",
        *("int8_qat", "", "own.yaml"),
    ]
    typed(monkeypatch, *answers)
    assert code("init") == 0
    shown = capsys.readouterr().out
    for told in (
        "nowhere.pth is not a file",
        "data.source nowhere does not exist",
        "the model has 4 classes, the data has 40",
        "got 8",
        "'big' is no resolution",
        "fp32_shapes is no shipped recipe that starts from a checkpoint",
        "did you mean int8_",
        "there is no target 'openvino'",
        "'own.txt' is no .yaml file",
    ):
        assert told in shown, told
    assert re.search("export.targets: .*tensorrt-gpu has no 4-bit", shown)
    recipe = load_recipe("own.yaml")
    assert recipe.origins.chain("own") == ("own", "int8_qat", "int8_ptq")
    assert recipe.model.checkpoint == str(mine / "four.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nobody can be asked here for --ckpt, --data, --res, --base, --target, --out"),
        (["--ckpt", BUILTIN, "--res", "64"], "asked here for --data, --base, --target, --out"),
        (["--yes", "--ckpt", "nowhere.pth"], "nowhere.pth is not a file"),
        (["--yes", "--data", "nowhere"], "data.source nowhere does not exist"),
        (["--yes", "--res", "8"], "--res: resolution: .*got 8"),
        (["--yes", "--crop", "0"], "data.crop_pct: .*got 0"),
        (["--yes", "--target", "openvino"], "there is no target 'openvino'"),
        (["--yes", "--base", "int8_qta"], "did you mean int8_qat"),
        (["--yes", "--base", "w4a4_ptq", "--target", "tensorrt-gpu"], "no 4-bit activations"),
        (["--yes", "--out", "own.txt"], "'own.txt' is no .yaml file"),
    ],
)
def test_wrong_flags_are_one_line_and_nothing_is_written(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert code("init", *arguments) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and re.search(message, told), told
    assert not list(Path().iterdir())


def test_nothing_is_overwritten_unasked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("own.yaml")
    path.write_text("mine")
    assert code("init", "--yes", "--out", "own.yaml") == 2
    assert "own.yaml is there already" in capsys.readouterr().err
    flags = ["--ckpt", BUILTIN, "--data", "builtin:shapes", "--res", "64", "--base", "fp32"]
    flags += ["--target", "openvino-cpu", "--out", "own.yaml"]
    typed(monkeypatch, "n")
    assert code("init", *flags) == 2 and path.read_text() == "mine"
    typed(monkeypatch, "y")
    assert code("init", *flags) == 0 and load_recipe("own.yaml").precision == "fp32"
    path.write_text("mine")
    assert code("init", "--yes", "--force", "--out", "own.yaml") == 0
    assert load_recipe("own.yaml").precision == "int8"


def test_questions_without_an_end_write_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typed(monkeypatch, BUILTIN)
    assert code("init") == 2
    assert "nothing was written" in capsys.readouterr().err and not list(Path().iterdir())


def test_names_that_yaml_would_read_as_something_else_stay_names(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = Path("a: b # c, [d]\n'e'")
    strange.symlink_to(mine / "images")
    given = ["--ckpt", str(mine / "four.safetensors"), "--data", str(strange), "--res", "32"]
    assert code("init", "--yes", *given, "--out", "own.yaml") == 0
    assert load_recipe("own.yaml").data.source == str(strange)


def test_a_recipe_beside_the_new_one_is_the_base_that_is_tried(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("int8_qat.yaml").write_text(
        "base: int8_ptq\nquantize: {rules: [{role: nothing, weight: 8}]}"
    )
    assert code("init", "--yes", "--out", "own.yaml") == 2
    assert re.search("rule 1.*nothing", capsys.readouterr().err)
    assert code("init", "--yes", "--out", "int8_qat.yaml", "--force") == 0
    assert load_recipe("int8_qat.yaml").quantize == load_recipe("int8_qat").quantize


def test_a_copy_of_all_recipes_works_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert code("recipes", "--copy", "copy") == 0
    assert "care-compress plan copy/int8_qat.yaml" in capsys.readouterr().out
    copied = {path.relative_to("copy") for path in Path("copy").rglob("*") if path.is_file()}
    there = {path.relative_to(RECIPES_DIR) for path in RECIPES_DIR.rglob("*.yaml")}
    assert copied == {*there, Path("README.md"), Path("targets/README.md")}
    base = Path("copy/int8_ptq.yaml")
    base.write_text(base.read_text().replace("resolution: 64", "resolution: 96"))
    assert code("plan", "copy/int8_fastact_qat.yaml") == 0
    assert "96x96" in capsys.readouterr().out, "over its neighbour, not over the shipped one"

    (Path("copy") / "fp32.yaml").unlink()
    assert code("recipes", "--copy", "copy") == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert not (Path("copy") / "fp32.yaml").exists() and "96" in base.read_text()
