"""Disks that are full or read-only, files that are damaged: named in one line, then mended."""

import functools
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import Product, assert_same, flip_bit, kill_at_border, small_recipe, truncate


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without workers: what they share is a file too, and a limit on files would end them."""
    folder = tmp_path_factory.mktemp("recipe")
    plain = {"prescale": "trained", "equalize": "off"}
    return small_recipe(folder, ["onnxruntime-cpu", "openvino-cpu"], **plain)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder])
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here (not root): RLIMIT_FSIZE stands in for it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(disk: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def one_line(process: Any, *wanted: str) -> None:
    """Exit code 2, one line that says all this, and nothing half written."""
    assert process.wait() == 2, process.said
    assert len(process.errors) == 1, process.said
    for text in wanted:
        assert text in process.errors[0]


def _room_at_first() -> None:
    """The room was there when the run began; then others took it."""
    import care_compress.pipeline as pipeline

    pipeline.check_space = lambda *_: None


# Of what a run takes: it fills in training, then in PTQ, QAT and the exports.
@pytest.mark.parametrize("share", [0.01, 0.25, 0.45, 0.52, 0.7, 0.85, 0.95, 0.985])
def test_a_full_disk_is_named_and_with_room_the_run_goes_on(
    recipe: Path,
    finished: Product,
    small_disk: Path,
    tmp_path: Path,
    share: float,
    undisturbed: dict[str, Any],
) -> None:
    whole = sum(file.stat().st_size for file in finished.run.rglob("*") if file.is_file())
    remount(small_disk, f"size={int(share * whole)}")
    product = Product(recipe, small_disk / "runs", aside=tmp_path / "aside")
    one_line(product.start(_room_at_first), "cannot write", "Fix: make room")
    assert not list(small_disk.rglob(".*.tmp"))
    remount(small_disk, "size=200m")
    assert_same(product.finish(), undisturbed)


def _limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    ("done", "kilobytes"),
    [
        ("", 1),  # the recipe
        ("", 100),  # the state of the training
        ("train", 1000),  # PTQ's model
        ("ptq", 3000),  # the state of QAT
        ("evaluate qat", 400),  # an ONNX file
        ("export onnxruntime-cpu", 400),  # OpenVINO's weights
    ],
)
def test_a_file_that_cannot_grow_is_named_and_the_run_goes_on(
    product: Product, undisturbed: dict[str, Any], done: str, kilobytes: int
) -> None:
    if done:
        assert product.start(kill_at_border(done, True)).wait() == -signal.SIGKILL
    process = product.start(functools.partial(_limit, kilobytes * 1024))
    one_line(process, "cannot write", "Fix: make room")
    assert not list(product.runs.rglob(".*.tmp"))
    assert_same(product.finish(), undisturbed)


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_disk_is_named(
    recipe: Path, small_disk: Path, tmp_path: Path, begun: bool, undisturbed: dict[str, Any]
) -> None:
    remount(small_disk, "size=200m")
    product = Product(recipe, small_disk / "runs", aside=tmp_path / "aside")
    if begun:
        product.start(kill_at_border("ptq", True)).wait()
    remount(small_disk, "ro")
    one_line(product.start(), "Read-only file system")
    remount(small_disk, "rw")
    assert_same(product.finish(), undisturbed)


def test_a_folder_without_write_permission_is_named(product: Product) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere; the read-only disk stands for this")
    product.runs.mkdir(parents=True)
    product.runs.chmod(0o555)
    one_line(product.start(), "cannot use", "Permission denied")


ARTIFACTS = [
    "float/model.safetensors",
    "calibration.json",
    "ptq/model.safetensors",
    "ptq/tuning.json",
    "qat/model.safetensors",
    "exports/onnxruntime-cpu/int8.onnx",
    "exports/openvino-cpu/int8.xml",
    "exports/openvino-cpu/int8.bin",
    "exports/openvino-cpu/export.json",
]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, (flip_bit, truncate)[number % 2]) for number, name in enumerate(ARTIFACTS)]
    + [("manifest.json", truncate), ("qat/model.safetensors", flip_bit)],
)
def test_a_damaged_file_is_named_and_made_again_only_when_asked(
    recipe: Path,
    finished: Product,
    tmp_path: Path,
    undisturbed: dict[str, Any],
    name: str,
    damage: Callable[[Path], None],
) -> None:
    product = Product(recipe, tmp_path / "runs")
    shutil.copytree(finished.runs, product.runs)
    damage(product.run / name)
    damaged = (product.run / name).read_bytes()
    one_line(product.start(), name, "--repair")
    assert (product.run / name).read_bytes() == damaged, "nothing is done to it unasked"
    assert_same(product.finish("--repair"), undisturbed)
    assert_same(product.finish(), undisturbed)


@pytest.mark.parametrize("damage", [flip_bit, truncate])
@pytest.mark.parametrize("stage", ["train", "qat"])
def test_a_damaged_training_state_is_named_and_the_one_before_it_taken(
    product: Product, undisturbed: dict[str, Any], stage: str, damage: Callable[[Path], None]
) -> None:
    assert product.start(kill_at_border(stage, False)).wait() == -signal.SIGKILL
    state = product.run / {"train": "float", "qat": "qat"}[stage] / "train_state.pt"
    damage(state)
    one_line(product.start(), "train_state.pt", "--repair")
    assert_same(product.finish("--repair"), undisturbed)
