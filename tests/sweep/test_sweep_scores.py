"""Accuracy on Ray's workers: the file that one process writes, whatever becomes of a worker."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from every_task import painted
from quantized import care
from rich.console import Console
from tiny import with_a_broken_image
from typer.testing import CliRunner

from care_compress import cli
from care_compress.errors import BadImageError, CareError, RunError, TargetError
from care_compress.evaluate import scoring
from care_compress.evaluate.scoring import ScoringJob, measure_artifact, opened
from care_compress.model.care import build_model
from care_compress.model.checkpoint import save_checkpoint
from care_compress.recipe.sections import DataSection
from care_compress.sweep import scores as on_nodes
from care_compress.sweep.cluster import Cluster, workers_at
from care_compress.sweep.scores import scores_on
from care_compress.tasks.known import TASKS, task_called

pytest.importorskip("ray.cluster_utils", reason="needs the ray extra")

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("file") / "four.safetensors"
    save_checkpoint(care(4), file, {})
    return str(file)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSection:
    return with_a_broken_image(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(artifact: str, data: DataSection, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("whole") / "out.json"
    measure_artifact(artifact, data, None, 7, file, QUIET)
    return file.read_bytes()


def test_pieces_of_images_give_the_bytes_of_one_process(
    artifact: str, data: DataSection, whole: bytes, cluster: Cluster, tmp_path: Path
) -> None:
    file = tmp_path / "out.json"
    measure_artifact(artifact, data, None, 7, file, QUIET, scores_on(cluster))
    assert file.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_pieces_of_masks_and_boxes_give_the_bytes_of_one_process(
    task: str, cluster: Cluster, tmp_path: Path
) -> None:
    source = painted(tmp_path / "images", task, train=1, val=9)
    data = DataSection(source=str(source), resolution=64, crop_pct=1.0, workers=0)
    torch.manual_seed(0)
    artifact = tmp_path / "model.safetensors"
    classes = len(task_called(task).samples(data, "val").classes)
    save_checkpoint(build_model("care_nano", classes, kind=TASKS[task].kind), artifact, {})
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    measure_artifact(str(artifact), data, None, 2, one, QUIET)
    measure_artifact(str(artifact), data, None, 2, many, QUIET, scores_on(cluster))
    assert one.read_bytes() == many.read_bytes()


def test_a_worker_that_dies_in_a_piece_changes_nothing(
    artifact: str,
    data: DataSection,
    whole: bytes,
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    died, real = tmp_path / "died", on_nodes.score_part

    def dies_once(job: ScoringJob, part: on_nodes.Part) -> Any:
        if part[0] == 14 and not died.exists():
            died.touch()
            os.abort()
        return real(job, part)

    monkeypatch.setattr(on_nodes, "score_part", dies_once)
    file = tmp_path / "out.json"
    measure_artifact(artifact, data, None, 7, file, QUIET, scores_on(cluster))
    assert died.exists() and file.read_bytes() == whole


def test_an_evaluation_goes_on_with_ray_where_it_was_interrupted_without(
    artifact: str,
    data: DataSection,
    whole: bytes,
    cluster: Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file, real, scored = tmp_path / "out.json", scoring.count, iter(range(3))

    def stops(task: Any, predict: Any, batches: Any) -> Any:
        if next(scored, None) is None:
            raise KeyboardInterrupt
        return real(task, predict, batches)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "count", stops)
        measure_artifact(artifact, data, None, 7, file, QUIET)
    measure_artifact(artifact, data, None, 7, file, Console(), scores_on(cluster))
    assert "going on after 21 images" in capsys.readouterr().out
    assert file.read_bytes() == whole


def test_what_a_worker_meets_is_the_users_one_line(
    artifact: str, data: DataSection, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = data.model_copy(update={"skip_bad_images": False})
    with pytest.raises(BadImageError, match="green/3.png"):
        measure_artifact(artifact, strict, None, 7, None, QUIET, scores_on(cluster))

    def fails(job: ScoringJob, part: on_nodes.Part) -> Any:
        raise ValueError("no such thing")

    monkeypatch.setattr(on_nodes, "score_part", fails)
    with pytest.raises(TargetError, match=r"images \d+ to \d+ was not done.*no such thing"):
        measure_artifact(artifact, data, None, 7, None, QUIET, scores_on(cluster))


def test_a_node_with_another_file_or_other_images_is_told(artifact: str, data: DataSection) -> None:
    listing = task_called("classification").samples(data, "val").fingerprint()
    job = ScoringJob(artifact, "another", data, listing, 8, "cpu")
    with pytest.raises(RunError, match=f"another {artifact}"):
        opened(job, torch.get_num_threads())
    same = ScoringJob(artifact, scoring.digest_of(Path(artifact)), data, "another", 8, "cpu")
    with pytest.raises(RunError, match=f"another {data.source}"):
        opened(same, torch.get_num_threads())


def test_an_address_that_nobody_answers_is_one_line_before_work_starts(tmp_path: Path) -> None:
    arguments = ["accuracy", "builtin:care_nano_shapes", "--data", "builtin:shapes", "--res", "64"]
    arguments += ["--json", str(tmp_path / "out.json"), "--ray", "127.0.0.1:1"]
    done = CliRunner().invoke(cli.app, arguments)
    assert isinstance(done.exception, TargetError) and "nobody answers" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_ray_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CareError, match="give one of them"), workers_at("local"):
        pass
