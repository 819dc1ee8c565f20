import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from care_compress.data.transforms import EvalTransform, normalize
from care_compress.device.images import cropped_pixels, load_pixels, normalize_pixels, rgb_image
from care_compress.device.problems import ImageError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def random_image(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    width, height = (int(side) for side in rng.integers(9, 90, 2))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("crop_pct", [0.875, 0.9, 1.0])
@pytest.mark.parametrize("resolution", [16, 33])
def test_the_pixels_are_those_of_the_evaluation(resolution: int, crop_pct: float) -> None:
    evaluation = EvalTransform(resolution, crop_pct)
    for seed in range(25):
        image = random_image(seed)
        ours = cropped_pixels(rgb_image(image, exif_rotate=False), resolution, crop_pct)
        assert np.array_equal(ours, evaluation(image).numpy()), image.size


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1", "LA"])
def test_other_modes_too(mode: str) -> None:
    if mode == "I;16":
        values = np.random.default_rng(0).integers(0, 65536, (40, 50), dtype=np.uint16)
        image = Image.fromarray(values)
    else:
        image = random_image(3).convert(mode)
    expected = EvalTransform(16, 0.9)(image).numpy()
    assert np.array_equal(cropped_pixels(rgb_image(image, exif_rotate=False), 16, 0.9), expected)


def test_a_turned_photo_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    random_image(1).save(path, exif=exif)
    with Image.open(path) as image:
        expected = EvalTransform(16, 0.9, exif_rotate=True)(image).numpy()
    assert np.array_equal(load_pixels(path, 16, 0.9, exif_rotate=True), expected)
    assert not np.array_equal(load_pixels(path, 16, 0.9, exif_rotate=False), expected)


def test_the_floats_are_those_of_the_evaluation_bit_for_bit() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 9, 9), dtype=np.uint8)
    expected = normalize(torch.from_numpy(pixels), MEAN, STD).numpy()
    assert np.array_equal(normalize_pixels(pixels, MEAN, STD), expected)


def test_an_unreadable_image_and_a_missing_pillow_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match="a.jpg"):
        load_pixels(path, 16, 0.9, exif_rotate=False)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImageError, match="Pillow") as error:
        load_pixels(path, 16, 0.9, exif_rotate=False)
    assert "python3-pil" in error.value.fix
