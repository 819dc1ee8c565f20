"""The figures of one artifact: all of them, of this file, with the state of the machine."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphs import SIZE, onnx_file
from rich.console import Console

from care_compress import machine
from care_compress.cli import main
from care_compress.errors import TargetError
from care_compress.evaluate.latency import (
    Latency,
    LatencyPlan,
    Setting,
    SpeedOptions,
    measure_speed,
)
from care_compress.libraries import openvino_core
from care_compress.runtime.memory import peak_memory

QUICK = LatencyPlan(seconds=0.01, least_runs=6, warmup=1, turns=3)
QUIET = Console(quiet=True)
MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    onnx_file(folder / "small.onnx")
    onnx_file(folder / "large.onnx", classes=4000)  # 49 MB
    onnx_file(folder / "free.onnx", size=None)
    return folder


def test_memory_is_that_of_the_model(folder: Path) -> None:
    small, large = (
        peak_memory(folder / name, size=(SIZE, SIZE)) for name in ("small.onnx", "large.onnx")
    )
    weights = (folder / "large.onnx").stat().st_size
    assert 0 < small < 20 * MEGABYTE, "nothing of the runtime or of this process is counted"
    assert weights < large - small < 4 * weights


WIDE = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[4, 3, H, W] image) => (float[4, 3] logits) {
  grown = Exp(image)
  means = GlobalAveragePool(grown)
  logits = Flatten(means)
}
"""


def test_memory_is_that_of_running_at_the_batch_of_the_file(tmp_path: Path) -> None:
    """No weight at all, but four large images between two layers."""
    onnx.save(onnx.parser.parse_model(WIDE), tmp_path / "wide.onnx")
    small, large = (peak_memory(tmp_path / "wide.onnx", size=(side, side)) for side in (SIZE, 1024))
    assert large - small > 0.9 * 4 * 3 * 4 * 1024**2


def test_memory_of_an_openvino_file(folder: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs the openvino extra")
    found = {}
    for name in ("small", "large"):
        model = openvino_core().read_model(folder / f"{name}.onnx")
        openvino.save_model(model, folder / f"{name}.xml", compress_to_fp16=False)
        found[name] = peak_memory(folder / f"{name}.xml", size=(SIZE, SIZE))
    assert found["large"] - found["small"] > 40 * MEGABYTE


def test_a_file_that_does_not_run_is_named(folder: Path) -> None:
    (folder / "broken.onnx").write_bytes(b"no model")
    with pytest.raises(TargetError, match=r"the memory of .*broken.onnx could not be measured"):
        peak_memory(folder / "broken.onnx", size=(SIZE, SIZE))


def test_everything_about_one_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "found.json"
    options = SpeedOptions((1, 4), (1,), json_file=file, plan=QUICK)
    measure_speed(str(folder / "small.onnx"), options, Console(width=120))
    value = json.loads(file.read_text())
    assert [(one["batch"], one["threads"]) for one in value["settings"]] == [(1, 1), (4, 1)]
    for one in value["settings"]:
        times = one["latency_ms"]
        assert 0 < times["p50"] <= times["p90"] <= times["p99"]
        assert one["runs"] >= 6 and one["throughput"] > 0 and one["load_seconds"] > 0
    assert value["size_bytes"] == (folder / "small.onnx").stat().st_size
    assert value["peak_memory_bytes"] > 0 and value["input"] == [SIZE, SIZE]
    about = value["machine"]
    assert {"name", "features", "governor"} <= set(about["cpu"])
    assert set(about["load_average"]) == {"before", "after"}
    shown = capsys.readouterr().out
    assert about["cpu"]["name"] in shown and "MB of memory at its peak" in shown


def test_it_measures_long_enough() -> None:
    plan = SpeedOptions().plan
    assert plan.least_runs >= 50 and plan.seconds >= 5 and plan.warmup > 0


def test_a_restless_machine_is_told_of() -> None:
    turns = tuple(np.full(4, ms) for ms in (1.0, 1.0, 1.0, 9.0, 9.0))
    assert Setting(1, 1, 0.1, Latency(turns, 1)).is_noisy
    tail = tuple(np.array([1.0] * 6 + [3.0] * 2) for _ in range(5))
    assert Setting(1, 1, 0.1, Latency(tail, 1)).is_noisy
    calm = tuple(np.array([1.0] * 19 + [3.0]) for _ in range(5))
    assert not Setting(1, 1, 0.1, Latency(calm, 1)).is_noisy


def test_a_file_with_a_free_size_needs_one(folder: Path) -> None:
    file = str(folder / "free.onnx")
    with pytest.raises(TargetError, match="--res 224"):
        measure_speed(file, SpeedOptions(plan=QUICK), QUIET)
    value = measure_speed(file, SpeedOptions((1,), (1,), resolution=48, plan=QUICK), QUIET)
    assert value["input"] == [48, 48]


def test_a_checkpoint_is_timed_in_torch() -> None:
    options = SpeedOptions((2,), (1,), resolution=32, plan=QUICK)
    value = measure_speed("builtin:care_nano_shapes", options, QUIET)
    assert value["peak_memory_bytes"] > 0 and value["settings"][0]["batch"] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.onnx"], "absent.onnx is not a file"),
        (["model.tflite"], "of no kind that can be run"),
        (["small.onnx", "--batch", "1,none"], "no list of positive numbers"),
        (["small.onnx", "--threads", "0"], "no list of positive numbers"),
        (["small.onnx", "--res", "64"], "wants 32x32 images"),
        (["small.onnx", "--precision", "bf16"], "only OpenVINO rounds"),
        (["alone.engine"], "alone.onnx and alone.engine.json beside it"),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(
    folder: Path,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    (folder / "alone.engine").touch()
    with pytest.raises(SystemExit) as stopped:
        main(["latency", *arguments])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in shown and len(shown.strip().splitlines()) == 1


def test_the_governors_of_our_cores(tmp_path: Path) -> None:
    for core, governor in enumerate(("performance", "powersave", "performance")):
        file = tmp_path / f"cpu{core}" / "cpufreq" / "scaling_governor"
        file.parent.mkdir(parents=True)
        file.write_text(governor + "\n")
    assert machine.scaling_governor(tmp_path, {0, 2}) == "performance"
    assert machine.scaling_governor(tmp_path, {0, 1}) == "performance, powersave"
    assert machine.scaling_governor(tmp_path, {7}) is None, "a virtual machine has none"
