"""A sweep whose driver is killed, and one that loses a node, end with what an undisturbed one leaves."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from faulty import small_recipe
from rich.console import Console

from care_compress.files import read_json
from care_compress.pipeline import run_recipe
from care_compress.sweep.driver import SweepOptions, run_sweep
from care_compress.sweep.sections import read_sweep

pytest.importorskip("ray", reason="needs the ray extra")
clusters = pytest.importorskip("ray.cluster_utils")

LONGEST = 600  # seconds of one sweep
FILES = ("ptq/model.safetensors", "qat/model.safetensors", "exports/onnxruntime-cpu/int8.onnx")
SMALL = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trials of a recipe that trains a float model for both, and each by itself again."""
    folder = tmp_path_factory.mktemp("asked")
    recipe = small_recipe(folder, ["onnxruntime-cpu"])
    path = folder / "s.yaml"
    rates = {"quantize.qat.learning_rate": [1e-5, 2e-5]}
    path.write_text(yaml.safe_dump({"recipes": [str(recipe)], "overrides": rates}))
    return path


def left(runs: Path) -> dict[str, str]:
    """Digests of every trial's models, and that all trials are through."""
    rows = read_json(runs / "s" / "sweep.json")["trials"]
    assert [row["status"] for row in rows] == ["finished"] * 2, rows
    return {
        f"{row['name']}/{name}": hashlib.sha256(
            (runs / "s" / row["name"] / name).read_bytes()
        ).hexdigest()
        for row in rows
        for name in FILES
    }


def start(asked: Path, runs: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "care_compress", "sweep", str(asked), "--runs", str(runs)]
    with (asked.parent / "said.log").open("ab") as said:
        return subprocess.Popen(command, stdout=said, stderr=said)


@pytest.fixture(scope="module")
def undisturbed(asked: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    runs = tmp_path_factory.mktemp("undisturbed")
    assert start(asked, runs).wait(LONGEST) == 0
    yield left(runs)


def until(there: str, runs: Path, count: int, process: subprocess.Popen[bytes] | None) -> None:
    """Wait for so many files of a kind; not longer than the sweep goes on."""
    ends = time.monotonic() + LONGEST
    while len(list((runs / "s").glob(there))) < count:
        assert time.monotonic() < ends
        assert process is None or process.poll() is None, "it was through before"
        time.sleep(0.05)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_is_killed_goes_on(
    stop: signal.Signals, asked: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    for moment in ("float-*/float/train_state.pt", "*/qat/train_state.pt"):
        process = start(asked, tmp_path)
        until(moment, tmp_path, 1, process)
        os.kill(process.pid, stop)
        assert process.wait(60) == (-stop if stop == signal.SIGKILL else 128 + stop)
    assert start(asked, tmp_path).wait(LONGEST) == 0
    assert left(tmp_path) == undisturbed
    assert len(list((tmp_path / "s").glob("*/float/train_state.pt"))) == 1, "trained once"


def test_a_node_that_is_lost_while_both_train(
    asked: Path, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    nodes = clusters.Cluster(initialize_head=True, head_node_args=SMALL)
    second = nodes.add_node(**SMALL)

    def lose() -> None:
        until("*/qat/train_state.pt", tmp_path, 2, None)
        nodes.remove_node(second, allow_graceful=False)

    losing = threading.Thread(target=lose)
    losing.start()
    try:
        sweep, options = read_sweep(str(asked)), SweepOptions(str(nodes.address))
        assert run_sweep(sweep, tmp_path, options, run_recipe, Console(quiet=True)) == 0
        losing.join()
    finally:
        nodes.shutdown()
    assert left(tmp_path) == undisturbed
