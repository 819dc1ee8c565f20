"""What leaves a run: how a picture is prepared, what a file says, what a bundle holds."""

import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdq import make_content

from care_compress.data.samples import spread_indices
from care_compress.device.manifest import open_bundle
from care_compress.errors import RunError
from care_compress.evaluate.agreement import Agreement
from care_compress.export.bundle import unpack_bundle, write_bundle
from care_compress.export.deploy import bundle_content, promised_db
from care_compress.export.result import Exported, File, Preprocessing
from care_compress.files import digest_of
from care_compress.recipe.sections import DataSection
from care_compress.recipe.target import load_target

ONNX = load_target("onnxruntime-cpu")


@pytest.mark.parametrize(
    ("resolution", "crop_pct", "resize"), [(224, 0.875, 256), (224, 0.9, 248), (64, 1.0, 64)]
)
def test_the_shorter_side_is_cut_off_to_whole_pixels(
    resolution: int, crop_pct: float, resize: int
) -> None:
    """224 / 0.9 is 248.9: the published evaluation resizes to 248."""
    data = DataSection(source="builtin:shapes", resolution=resolution, crop_pct=crop_pct)
    found = Preprocessing.of(data)
    assert (found.resolution, found.resize) == (resolution, resize)


def exported(folder: Path, sqnr_db: float = 40.0, executed: int | None = 750) -> Exported:
    (folder / "int8.onnx").write_bytes(bytes(1000))
    near = Agreement(200, 196, 3, sqnr_db, 25.0)
    return Exported(
        ONNX,
        {"int8": File(folder / "int8.onnx", near, "")},
        planned_macs=1000,
        executed_macs=executed,
        answers_as_float=99.0,
    )


def test_the_share_of_integer_products_is_of_those_planned(tmp_path: Path) -> None:
    done = exported(tmp_path)
    assert done.share == 0.75
    value = done.as_json()
    assert value["integer_macs"] == {"planned": 1000, "executed": 750, "share": 0.75}
    said = value["models"]["int8"]
    assert (said["agreement"], said["ties"], said["size_bytes"]) == (98.0, 3, 1000)
    assert said["holds"], "196 answers and 3 ties of 200"
    unknown = exported(tmp_path, executed=None).as_json()["integer_macs"]
    assert unknown["share"] is None and "not_measured" in unknown
    none = Exported(ONNX, planned_macs=0, executed_macs=0)
    assert none.share is None, "a float model plans none"


@pytest.mark.parametrize("sqnr_db", [40.0, math.inf, -math.inf])
def test_a_record_is_read_as_it_was_written_wherever_the_run_lies(
    tmp_path: Path, sqnr_db: float
) -> None:
    record = json.loads(json.dumps(exported(tmp_path, sqnr_db).as_record(), allow_nan=False))
    moved = tmp_path / "moved"
    found = Exported.of_record(ONNX, moved, record)
    (file,) = found.files.values()
    assert file.path == moved / "int8.onnx" and file.agreement.sqnr_db == sqnr_db
    assert (found.planned_macs, found.executed_macs, found.answers_as_float) == (1000, 750, 99.0)


IMAGES, SAMPLES, CLASSES = 40, 16, ("a", "b", "c")


