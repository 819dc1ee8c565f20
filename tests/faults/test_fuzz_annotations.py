"""Masks and boxes as strangers write them: used as they are meant, or refused by name."""

import io
import json
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import Cases, damaged, memory_limit, sealed
from PIL import Image

from care_compress.data.annotated_transforms import evaluation_transform, training_transform
from care_compress.data.annotations import IGNORED, Boxes, Kind
from care_compress.data.loader import BadImages, evaluation_batches, training_batches
from care_compress.data.sources import open_annotated
from care_compress.recipe.sections import AugmentSection, DataSection

CASES = Cases("annotations")
SIZE = 32
WIDTH, HEIGHT = 24, 20
Files = dict[str, bytes]


@pytest.fixture(autouse=True, scope="module")
def _limits() -> Iterator[None]:
    with memory_limit():
        yield


def _saved(array: np.ndarray, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


PHOTO = _saved(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8))
MASK = _saved(np.random.default_rng(1).integers(0, 3, (HEIGHT, WIDTH), np.uint8))
XML = (
    b'<?xml version="1.0"?><annotation><size><width>24</width><height>20</height></size>'
    b"<object><name>owl</name><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>3</ymin>"
    b"<xmax>20</xmax><ymax>15</ymax></bndbox></object><object><name>dog</name><bndbox>"
    b"<xmin>1</xmin><ymin>1</ymin><xmax>24</xmax><ymax>20</ymax></bndbox></object></annotation>"
)
CONTENT: dict[str, Any] = {
    "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
    "annotations": [
        {"id": 5, "image_id": 1, "category_id": 2, "bbox": [1, 2.5, 10, 8], "iscrowd": 0},
        {"id": 6, "image_id": 1, "category_id": 4, "bbox": [0, 0, 24, 20], "iscrowd": 1},
    ],
    "categories": [{"id": 2, "name": "owl"}, {"id": 4, "name": "dog"}],
}
LISTED = {"classes.txt": b"owl\ndog\nyak\n", "images/val/a.png": PHOTO}
MASKS: Files = LISTED | {"annotations/val/a.png": MASK}
VOC: Files = LISTED | {"annotations/val/a.xml": XML}
COCO: Files = LISTED | {"annotations/val.json": json.dumps(CONTENT).encode()}


def _written(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def _used(source: Path, kind: Kind) -> int:
    """Open the set, and send its images through training and evaluation."""
    data = DataSection(source=str(source), resolution=SIZE, workers=0)
    samples = open_annotated(data, "val", kind)
    seen = 0
    shown = evaluation_transform(samples, data)
    for batch in evaluation_batches(samples, shown, 4, data, bad=BadImages()):
        for one in batch.annotations:
            seen += 1
            if isinstance(one, Boxes):
                height, width = one.size
                assert np.isfinite(one.corners).all()
                assert (one.corners[:, 2:] > one.corners[:, :2]).all()
                assert (one.corners >= 0).all() and (one.corners[:, 2] <= width).all()
                assert (one.corners[:, 3] <= height).all()
                assert ((one.classes >= 0) & (one.classes < len(samples.classes))).all()
            else:
                assert ((one < len(samples.classes)) | (one == IGNORED)).all()
    augmented = training_transform(samples, data, AugmentSection())
    for _ in training_batches(
        samples, augmented, 1, data, seed=0, start_step=0, total_steps=1, bad=BadImages()
    ):
        pass
    assert len(samples.fingerprint()) == len(samples.content_digest()) == 64
    return seen


@pytest.mark.parametrize(
    ("files", "name", "kind"),
    [
        (MASKS, "annotations/val/a.png", "masks"),
        (MASKS, "classes.txt", "masks"),
        (VOC, "annotations/val/a.xml", "boxes"),
        (COCO, "annotations/val.json", "boxes"),
    ],
)
def test_damaged_files(tmp_path: Path, files: Files, name: str, kind: Kind) -> None:
    rng = random.Random(name)
    for number in range(120):
        source = _written(tmp_path / str(number), files | {name: damaged(files[name], rng)})
        with sealed():
            CASES.attempt(lambda source=source: _used(source, kind))


@pytest.mark.parametrize(("files", "kind"), [(MASKS, "masks"), (VOC, "boxes"), (COCO, "boxes")])
def test_damaged_zips(tmp_path: Path, files: Files, kind: Kind) -> None:
    path = tmp_path / "whole.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    whole, rng = path.read_bytes(), random.Random(kind)
    for number in range(80):
        source = tmp_path / f"{number}.zip"
        source.write_bytes(damaged(whole, rng))
        CASES.attempt(lambda source=source: _used(source, kind))


STRANGE: list[Any] = [
    None, True, -1, 0, 2**63, 2**70, 10**400, 1e308, -1e308, float("nan"), float("inf"), 1.5, "",
    "a", "1", "../../etc/passwd", "/etc/passwd", "\x1b[2J", "\ud800", [], [[]], {}, {"id": {}},
    [None] * 4, [1, 2], [0, 0, 1e-30, 1e-30], [-0.5, -0.5, 24, 20], [0, 0, 1e300, 1e300],
]  # fmt: skip


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    if isinstance(value, dict | list):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _places(one, (*at, key))


def _replaced(at: tuple[Any, ...], by: Any) -> bytes:
    content = json.loads(json.dumps(CONTENT))
    holder = content
    for key in at[:-1]:
        holder = holder[key]
    if not at:
        content = by
    else:
        holder[at[-1]] = by
    return json.dumps(content).encode()


def test_coco_files_that_say_anything(tmp_path: Path) -> None:
    places = list(_places(CONTENT))
    for at in places:
        for number, by in enumerate(STRANGE):
            source = _written(
                tmp_path / f"{places.index(at)}-{number}",
                COCO | {"annotations/val.json": _replaced(at, by)},
            )
            CASES.attempt(lambda source=source: _used(source, "boxes"))


def test_voc_files_that_say_anything(tmp_path: Path) -> None:
    strange = ["", " ", "nan", "inf", "-1", "1e308", "9" * 400, "0x10", "1_0", "owl", "&lt;", "&x;"]
    numbers = [b">24<", b">20<", b">2<", b">3<", b">15<", b">owl<", b">0<"]
    for number, old in enumerate(numbers):
        for other, new in enumerate(strange):
            xml = XML.replace(old, f">{new}<".encode(), 1)
            source = _written(tmp_path / f"{number}-{other}", VOC | {"annotations/val/a.xml": xml})
            CASES.attempt(lambda source=source: _used(source, "boxes"))


@pytest.mark.parametrize("grow", [lambda n: b"<a>" * n, lambda n: b"<a>" * n + b"</a>" * n])
def test_deep_documents(tmp_path: Path, grow: Callable[[int], bytes]) -> None:
    for depth in (10, 10_000, 1_000_000):
        xml = b"<annotation>" + grow(depth) + b"</annotation>"
        source = _written(tmp_path / str(depth), VOC | {"annotations/val/a.xml": xml})
        CASES.attempt(lambda source=source: _used(source, "boxes"))


def test_names_that_lead_elsewhere(tmp_path: Path) -> None:
    for number, name in enumerate(
        ("/images/val/a.png", "../images/val/a.png", "images/../a.png", "images//a.png", "images/.")
    ):
        path = tmp_path / f"{number}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for each, content in (MASKS | {name: PHOTO}).items():
                archive.writestr(each, content)
        CASES.attempt(lambda path=path: _used(path, "masks"))


def test_there_were_enough_cases() -> None:
    CASES.assert_enough()
