"""What is timed and how much memory it takes: on stand-ins for runtimes, counted by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from care_compress.data.loader import Batch
from care_compress.errors import TargetError
from care_compress.evaluate import agreement, file_measurements
from care_compress.evaluate.comparison import CompareOptions, Comparison, Entry
from care_compress.evaluate.file_measurements import time_files
from care_compress.recipe.sections import DataSection
from care_compress.runtime.runners import Runner
from care_compress.tasks.classification import Classification

XML, ONNX = "openvino-cpu", "onnxruntime-cpu"


@pytest.fixture
def given(tmp_path: Path) -> Comparison:
    """Two files of the same bytes, one of them in two precisions, and one of other bytes."""
    for name in ("a", "same", "other"):
        (tmp_path / f"{name}.xml").write_bytes(b"graph")
        (tmp_path / f"{name}.bin").write_bytes(b"other" if name == "other" else b"weights")
    entries = [
        Entry(XML, "a", tmp_path / "a.xml", "f32"),
        Entry(XML, "a in BF16", tmp_path / "a.xml", "bf16"),
        Entry(XML, "same", tmp_path / "same.xml", "f32"),
        Entry(XML, "other", tmp_path / "other.xml", "f32"),
    ]
    samples: Any = range(3)
    data = DataSection(source="builtin:shapes", resolution=32)
    nothing: Any = None
    return Comparison(Classification(), data, samples, CompareOptions(), [], entries, {}, nothing)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What the runtimes were asked: images of each file, and files whose memory was measured."""
    seen: dict[str, list[Any]] = {"images": [], "memory": []}

    def pixels(samples: Any, data: Any, chosen: Any, *rest: Any) -> Any:
        images = torch.tensor([*chosen], dtype=torch.uint8)[:, None, None, None]
        yield Batch(images.expand(-1, 3, 4, 4), torch.zeros(len(images)), torch.tensor(chosen))

    def opened(path: Path, images: Any, threads: int, precision: str, device: str) -> Runner:
        if len(images) > 1 and path.name == "other.xml" and "one at a time" in seen:
            raise TargetError("its batch is fixed.")
        seen["images"].append(images)
        return Runner(lambda: None, 10.0 * threads + len(images))

    def memory(path: Path, size: Any, precision: str, device: str) -> int:
        seen["memory"].append((path.name, precision))
        return 1000 * len(seen["memory"])

    def latency(runs: Any, batch: int, plan: Any) -> Any:
        return {key: SimpleNamespace(batch=batch, is_noisy=False) for key in runs}

    monkeypatch.setattr(agreement, "pixel_batches", pixels)
    monkeypatch.setattr(file_measurements, "open_runner", opened)
    monkeypatch.setattr(file_measurements, "peak_memory", memory)
    monkeypatch.setattr(file_measurements, "measure_latency", latency)
    monkeypatch.setattr(file_measurements.machine, "usable_cores", lambda: {0, 1})
    return seen


def test_memory_is_measured_once_for_the_same_bytes_in_the_same_precision(
    given: Comparison, asked: dict[str, list[Any]]
) -> None:
    time_files(given, Console(quiet=True))
    assert asked["memory"] == [("a.xml", "f32"), ("a.xml", "bf16"), ("other.xml", "f32")]
    known = {key.partition("/")[2]: value for key, value in given.peak_memory.items()}
    assert known == {"a": 1000, "a in BF16": 2000, "same": 1000, "other": 3000}


def test_every_file_is_timed_on_as_many_images_as_the_batch_has(
    given: Comparison, asked: dict[str, list[Any]]
) -> None:
    time_files(given, Console(quiet=True))
    assert list(given.latency) == [(1, 1), (1, 2), (8, 1), (8, 2)]
    assert [len(images) for images in asked["images"]] == [1] * 8 + [8] * 8
    eight = asked["images"][-1]
    first = [float(image.mean()) for image in eight]
    assert len(set(first)) == 3 and first == [*first[:3], *first[:3], *first[:2]], "in turns"
    assert set(given.load_seconds.values()) == {11.0}, "of one image on one thread"


def test_where_one_file_takes_no_batch_none_of_its_target_is_timed_with_it(
    given: Comparison, asked: dict[str, list[Any]], tmp_path: Path
) -> None:
    asked["one at a time"] = []
    (tmp_path / "a.onnx").write_bytes(b"onnx")
    given.entries.append(Entry(ONNX, "a", tmp_path / "a.onnx", "f32"))
    time_files(given, Console(quiet=True))
    assert len(given.latency[1, 1]) == 5 and list(given.latency[8, 2]) == [f"{ONNX}/a"]