def run_with(folder: Path, least_db: float = 25.0, holds: bool = True) -> Path:
    """A run whose export was checked on 40 images, of which 16 travel to devices."""
    exports = folder / "run" / "exports"
    target = exports / ONNX.name
    target.mkdir(parents=True)
    (exports / "samples").mkdir()
    (target / "int8.onnx").write_bytes(b"graph")
    entry = {
        "file": "int8.onnx", "sha256": digest_of(target / "int8.onnx"), "holds": holds,
        "least_sqnr_db": least_db, "sqnr_db": 40.0, "agreement": 100.0,
    }  # fmt: skip
    about = {
        "resolution": 8, "resize": 9, "crop_pct": 0.9, "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.2, 0.3], "exif_rotate": True,
    }  # fmt: skip
    export = {
        "recipe": "int8", "fingerprint": "f", "classes": CLASSES, "batch": "dynamic",
        "preprocessing": about, "models": {"int8": entry},
    }  # fmt: skip
    (target / "export.json").write_text(json.dumps(export))
    chosen = spread_indices(IMAGES, SAMPLES)
    answers = np.arange(IMAGES * len(CLASSES), dtype=np.float32).reshape(IMAGES, len(CLASSES))
    pixels = np.arange(IMAGES, dtype=np.uint8).repeat(3 * 8 * 8).reshape(IMAGES, 3, 8, 8)
    np.save(target / "expected_int8.npy", answers)
    np.save(exports / "samples" / "pixels.npy", pixels[chosen])
    np.save(exports / "samples" / "labels.npy", np.arange(IMAGES)[chosen])
    return folder / "run"


def test_a_bundles_answers_are_those_to_its_own_samples(tmp_path: Path) -> None:
    content = bundle_content(run_with(tmp_path), "run", ONNX)
    images = content.pixels[:, 0, 0, 0]
    assert len(images) == SAMPLES and images.tolist() == content.labels.tolist()
    assert content.logits["int8"][:, 0].tolist() == (len(CLASSES) * content.labels).tolist()
    assert content.input_shape == ("batch", 3, 8, 8) and content.output_shape == ("batch", 3)
    assert (content.mean, content.std) == ((0.5, 0.4, 0.3), (0.2, 0.2, 0.3))
    assert content.exif_rotate and content.crop_pct == 0.9


@pytest.mark.parametrize(("least_db", "asked"), [(25.0, 20.0), (12.5, 12.5)])
def test_a_device_is_asked_no_more_than_the_export_was(
    tmp_path: Path, least_db: float, asked: float
) -> None:
    content = bundle_content(run_with(tmp_path, least_db), "run", ONNX)
    assert content.models["int8"].least_sqnr_db == asked


@pytest.mark.parametrize(
    ("file_db", "least_db", "asked"),
    [
        (34.4, 28.0, 31.0),  # exact implementations come within 34 dB of each other
        (30.0, 28.0, 27.0),  # the file's own is farther
        (67.1, 50.0, 50.0),  # a float16 file, whose sums were float32
        (None, 50.0, 50.0),
    ],
)
def test_an_engine_is_held_to_what_its_file_promised(
    file_db: float | None, least_db: float, asked: float
) -> None:
    entry = {"sqnr_db": file_db, "least_sqnr_db": least_db}
    assert promised_db(entry, is_engine=True) == asked
    assert promised_db(entry, is_engine=False) == 20.0


def test_what_failed_or_was_changed_is_not_bundled(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not compute what its model does"):
        bundle_content(run_with(tmp_path, holds=False), "run", ONNX)
    run = run_with(tmp_path / "other")
    (run / "exports" / ONNX.name / "int8.onnx").write_bytes(b"grapH")
    with pytest.raises(RunError):
        bundle_content(run, "run", ONNX)


def test_what_a_device_reads_is_what_was_exported(tmp_path: Path) -> None:
    content = make_content(tmp_path, half=False)
    archive = write_bundle(content, tmp_path / "bundle.tar.gz")
    bundle = open_bundle(unpack_bundle(archive, tmp_path / "there"), ("onnxruntime",))
    about: Any = bundle.manifest
    assert bundle.limits("int8") == {"agreement": 98.0, "sqnr_db": 20.0}
    assert (about["mean"], about["std"]) == (list(content.mean), list(content.std))
    assert about["crop_pct"] == 0.9 and about["exif_rotate"] is False
    assert about["classes"] == list(content.classes) and about["resolution"] == 16
    for name, expected in (("labels", content.labels), ("logits_fp32", content.logits["fp32"])):
        assert np.array_equal(bundle.array(name), expected)
    assert bundle.array("labels").dtype == np.int64
    with tarfile.open(archive) as packed:
        names = packed.getnames()
    assert names == sorted(names) and len(set(names)) == len(names)
