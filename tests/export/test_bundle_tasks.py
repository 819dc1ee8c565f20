"""Bundles of masks and boxes: alone in an empty folder, on a made-up board, and back home."""

import dataclasses
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alone import alone
from dense_bundle import SHAPES, answers_to, dense_content
from fakeboard import FakeGpu, fake_host
from PIL import Image
from qdq import IMAGES, SIDE, make_content

from care_compress.device.app import main as board_main
from care_compress.device.boxes import SHOWN, find_boxes
from care_compress.device.cpu_app import main as cpu_main
from care_compress.device.letterbox import ImageSquare
from care_compress.device.manifest import BUNDLE_FORMAT, TASK_FORMAT
from care_compress.device.masks import find_mask, shares_of
from care_compress.evaluate.device_measurements import device_rows, import_results
from care_compress.export import bundle as bundles
from care_compress.export.bundle import BundleContent, unpack_bundle, write_bundle

DRAWN = {"segmentation": "mask", "detection": "boxes"}
EACH = pytest.mark.parametrize("task", SHAPES)


@pytest.fixture
def content(tmp_path: Path, task: str) -> BundleContent:
    return dense_content(tmp_path / "made", task)


def unpacked(content: BundleContent, folder: Path) -> Path:
    return unpack_bundle(write_bundle(content.fitting, folder / "b.tar.gz"), folder)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "pictures" / "street.png"
    path.parent.mkdir()
    coarse = Image.fromarray(rng.integers(0, 256, (6, 10, 3), dtype=np.uint8))
    coarse.resize((50, 30), Image.Resampling.NEAREST).save(path)
    return path


def results(bundle: Path) -> Any:
    return json.loads((bundle / "results.json").read_text())


@EACH
def test_a_bundle_proves_itself_answers_and_its_figures_come_home(
    content: BundleContent, task: str, tmp_path: Path, picture: Path
) -> None:
    bundle = unpacked(content, tmp_path)
    verified = alone(bundle, "verify")
    assert verified.returncode == 0, verified.stderr
    assert "agreement %" in verified.stdout and "top-1" not in verified.stdout
    measured = alone(bundle, "bench", "--seconds", "0.02")
    assert measured.returncode == 0, measured.stderr
    assert f"task    {task}" in alone(bundle, "info").stdout
    found = results(bundle)["models"]["int8"]["accuracy"]
    assert found["passed"] and found["agreement"] >= 99 and found["sqnr_db"] > 60
    asked = alone(bundle, "infer", str(picture))
    assert asked.returncode == 0, asked.stderr
    drawing = picture.with_name(f"street-{DRAWN[task]}.png")
    assert asked.stdout.splitlines()[-1] == f"drawn to {drawing}"
    with Image.open(drawing) as drawn:
        assert drawn.width == 500
    run_dir = tmp_path / "runs" / "mine"
    imported = import_results(bundle / "results.json", run_dir)
    accuracy = imported["models"]["int8"]["accuracy"]
    assert accuracy["top1"] is None and accuracy["agreement"] == found["agreement"]
    (row, _) = [row for _, row in device_rows("mine", "int8", imported)]
    assert row["top1"] is None and row["measured_on"]["verified"]


@EACH
def test_a_manifest_tells_the_task_and_a_classifiers_does_not(
    content: BundleContent, task: str, tmp_path: Path
) -> None:
    bundle = unpacked(content, tmp_path)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert (manifest["format"], manifest["task"], manifest["letterbox"]) == (
        TASK_FORMAT,
        task,
        True,
    )
    assert not (bundle / "samples" / "labels.npy").exists()
    assert np.load(bundle / "samples" / "logits_int8.npy").dtype == np.float16
    (tmp_path / "usual").mkdir()
    usual = unpacked(make_content(tmp_path / "usual", half=False), tmp_path / "usual")
    manifest = json.loads((usual / "manifest.json").read_text())
    assert manifest["format"] == BUNDLE_FORMAT and not {"task", "letterbox"} & manifest.keys()
    assert np.load(usual / "samples" / "logits_int8.npy").dtype == np.float32


