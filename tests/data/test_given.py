"""Images handed over by a program: whatever form they come in, the same pixels and labels."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from care_compress.data.given import give
from care_compress.data.samples import Samples
from care_compress.data.sources import open_samples
from care_compress.errors import BadImageError, DataError
from care_compress.recipe.sections import DataSection

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 24, 3)).astype(np.uint8)
LABELS = [0, 1, 2] * 4


def opened(data: object, split: str = "train", **section: object) -> Samples:
    said = DataSection(source=give(data), **section)  # type: ignore[arg-type]
    return open_samples(said, split)  # type: ignore[arg-type]


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def as_file(pixels: np.ndarray, place: int, folder: Path) -> Path:
    path = folder / f"{place}.png"
    path.write_bytes(encoded(pixels))
    return path


def test_every_form_of_an_image_gives_the_same_pixels(tmp_path: Path) -> None:
    forms = {
        "arrays": [(p, label) for p, label in zip(PIXELS, LABELS, strict=True)],
        "images": [(Image.fromarray(p), label) for p, label in zip(PIXELS, LABELS, strict=True)],
        "tensors": [
            (torch.from_numpy(p).permute(2, 0, 1), np.int64(label))
            for p, label in zip(PIXELS, LABELS, strict=True)
        ],
        "bytes": [(encoded(p), label) for p, label in zip(PIXELS, LABELS, strict=True)],
        "paths": [
            (as_file(p, i, tmp_path), label)
            for i, (p, label) in enumerate(zip(PIXELS, LABELS, strict=True))
        ],
    }
    for form, data in forms.items():
        samples = opened({"train": data})
        assert samples.labels.tolist() == LABELS and samples.classes == ("0", "1", "2"), form
        for place in (0, 5, 11):
            assert np.array_equal(np.array(samples.image(place)), PIXELS[place]), form


def test_a_hugging_face_set_is_one_like_any_other() -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["b", "a", "c"])}
    )
    columns = {"image": [Image.fromarray(p) for p in PIXELS], "label": LABELS}
    table = datasets.Dataset.from_dict(columns, features=features)
    samples = opened(datasets.DatasetDict({"train": table, "test": table}), "val")
    assert samples.classes == ("a", "b", "c")
    assert samples.labels.tolist() == [1, 0, 2] * 4
    assert np.array_equal(np.array(samples.image(3)), PIXELS[3])


def test_one_set_is_divided_and_nothing_is_lost() -> None:
    data = list(zip(PIXELS, LABELS, strict=True))
    train, val = (opened(data, split, val_fraction=0.25) for split in ("train", "val"))
    names = [one.name(i) for one in (train, val) for i in range(len(one))]
    assert len(val) == 3 and sorted(names) == sorted(f"train/{i}" for i in range(12))
    for place in range(3):
        there = int(val.name(place).removeprefix("train/"))
        assert np.array_equal(np.array(val.image(place)), PIXELS[there])
        assert val.labels[place] == LABELS[there]
    with pytest.raises(DataError, match=r"data\.val_fraction"):
        opened(data, "val")


def test_names_as_labels_are_classes_in_order() -> None:
    named = [(p, "ant" if label else "cat") for p, label in zip(PIXELS, LABELS, strict=True)]
    samples = opened({"train": named})
    assert samples.classes == ("ant", "cat")
    assert samples.labels.tolist() == [1, 0, 0] * 4


def test_the_name_follows_what_was_handed_over() -> None:
    data = list(zip(PIXELS, LABELS, strict=True))
    other_pixel, other_label = PIXELS.copy(), [*LABELS[:-1], 0]
    other_pixel[7, 3, 3, 0] ^= 1
    names = {
        give({"train": data}),
        give({"train": list(zip(PIXELS.copy(), LABELS, strict=True))}),
        give({"train": list(zip(other_pixel, LABELS, strict=True))}),
        give({"train": list(zip(PIXELS, other_label, strict=True))}),
    }
    assert len(names) == 3


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"train": []}, "0 images"),
        ({"tests": [(PIXELS[0], 0)]}, "a part called tests"),
        ({}, "holds no images"),
        ({"train": [(PIXELS[0] / 255.0, 0)]}, "float64, not pixels"),
        ({"train": [(PIXELS[:2], 0)]}, "the shape"),
        ({"train": [(PIXELS[0], -1)]}, "labels from -1"),
        ({"train": [(PIXELS[0], 0), (PIXELS[0], "a")]}, "numbers and names"),
        ({"train": [PIXELS[0], 3]}, "no sequence of"),
        ({"train": (pair for pair in [(PIXELS[0], 0)])}, "no length"),
        (7, "no length"),
        ({"train": [(3.5, 0)]}, "float, no image"),
    ],
)
def test_what_is_no_set_of_images_is_told(data: object, says: str) -> None:
    with pytest.raises(DataError, match=says):
        give(data)


def test_a_broken_file_names_its_place(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(encoded(PIXELS[0])[:40])
    with pytest.raises(BadImageError, match="train/1"):
        give({"train": [(encoded(PIXELS[0]), 0), (broken, 1)]})
