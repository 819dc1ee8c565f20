import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from reference import relative_error
from rich.console import Console
from tiny import image_folder

import care_compress
from care_compress.cli import main
from care_compress.data.loader import BadImages, Batch
from care_compress.data.samples import spread_indices
from care_compress.data.sources import open_samples
from care_compress.errors import DataError
from care_compress.evaluate.accuracy import measure_accuracy
from care_compress.model.checkpoint import save_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import DataSection
from care_compress.runtime.artifact import open_predictor
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.tasks.classification import Classification, count_correct

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
CLI = [sys.executable, "-m", "care_compress"]


def cli(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300)


def said_by(
    capsys: pytest.CaptureFixture[str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    """The same command in this process, which has imported everything already."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return subprocess.CompletedProcess(arguments, ended.value.code, *capsys.readouterr())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "four classes.safetensors"
    save_checkpoint(care_compress.build_model("care_nano", 4), path, {})
    return path


def test_the_default_recipe_quantizes_and_loses_next_to_nothing(tmp_path: Path) -> None:
    few = "quantize.qat.max_steps=20"
    kinds = "export.targets=[openvino-cpu, onnxruntime-cpu, tensorrt-jetson-orin]"  # one of each
    done = cli("quantize", "int8_qat", "--runs", str(tmp_path), "--set", few, "--set", kinds)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "libraries' warnings about themselves are not the user's business"
    results = json.loads((tmp_path / "int8_qat" / "results.json").read_text())
    assert results["precision"] == "int8"
    assert "eval/compare.py fp32 int8_qat" in done.stdout
    assert results["float"]["top1"] == pytest.approx(94.2, abs=0.1), "README's number"
    assert results["candidates"]["ptq"]["drop"] <= 0.3
    assert results["kept"] in results["candidates"]
    assert len(results["data"]["classes"]) >= 16
    assert results["rewrites"][0]["parameters"] > results["rewrites"][-1]["parameters"]
    manifest = json.loads((tmp_path / "int8_qat" / "manifest.json").read_text())
    assert len(manifest["inputs"]["checkpoint"]["sha256"]) == 64
    assert manifest["inputs"]["calibration"]["images"] == 512
    assert manifest["machine"] and results["model"] in manifest["outputs"]


def test_the_fp32_baseline_and_the_float_half_of_int8_score_the_same(tmp_path: Path) -> None:
    quick = ["evaluate.images=256", "export.targets=[]"]
    quiet = Console(quiet=True)
    fp32 = run_recipe(load_recipe("fp32", quick), tmp_path, "fp32", quiet)
    steps = [*quick, "quantize.qat=null", "quantize.calibrate.images=64"]
    int8 = run_recipe(load_recipe("int8_qat", steps), tmp_path, "int8", quiet)
    assert fp32["accuracy"]["top1"] == int8["float"]["top1"], "exact rewrites only"


def test_any_checkpoint_and_folder_by_the_shorthands(
    images: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = said_by(
        capsys, "quantize", "fp32", "--ckpt", str(checkpoint), "--data", str(images), "--res", "32",
        "--name", "mine", "--runs", str(tmp_path), "--set", "export.targets=[]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "mine" / "results.json").read_text())
    assert results["accuracy"]["images"] == 48
    assert results["data"]["classes"] == ["blue", "green", "grey", "red"]
    resolved = yaml.safe_load((tmp_path / "mine" / "recipe.yaml").read_text())
    assert resolved["data"]["resolution"] == 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "int8_qta"], "did you mean int8_qat"),
        (["quantize", "fp32", "--set", "data.resolutoin=3"], "did you mean resolution"),
        (["quantize", "fp32", "--ckpt", "absent.pth"], "absent.pth is not a file"),
        (["quantize", "fp32", "--data", "absent/"], "does not exist"),
        (["quantize", "fp32", "--name", "../elsewhere"], "is no run name"),
        (["quantize", "fp32", "--arch", "care_s0"], "is a care_nano, not a care_s0"),
        (["quantize", "fp32_shapes", "--ckpt", "absent.pth"], "absent.pth is not a file"),
        (["accuracy", "x.tflite", "--data", "builtin:shapes", "--res", "64"], "of no kind"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    done = said_by(capsys, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = cli("quantize", "absent", "--debug", cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_a_class_count_mismatch_stops_before_any_work(images: Path, tmp_path: Path) -> None:
    recipe = load_recipe("fp32", [f"data.source={images}", "data.resolution=32"])
    with pytest.raises(DataError, match=r"model has \d+ classes, the data has 4"):
        run_recipe(recipe, tmp_path, "run", Console(quiet=True))
    assert not (tmp_path / "run" / "results.json").exists()


def test_a_class_missing_from_val_keeps_the_others_in_place(
    images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    shutil.rmtree(copy / "val" / "blue")
    recipe = load_recipe(
        "fp32",
        [
            f"model.checkpoint={checkpoint}", f"data.source={copy}", "data.resolution=32",
            "export.targets=[]",
        ],
    )  # fmt: skip
    results = run_recipe(recipe, tmp_path, "run", Console(quiet=True))
    assert results["data"]["classes"] == ["blue", "green", "grey", "red"]
    assert results["accuracy"]["images"] == 36


def test_a_broken_image_names_itself_or_is_counted(
    images: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "images"
    shutil.copytree(images, copy)
    broken = copy / "val" / "red" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    base = ["quantize", "fp32", "--ckpt", str(checkpoint), "--data", str(copy), "--res", "32"]
    base += ["--set", "export.targets=[]"]
    stopped = said_by(capsys, *base, "--runs", str(tmp_path / "runs"))
    assert stopped.returncode == 2 and "val/red/3.png" in stopped.stderr
    skipped = said_by(capsys, *base, "--skip-bad-images", "--runs", str(tmp_path / "runs"))
    assert skipped.returncode == 0 and "1 images could not be decoded" in skipped.stdout
    results = json.loads((tmp_path / "runs" / "fp32" / "results.json").read_text())
    assert results["accuracy"]["images"] == 47
    assert "val/red/3.png" in next(iter(results["data"]["skipped_images"]))


def test_class_names_are_data_not_markup(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(tmp_path / "images")
    for split in ("train", "val"):
        os.rename(folder / split / "red", folder / split / "[bold]<script>")
    (folder / "val" / "[bold]<script>" / "0.png").write_bytes(b"x")
    done = said_by(
        capsys, "quantize", "fp32", "--ckpt", str(checkpoint), "--data", str(folder), "--res", "32",
        "--runs", str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 2 and "[bold]<script>/0.png" in done.stderr


def test_the_accuracy_script_runs_from_any_directory_without_the_environment(
    images: Path, checkpoint: Path, tmp_path: Path
) -> None:
    if not (ROOT / ".venv").exists():
        pytest.skip("this checkout has no .venv, so there is nothing to fall back on")
    bare = {"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/")}
    system_python = shutil.which("python3", path=bare["PATH"])
    if system_python is None:
        pytest.skip("no system Python beside the environment's")
    done = subprocess.run(
        [
            system_python, str(ROOT / "eval" / "accuracy.py"), str(checkpoint),
            "--data", str(images), "--res", "32", "--json", "out.json",
        ],
        cwd=tmp_path, env=bare, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["images"] == 48


def test_an_onnx_file_scores_like_its_checkpoint(
    images: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = care_compress.load_checkpoint(checkpoint)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.zeros(5, 3, 32, 32),), str(path), dynamo=True, verbose=False)
    sample = torch.randn(7, 3, 32, 32)  # more than one batch of the file's fixed five
    with torch.no_grad():
        assert relative_error(OnnxPredictor(path)(sample), model(sample)) < 1e-5
    scores = []
    for artifact in (checkpoint, path):
        out = tmp_path / "out.json"
        done = said_by(
            capsys, "accuracy", str(artifact), "--data", str(images), "--res", "32",
            "--json", str(out),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        scores.append(json.loads(out.read_text())["top1"])
    assert scores[0] == scores[1]


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """The streaming loop holds the batch it works on and the one that arrives, never more."""
    alive = 0
    peak = 0

    def batches(count: int) -> Iterator[Batch]:
        nonlocal alive, peak
        for _ in range(count):
            pixels = torch.zeros(8, 3, 4, 4)
            alive += 1
            peak = max(peak, alive)

            def gone() -> None:
                nonlocal alive
                alive -= 1

            weakref.finalize(pixels, gone)
            yield Batch(pixels, torch.zeros(8, dtype=torch.int64), torch.arange(8))

    def predict(images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 3)

    accuracy = count_correct(predict, batches(100))
    assert accuracy.images == 800 and peak <= 3


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not beside this checkout")
def test_a_trained_care_s0_on_cifar10_scores_as_published_with_it() -> None:
    """77.37 % with torch's bicubic on all 10,000; ours is Pillow's, on every tenth."""
    data = DataSection(
        source=str(SHARED / "cifar10-imagefolder.zip"), resolution=96, crop_pct=1.0, workers=0
    )
    samples = open_samples(data, "val")
    predict = open_predictor(str(SHARED / "care_s0_cifar10.pth"), torch.device("cpu"))
    assert len(samples) == 10_000 and predict.num_classes == len(samples.classes) == 10
    accuracy = measure_accuracy(
        Classification(),
        predict,
        samples,
        data,
        batch_size=50,
        indices=spread_indices(len(samples), 1000),
        bad=BadImages(),
        console=Console(quiet=True),
    )
    assert accuracy.images == 1000
    assert accuracy.top1 == pytest.approx(78.0, abs=0.3), "measured on these thousand"
