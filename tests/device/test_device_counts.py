"""What a device counts, by hand: probabilities, throughput, compute capabilities, progress."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fakeboard import FakeGpu, fake_library

from care_compress.device.answers import answers_of
from care_compress.device.build import BuildMonitor
from care_compress.device.cuda import CudaGpu
from care_compress.device.enginefile import EngineOrigin, read_engine, write_engine
from care_compress.device.layers import network_layers
from care_compress.device.manifest import Bundle, satisfies
from care_compress.device.problems import EngineMismatchError
from care_compress.device.results import merge_results
from care_compress.device.samples import run_pixels
from care_compress.device.sensors import is_busy
from care_compress.device.storage import digest_bytes, digest_file
from care_compress.device.timing import Measured, Timing


class Doubles:
    """A model whose logits are the means of the three colours, a few times over."""

    takes_bytes = False

    def __init__(self) -> None:
        self.given: list[int] = []

    def run(self, images_NCHW: np.ndarray) -> np.ndarray:
        self.given.append(len(images_NCHW))
        means: np.ndarray = images_NCHW.mean(axis=(2, 3))
        return 2 * means


def bundle(folder: Path, **more: object) -> Bundle:
    about: dict[str, Any] = {"mean": [0, 0, 0], "std": [1, 1, 1], "classes": ["a", "b", "c"]}
    about |= {"target": "t", "run": "r", "recipe": "q", "fingerprint": "f"}
    (folder / "manifest.json").write_text(json.dumps(about))
    return Bundle(folder, about | more)


def test_the_likeliest_class_comes_first_with_its_probability(tmp_path: Path) -> None:
    told = answers_of(bundle(tmp_path)).tell(
        np.array([0, 2, 0], np.float32), None, bundle(tmp_path), 2
    )
    sure = np.exp(2) / (np.exp(2) + 2)
    assert told.rows == [[f"{100 * sure:5.1f} %", "b"], [f"{50 * (1 - sure):5.1f} %", "a"]]
    assert told.drawing is None


def test_every_image_is_run_once_and_in_order(tmp_path: Path) -> None:
    pixels = np.arange(70, dtype=np.uint8).reshape(70, 1, 1, 1).repeat(3, axis=1)
    model = Doubles()
    logits = run_pixels(model, bundle(tmp_path), pixels)
    assert sum(model.given) == 70 and max(model.given) <= 32
    assert np.allclose(logits[:, 0], 2 * np.arange(70) / 255)


def test_a_record_tells_runs_images_and_percentiles() -> None:
    runs = [float(ms) for ms in range(1, 101)]
    timing = Timing(4, runs, sum(runs) / 1000)
    (record,) = Measured({"int8": timing}, {}, {}).as_records({"threads": 2}).values()
    assert record["latency_ms"] == pytest.approx({"p50": 50.5, "p90": 90.1, "p99": 99.01})
    assert record["throughput"] == pytest.approx(4 * 100 / 5.05)
    assert (record["runs"], record["batch"], record["threads"]) == (100, 4, 2)


@pytest.mark.parametrize(
    ("built", "here", "runs"),
    [
        ("8.6", "8.6", True),
        ("8.6", "8.9", True),
        ("8.6", "8.0", False),
        ("8.6", "9.0", False),
        ("12.0", "8.9", False),
    ],
)
def test_code_runs_on_later_gpus_of_its_own_generation(
    tmp_path: Path, built: str, here: str, runs: bool
) -> None:
    origin = EngineOrigin("tensorrt", "10.3.0.30", None, (built,), "a", False, False)
    write_engine(tmp_path / "int8.engine", b"plan", origin, {})
    library, gpu = fake_library("10.3.0.30", FakeGpu()), CudaGpu("this one", here)
    if runs:
        assert read_engine(tmp_path / "int8.engine", library, gpu, "a")[0] == b"plan"
    else:
        with pytest.raises(EngineMismatchError, match=f"compute capability {built}"):
            read_engine(tmp_path / "int8.engine", library, gpu, "a")


def test_progress_rises_to_all_of_a_phase() -> None:
    told: list[tuple[str, float | None]] = []
    monitor = BuildMonitor(lambda phase, done: told.append((phase, done)))
    monitor.start("tactics", None, 4)
    monitor.start("inside", "tactics", 2)
    for step in range(4):
        assert monitor.step("tactics", step) and monitor.step("inside", step)
    assert told == [("tactics", done) for done in (0.0, 0.25, 0.5, 0.75, 1.0)]


def test_half_of_the_cores_is_busy() -> None:
    assert not is_busy(2.0, 4) and is_busy(2.1, 4) and not is_busy(None, 1)


def found(folder: Path) -> Any:
    return json.loads((folder / "results.json").read_text())["models"]


def test_figures_stay_with_the_engine_the_board_and_the_bundle_they_are_of(tmp_path: Path) -> None:
    made: Mapping[str, Any] = {"int8": {"engine": "1"}, "fp16": {"engine": "2"}}
    here = bundle(tmp_path)

    def add(part: str, name: str = "int8", board: str = "orin", about: Any = made) -> Any:
        merge_results(here, ("kind", 1), {"name": board}, about, part, {name: {"value": part}})
        return found(tmp_path)

    add("accuracy")
    both = add("speed")["int8"]
    assert (both["accuracy"]["value"], both["speed"]["value"]) == ("accuracy", "speed")
    assert set(add("speed", "fp16")) == {"int8", "fp16"}
    rebuilt = add("speed", about={"int8": {"engine": "3"}})
    assert "accuracy" not in rebuilt["int8"] and rebuilt["int8"]["engine"] == "3"
    assert "speed" in rebuilt["fp16"], "the other engine is as it was"
    assert set(add("accuracy", board="thor")) == {"int8"}, "another board begins anew"
    (tmp_path / "manifest.json").write_text("{}")
    assert set(add("speed", "fp16", board="thor")) == {"fp16"}, "and so does another bundle"


def tensor(name: str, kind: str = "FLOAT") -> Any:
    return SimpleNamespace(name=name, dtype=SimpleNamespace(name=kind))


def layer(kind: str, inputs: list[str], output: str, stored: str = "FLOAT") -> Any:
    given = [tensor(name, stored) for name in inputs]
    return SimpleNamespace(
        name=output, type=SimpleNamespace(name=kind), num_inputs=len(given), num_outputs=1,
        get_input=lambda which: given[which], get_output=lambda which: tensor(output),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("weight", "moved", "stored", "precision"),
    [
        ("DEQUANTIZE", "SHUFFLE", ("INT8", "INT8"), "INT8"),
        ("DEQUANTIZE", "SHUFFLE", ("FP8", "FP8"), "FP8"),
        ("DEQUANTIZE", "SHUFFLE", ("FP8", "INT8"), "FP32"),
        ("CONSTANT", "SHUFFLE", ("INT8", "INT8"), "FP32"),
        ("DEQUANTIZE", "ACTIVATION", ("INT8", "INT8"), "FP32"),
    ],
)
def test_a_product_is_in_what_both_its_inputs_were_dequantized_from(
    weight: str, moved: str, stored: tuple[str, str], precision: str
) -> None:
    layers = [
        layer("DEQUANTIZE", ["q"], "data", stored[0]),
        layer(moved, ["data"], "turned"),
        layer(weight, ["w"], "weight", stored[1]),
        layer("MATRIX_MULTIPLY", ["turned", "weight"], "product"),
    ]
    network = SimpleNamespace(num_layers=4, get_layer=lambda index: layers[index])
    assert network_layers(network)[-1].precision == precision


@pytest.mark.parametrize(
    ("requirement", "fits"),
    [("==10.3", True), ("<=10.3", True), (">10.3", False), ("!=10.3", False), ("<10.4", True)],
)
def test_a_release_of_a_version_counts_as_that_version(requirement: str, fits: bool) -> None:
    assert satisfies((10, 3, 0, 30), f"tensorrt{requirement}") is fits


def test_a_digest_is_of_the_whole_file_however_large(tmp_path: Path) -> None:
    content = bytes(3 << 20)
    (tmp_path / "a").write_bytes(content + b"a")
    (tmp_path / "b").write_bytes(content + b"b")
    assert digest_file(tmp_path / "a") == digest_bytes(content + b"a")
    assert digest_file(tmp_path / "a") != digest_file(tmp_path / "b")
