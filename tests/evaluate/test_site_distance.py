"""Versions beside each other, evidence and what devices sent home: counted by hand."""

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comparison import board_results, cpu_results
from PIL import Image

from care_compress.data.loader import Batch
from care_compress.evaluate.device_measurements import (
    DeviceResultsError,
    device_measurements,
    device_rows,
    import_results,
)
from care_compress.evaluate.evidence import SHOWN, THUMBNAIL, measure_answers, thumbnail
from care_compress.evaluate.fidelity import decibels, hardest_sites
from care_compress.evaluate.site_distance import Version, compare_versions, sharpest_fall
from care_compress.evaluate.site_outputs import Taken


def version(
    name: str, before: str | None, logits: Sequence[Sequence[float]], sites: dict[str, float]
) -> Version:
    """Answers to one image after the other, and sites of one number each."""
    given = iter(logits)

    def run(image: torch.Tensor) -> Taken:
        outputs = {site: torch.full((1, 2), value) for site, value in sites.items()}
        return Taken(torch.tensor([next(given)]), outputs)

    return Version(name, run, before, tuple(sites))


def test_every_version_stands_beside_the_one_it_was_made_from() -> None:
    versions = [
        version("float", None, [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], {"stem": 10.0, "head": 10.0}),
        version("int8", "float", [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], {"stem": 10.1, "head": 9.0}),
        version("file", "int8", [[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], {"stem": 10.1}),
    ]
    images = [torch.zeros(1, 3, 2, 2)] * 3
    first, second, third = (
        one.as_json() for one in compare_versions(versions, images, lambda text: None)
    )
    assert (first["sqnr_db"], first["to_float_db"], first["same_percent"]) == (None, None, 100)
    assert second["same_percent"] == second["same_as_float_percent"] == pytest.approx(200 / 3)
    # The signal of three images is 3; one of them changed both logits by 1.
    assert second["sqnr_db"] == second["to_float_db"] == pytest.approx(10 * math.log10(3 / 2))
    assert second["sites"]["stem"] == pytest.approx(40.0, abs=0.01)
    assert second["sites"]["head"] == pytest.approx(20.0, abs=0.01)
    assert second["parts_at"]["site"] == "stem", "from 80 dB to 40, then to 20"
    assert third["same_percent"] == pytest.approx(200 / 3)
    assert third["same_as_float_percent"] == pytest.approx(100 / 3)
    assert third["to_float_db"] == pytest.approx(10 * math.log10(3 / 4))
    assert third["sites"]["stem"] == 200.0 and third["parts_at"] is None


def test_of_equal_falls_the_first_is_where_models_part() -> None:
    fall = sharpest_fall({"a": 60.0, "b": 40.0, "c": 20.0, "d": 50.0, "e": 25.0})
    assert fall is not None and (fall.site, fall.before_db) == ("a", 80.0)
    later = sharpest_fall({"a": 75.0, "b": 70.0, "c": 78.0, "d": 40.0})
    assert later is not None and (later.site, later.before_db) == ("d", 70.0)


def test_the_hardest_sites_are_those_that_are_far_in_any_version() -> None:
    rungs: list[dict[str, Any]] = [
        {"rung": "float", "sites": {}},
        {"rung": "simulated", "sites": {f"s{n}": 60.0 - n for n in range(20)}},
        {"rung": "file", "sites": {"s0": 10.0, "s19": 90.0}},
    ]
    names, cells = hardest_sites({"rungs": rungs})
    assert names == ["simulated", "file"] and len(cells) == 15
    assert cells[:2] == [("s0", [60.0, 10.0]), ("s19", [41.0, 90.0])]
    assert "s5" not in dict(cells) and "s6" in dict(cells)
    assert (decibels(None), decibels(200.0), decibels(31.04)) == ("", "exact", "31.0 dB")


def shown(before: Sequence[int], after: Sequence[int], labels: Sequence[int]) -> dict[str, Any]:
    """Evidence of these answers, each given with logits of 2 against 0."""
    count = len(labels)
    pixels = torch.zeros(count, 3, 4, 4, dtype=torch.uint8)
    batch = Batch(pixels, torch.tensor(labels), torch.arange(count))
    images: Any = SimpleNamespace(
        samples=SimpleNamespace(classes=("cat", "dog", "owl"), name=lambda index: f"{index}.png"),
        batches=lambda: [batch],
        inputs=lambda given: given.float(),
    )
    models: Any = [lambda x, one=one: 2 * torch.eye(3)[list(one)] for one in (before, after)]
    return measure_answers(*models, images)


def test_flipped_answers_are_counted_ranked_and_shown() -> None:
    found = shown((0, 0, 1, 1, 2, 0), (0, 1, 0, 0, 0, 2), (0, 0, 1, 1, 0, 1))
    counts = {key: found[key] for key in ("images", "same", "lost", "gained")}
    assert counts == {"images": 6, "same": 1, "lost": 3, "gained": 1}
    assert found["changes"][0] == {"label": "dog", "before": "dog", "after": "cat", "images": 2}
    assert [one["images"] for one in found["changes"]] == [2, 1, 1, 1]
    first = found["flipped"][0]
    assert (first["name"], first["label"], first["before"], first["after"]) == (
        *("1.png", "cat"),
        *("cat", "dog"),
    )
    sure = math.exp(2) / (math.exp(2) + 2)
    assert (first["sure_before"], first["sure_after"]) == pytest.approx((sure, sure))
    many = shown([0] * 40, [1] * 40, [0] * 40)
    assert len(many["flipped"]) == SHOWN and many["changes"][0]["images"] == 40


def test_a_picture_keeps_its_shape_and_colours() -> None:
    pixels = torch.zeros(3, 100, 200, dtype=torch.uint8)
    pixels[0, :, 100:] = 250
    data = base64.b64decode(thumbnail(pixels).partition(",")[2])
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.size == (THUMBNAIL, THUMBNAIL // 2)
        red, green, _ = picture.convert("RGB").getpixel((80, 20))
        assert red > 200 and green < 50
        assert max(picture.convert("RGB").getpixel((10, 20))) < 50


def imported(run: Path, results: dict[str, Any]) -> None:
    file = run.parent / "results.json"
    file.write_text(json.dumps(results))
    import_results(file, run)


def board(p50: float, measured_at: str, mode: str) -> dict[str, Any]:
    found = board_results("mine") | {"measured_at": measured_at}
    speed = found["models"]["int8"]["speed"]
    speed["latency_ms"]["p50"] = p50
    speed["during"]["power_mode"] = mode
    return found


def test_the_newest_engines_and_every_setting_of_a_processor_are_shown(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    imported(run, board(0.5, "2026-11-21", "15W"))
    imported(run, board(0.3, "2026-11-20", "MAXN"))
    for threads in (1, 2):
        imported(run, cpu_results("mine", threads))
    names = {path.name for path in (run / "measured").iterdir()}
    assert names == {
        "tensorrt-jetson-orin.nvidia-jetson-agx-orin.15w.json",
        "tensorrt-jetson-orin.nvidia-jetson-agx-orin.maxn.json",
        "onnxruntime-cpu.raspberry-pi-5-model-b.1-thread.json",
        "onnxruntime-cpu.raspberry-pi-5-model-b.2-threads.json",
    }
    found = device_measurements(run)
    assert sorted(one["target"] for one in found) == [
        *["onnxruntime-cpu"] * 2,
        "tensorrt-jetson-orin",
    ]
    (engine,) = (one for one in found if "gpu" in one["board"])
    assert engine["models"]["int8"]["speed"]["latency_ms"]["p50"] == 0.5, "measured last"
    rows = dict(device_rows("mine", "int8", engine))
    assert rows["mine"]["latency_ms"]["p50"] == 0.5 and rows["mine"]["top1"] == 95.3
    assert rows["mine fp16"]["throughput"] == pytest.approx(1000 / 0.36)


@pytest.mark.parametrize("changed", ["fingerprint", "model", "nothing"])
def test_figures_of_another_export_are_refused(tmp_path: Path, changed: str) -> None:
    run, results = tmp_path / "mine", cpu_results("mine")
    folder = run / "exports" / "onnxruntime-cpu"
    folder.mkdir(parents=True)
    export: dict[str, Any] = {"fingerprint": "c" * 64, "models": {"int8": {"sha256": "a" * 64}}}
    if changed == "fingerprint":
        export["fingerprint"] = "e" * 64
    if changed == "model":
        export["models"]["int8"]["sha256"] = "b" * 64
    (folder / "export.json").write_text(json.dumps(export))
    if changed == "nothing":
        imported(run, results)
        assert len(device_measurements(run)) == 1
        (folder / "export.json").write_text(json.dumps({**export, "fingerprint": "f" * 64}))
        assert device_measurements(run) == [], "exported again since"
    else:
        with pytest.raises(DeviceResultsError, match="another"):
            imported(run, results)