@EACH
def test_words_are_those_of_the_answer(
    content: BundleContent, task: str, tmp_path: Path, picture: Path, capsys: Any
) -> None:
    bundle = unpacked(content, tmp_path)
    assert cpu_main(["infer", "--bundle", str(bundle), str(picture), "--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()[1:-1]
    with Image.open(picture) as image:
        square = ImageSquare.of(image.size[::-1], SIDE)
        pixels = square.array(image)[None]
    (output,) = answers_to(content.models["int8"].files[0], pixels)
    if task == "segmentation":
        shares = shares_of(find_mask(output, square), len(content.classes))
        wanted = [f"{100 * share:5.1f} %  {content.classes[k]}" for k, share in shares]
    else:
        found = find_boxes(output, square, SHOWN)
        assert len(found) > 3
        lines, wanted = [" ".join(line.split()) for line in lines[1:]], []
        for k, score, corners in zip(found.classes, found.scores, found.corners, strict=True):
            places = " ".join(f"{corner:.0f}" for corner in corners)
            wanted.append(f"{content.classes[k]} {score:.2f} {places}")
    assert lines == wanted
    assert (tmp_path / f"street-{DRAWN[task]}.png").is_file()
    # So many lines and no more.
    assert cpu_main(["infer", "--bundle", str(bundle), str(picture), "--top", "1"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == (3 if task == "segmentation" else 4)


@EACH
def test_other_answers_fail(content: BundleContent, task: str, tmp_path: Path, capsys: Any) -> None:
    """Classes that changed places, at a ratio that would do."""
    classes = 0 if task == "segmentation" else 4
    order = [*range(classes), *reversed(range(classes, SHAPES[task][0]))]
    models = {k: dataclasses.replace(one, least_sqnr_db=-99.0) for k, one in content.models.items()}
    logits = {**content.logits, "int8": content.logits["int8"][:, order]}
    bundle = unpacked(dataclasses.replace(content, models=models, logits=logits), tmp_path)
    assert cpu_main(["verify", "--bundle", str(bundle)]) == 1
    assert "FAILED" in capsys.readouterr().out
    found = results(bundle)["models"]
    assert found["fp32"]["accuracy"]["passed"] and not found["int8"]["accuracy"]["passed"]
    assert found["int8"]["accuracy"]["agreement"] < 60


@pytest.mark.parametrize("task", ["segmentation"])
def test_what_a_user_may_get_wrong_is_one_line(
    content: BundleContent, tmp_path: Path, picture: Path, capsys: Any
) -> None:
    bundle = unpacked(content, tmp_path)
    (tmp_path / "usual").mkdir()
    usual = unpacked(make_content(tmp_path / "usual", half=False), tmp_path / "usual")
    (text := tmp_path / "text.png").write_text("no image")
    (twin := tmp_path / "street.jpg").write_bytes(picture.read_bytes())
    changed: dict[str, dict[str, Any]] = {"pose": {"task": "pose"}, "none": {"task": None}}
    for name, values in changed.items():
        other = unpacked(content, tmp_path / name)
        manifest = json.loads((other / "manifest.json").read_text())
        (other / "manifest.json").write_text(json.dumps(manifest | values))
    named = "mine-onnxruntime-cpu"
    cases: list[tuple[Path, list[Any], str]] = [
        (bundle, [picture, tmp_path / "absent.png"], "ImageError: .*absent.png cannot be read"),
        (bundle, [text], "ImageError: .*text.png cannot be read"),
        (bundle, [picture, twin, "--out", tmp_path], "two pictures would be drawn to"),
        (bundle, [picture, twin, "--out", tmp_path / "one.png"], "two pictures would be drawn to"),
        (bundle, [picture, "--out", picture], "street.png would be drawn over"),
        (bundle, [picture, "--out", text / "x"], "x/street-mask.png cannot be written"),
        (usual, [picture, "--out", tmp_path], "this network gives classes: nothing is drawn"),
        (tmp_path / "pose" / named, [picture], "task 'pose', which this script does not know"),
        (tmp_path / "none" / named, [picture], "manifest.json has no usable 'task'"),
    ]
    for of, arguments, words in cases:
        assert cpu_main(["infer", "--bundle", str(of), *map(str, arguments)]) == 2, words
        (line,) = [one for one in capsys.readouterr().err.splitlines() if "verifying" not in one]
        assert " Fix: " in line
        assert re.search(words, line), line


@EACH
def test_a_board_builds_verifies_times_and_answers(
    task: str, tmp_path: Path, picture: Path, capsys: Any
) -> None:
    bundle = unpacked(dense_content(tmp_path / "made", task, half=True), tmp_path)
    host = fake_host(tmp_path / "root", "10.3.0.30", FakeGpu())
    for verb in (["build"], ["verify"], ["bench", "--seconds", "0.02"], ["infer", str(picture)]):
        assert board_main([verb[0], "--bundle", str(bundle), *verb[1:]], host) == 0, verb
    assert capsys.readouterr().out.splitlines()[-1].startswith("drawn to ")
    imported = import_results(bundle / "results.json", tmp_path / "runs" / "mine")
    assert imported["models"]["fp16"]["accuracy"]["passed"]


@EACH
def test_other_programs_get_what_is_right_and_no_more(task: str, tmp_path: Path) -> None:
    content = dense_content(tmp_path / "made", task, half=True)
    with tarfile.open(write_bundle(content, tmp_path / "b.tar.gz")) as packed:
        names = {name.split("/", 1)[1] for name in packed.getnames()}
        packed.extractall(tmp_path, filter="data")
    assert {name for name in names if name.startswith("examples/")} == {
        "examples/docker/Dockerfile",
        "examples/triton/care_int8/config.pbtxt",
        "examples/triton/care_fp16/config.pbtxt",
    }
    folder = tmp_path / "mine-tensorrt-orin"
    configuration = (folder / "examples/triton/care_int8/config.pbtxt").read_text()
    shape = ", ".join(map(str, (1, *SHAPES[task])))
    assert f"dims: [ {shape} ]" in configuration and "label" not in configuration
    readme = (folder / "README.md").read_text()
    assert "trtexec --onnx=int8.onnx" in readme and "build/classify" not in readme
    assert "{" not in readme and DRAWN[task] in readme


@pytest.mark.parametrize("task", ["segmentation"])
def test_samples_are_as_few_as_keep_a_bundle_small(
    content: BundleContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(content.fitting.pixels) == IMAGES
    each = 3 * SIDE**2 + 2 * 2 * np.prod(SHAPES["segmentation"])
    monkeypatch.setattr(bundles, "SAMPLES_BYTES", int(10 * each))
    few = content.fitting
    assert len(few.pixels) == 10 == len(few.logits["int8"]) == len(few.labels)
    rows = [
        int(np.flatnonzero((content.pixels == one).all(axis=(1, 2, 3)))[0]) for one in few.pixels
    ]
    assert np.array_equal(few.logits["int8"], content.logits["int8"][rows])
    monkeypatch.setattr(bundles, "SAMPLES_BYTES", 1)
    assert len(content.fitting.pixels) == 4
