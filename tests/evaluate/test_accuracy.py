"""An evaluation of a whole image set: interrupted or shared out, the numbers are the same."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from graphs import onnx_file
from quantized import care
from rich.console import Console
from tiny import image_folder, with_a_broken_image

from care_compress.data.sources import open_samples
from care_compress.errors import RunError
from care_compress.evaluate import scoring
from care_compress.evaluate.accuracy import own_share
from care_compress.evaluate.scoring import measure_artifact
from care_compress.model.checkpoint import save_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import DataSection
from care_compress.run.processes import World

ROOT = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(onnx_file(tmp_path_factory.mktemp("file") / "four.onnx"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSection:
    return with_a_broken_image(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(artifact: str, data: DataSection, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an undisturbed evaluation in one process writes."""
    file = tmp_path_factory.mktemp("whole") / "out.json"
    measure_artifact(artifact, data, None, 8, file, QUIET)
    assert not file.with_name("out.json.progress").exists(), "of no use any more"
    return json.loads(file.read_text())


def stop_after(batches: int, error: type[BaseException], patch: pytest.MonkeyPatch) -> list[int]:
    """End the evaluation before this batch; the sizes of the batches that were scored."""
    scored: list[int] = []
    real = scoring.count

    def count(task: Any, predict: Any, given: Any) -> Any:
        if len(scored) == batches:
            raise error
        (batch,) = given
        scored.append(len(batch.labels))
        return real(task, predict, given)

    patch.setattr(scoring, "count", count)
    return scored


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_evaluation_goes_on_and_ends_with_the_same_numbers(
    error: type[BaseException],
    artifact: str,
    data: DataSection,
    whole: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, error, patch)
        with pytest.raises(error):
            measure_artifact(artifact, data, None, 8, file, Console())
    assert not file.exists(), "half an evaluation is no result"
    if error is KeyboardInterrupt:
        assert "the same command goes on from here" in capsys.readouterr().out
    with pytest.MonkeyPatch.context() as patch:
        scored = stop_after(99, error, patch)
        measure_artifact(artifact, data, None, 8, file, Console())
    assert scored == [8, 8, 8], "the first 24 images are not looked at again"
    assert "going on after 24 images" in capsys.readouterr().out
    assert json.loads(file.read_text()) == whole
    assert len(whole["skipped_images"]) == 1 and whole["images"] == 47
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


KILLED = """
import os, signal, sys
from care_compress.cli import main
from care_compress.evaluate import scoring

scoring.SECONDS = 0.0
real, batches = scoring.count, iter(range(4))
def count(task, predict, batch):
    if next(batches, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(task, predict, batch)
scoring.count = count
main(sys.argv[1:])
"""


def test_a_killed_evaluation_goes_on_from_its_last_state(
    artifact: str, data: DataSection, whole: Any, tmp_path: Path
) -> None:
    options = [
        "accuracy", artifact, "--data", data.source, "--res", "32", "--crop", "1.0",
        "--batch", "8", "--skip-bad-images", "--set", "workers=0", "--json", "out.json",
    ]  # fmt: skip
    killed = subprocess.run([sys.executable, "-c", KILLED, *options], cwd=tmp_path, check=False)
    assert killed.returncode == -9
    assert json.loads((tmp_path / "out.json.progress").read_text())["done"] == 32
    measure_artifact(artifact, data, None, 8, tmp_path / "out.json", QUIET)
    assert json.loads((tmp_path / "out.json").read_text()) == whole


@pytest.mark.parametrize("change", ["model", "images", "batch", "damage"])
def test_the_state_of_another_evaluation_is_not_continued(
    change: str,
    artifact: str,
    data: DataSection,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "out.json"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, KeyboardInterrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            measure_artifact(artifact, data, None, 8, file, QUIET)
    if change == "damage":
        (tmp_path / "out.json.progress").write_text('{"evaluation": ')
    other = str(onnx_file(tmp_path / "other.onnx", classes=7 if change == "images" else 4))
    if change == "model":
        content = Path(other).read_bytes()
        Path(other).write_bytes(content.replace(b"classifier", b"classifies"))
    images, batch = (20 if change == "images" else None), (16 if change == "batch" else 8)
    chosen = other if change == "model" else artifact
    found = measure_artifact(chosen, data, images, batch, file, Console())
    assert "starting anew" in capsys.readouterr().out
    assert found.images == {"images": 20}.get(change, 47)


def test_other_images_of_the_same_names_are_another_evaluation(
    artifact: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, file = image_folder(tmp_path / "images", per_class=8), tmp_path / "out.json"
    data = DataSection(source=str(folder), resolution=32, crop_pct=1.0, workers=0)
    with pytest.MonkeyPatch.context() as patch:
        stop_after(1, KeyboardInterrupt, patch)
        with pytest.raises(KeyboardInterrupt):
            measure_artifact(artifact, data, None, 8, file, QUIET)
    (folder / "val" / "red" / "0.png").write_bytes(
        (folder / "val" / "blue" / "0.png").read_bytes() + b"another one"
    )
    measure_artifact(artifact, data, None, 8, file, Console())
    assert "starting anew" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_named_before_the_work(
    artifact: str, data: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = stop_after(99, KeyboardInterrupt, monkeypatch)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write"):
        measure_artifact(artifact, data, None, 8, tmp_path / "file" / "out.json", QUIET)
    assert not scored


def test_without_a_file_nothing_is_left_behind(
    artifact: str,
    data: DataSection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    stop_after(2, KeyboardInterrupt, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        measure_artifact(artifact, data, None, 8, None, Console())
    assert "with --json FILE" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "batch", "size"), [(47, 8, 2), (47, 8, 3), (3, 8, 4), (0, 8, 2)]
)
def test_shares_are_whole_batches_and_together_everything(
    images: int, batch: int, size: int
) -> None:
    shares = [own_share(range(images), batch, World(rank, size)) for rank in range(size)]
    assert [index for share in shares for index in share] == list(range(images))
    assert all(share[0] % batch == 0 for share in shares if len(share))


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launch, "--master-port", str(port), *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_two_processes_find_what_one_does(
    artifact: str, data: DataSection, whole: Any, tmp_path: Path
) -> None:
    done = torchrun(
        str(ROOT / "eval" / "accuracy.py"), artifact, "--data", data.source, "--res", "32",
        "--crop", "1.0", "--batch", "8", "--skip-bad-images", "--set", "workers=0",
        "--json", "out.json", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text()) == whole
    assert done.stdout.count("top-1") == 1, "one of them speaks"
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_a_recipe_in_two_processes_evaluates_as_in_one(tmp_path: Path, data: DataSection) -> None:
    """Each process takes its share of the images; the main one knows the bad ones of both."""
    save_checkpoint(care(4), tmp_path / "four.safetensors", {})
    settings = [
        f"model.checkpoint={tmp_path / 'four.safetensors'}", f"data.source={data.source}",
        "data.resolution=32", "data.crop_pct=1.0", "data.workers=0", "data.skip_bad_images=true",
        "evaluate.batch_size=8", "quantize.calibrate.images=16", "export.targets=[]",
    ]  # fmt: skip
    alone = run_recipe(load_recipe("int8_ptq", settings), tmp_path / "one", "run", QUIET)
    options = [part for setting in settings for part in ("--set", setting)]
    done = torchrun(
        "-m", "care_compress", "quantize", "int8_ptq", "--name", "run", "--runs", "two", *options,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    both = json.loads((tmp_path / "two" / "run" / "results.json").read_text())
    for key in ("accuracy", "float"):
        assert both[key] == alone[key]
    assert both["candidates"]["ptq"]["sqnr_db"] == pytest.approx(
        alone["candidates"]["ptq"]["sqnr_db"]
    )
    assert both["data"]["skipped_images"] == alone["data"]["skipped_images"] != {}
    assert both["accuracy"]["images"] == 47 == len(open_samples(data, "val")) - 1
