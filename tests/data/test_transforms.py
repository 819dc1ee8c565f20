import math
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from care_compress.data.transforms import (
    EvalTransform,
    TrainTransform,
    normalize,
    random_crop_box,
    to_rgb,
)
from care_compress.recipe.sections import AugmentSection

SAMPLES = Path(__file__).parents[3] / "shared" / "data" / "imagenet-samples.zip"
STORED = Path(__file__).parents[1] / "support" / "data" / "eval_pixels.npz"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def synthetic(width: int, height: int) -> Image.Image:
    """Waves of different frequencies and a hard edge, from integer arithmetic alone."""
    y, x = np.mgrid[:height, :width]
    red = (x * x // 7 + y * 3) % 256
    green = (x * y // 5 + x) % 256
    blue = np.where(x + y > (width + height) // 2, 255 - red, green)
    return Image.fromarray(np.stack([red, green, blue], axis=2).astype(np.uint8))


def straightforward(image: Image.Image, resolution: int, crop_pct: float) -> np.ndarray:
    """timm's evaluation written out: Resize, CenterCrop, ToTensor, Normalize on float32."""
    image = image.convert("RGB")
    size = math.floor(resolution / crop_pct)
    width, height = image.size
    short, long = min(width, height), max(width, height)
    new_short, new_long = size, int(size * long / short)
    new_width, new_height = (new_short, new_long) if width <= height else (new_long, new_short)
    image = image.resize((new_width, new_height), Image.BICUBIC)
    top = int(round((new_height - resolution) / 2.0))
    left = int(round((new_width - resolution) / 2.0))
    image = image.crop((left, top, left + resolution, top + resolution))
    chw = torch.from_numpy(np.array(image).transpose(2, 0, 1).copy()).float() / 255
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((chw - mean) / std).numpy()


def ours(image: Image.Image, resolution: int, crop_pct: float) -> np.ndarray:
    pixels = EvalTransform(resolution, crop_pct)(image)
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, resolution, resolution)
    return normalize(pixels[None], MEAN, STD)[0].numpy()


@given(st.integers(8, 300), st.integers(8, 300), st.integers(32, 80), st.floats(0.5, 1))
@settings(max_examples=60, deadline=None)
def test_evaluation_pixels_equal_the_straightforward_ones(width, height, resolution, crop_pct):
    image = synthetic(width, height)
    expected = straightforward(image, resolution, crop_pct)
    np.testing.assert_array_equal(ours(image, resolution, crop_pct), expected)


def test_evaluation_pixels_of_real_photographs():
    if not SAMPLES.is_file():
        pytest.skip("the ImageNet samples are not on this machine")
    with zipfile.ZipFile(SAMPLES) as archive:
        names = archive.namelist()
        assert len(names) == 64
        for name in names:
            image = Image.open(BytesIO(archive.read(name)))
            expected = straightforward(image, 224, 0.875)
            np.testing.assert_array_equal(ours(image, 224, 0.875), expected, err_msg=name)


def test_evaluation_pixels_equal_stored_ones():
    """Holds the Pillow and torch of this machine to the values stored with the code."""
    stored = np.load(STORED)
    pixels = ours(synthetic(301, 207), 64, 0.875)
    np.testing.assert_array_equal(pixels[:, ::7, ::7], stored["landscape"])
    pixels = ours(synthetic(90, 211), 64, 1.0)
    np.testing.assert_array_equal(pixels[:, ::7, ::7], stored["portrait"])


def test_native_resolution_changes_nothing():
    image = synthetic(64, 64)
    pixels = EvalTransform(64, 1.0)(image)
    np.testing.assert_array_equal(pixels.numpy(), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalize_keeps_the_memory_format(memory_format):
    images = torch.arange(2 * 3 * 16 * 16).remainder(256).to(torch.uint8).view(2, 3, 16, 16)
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    expected = (images.float() / 255 - mean) / std
    result = normalize(images.contiguous(memory_format=memory_format), MEAN, STD)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=memory_format)
    assert torch.equal(result, expected)


GREY = np.array([[0, 60], [128, 255]], np.uint8)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "I", "F"])
def test_any_mode_becomes_rgb(mode):
    image = Image.fromarray(GREY).convert("L" if mode == "I" else mode)
    if mode == "I":
        image = Image.fromarray(GREY.astype(np.int32) * 257)
    result = to_rgb(image)
    assert result.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(result), np.stack([GREY] * 3, axis=2))


def test_bilevel_and_cmyk_become_rgb():
    assert to_rgb(Image.new("1", (1, 1), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert to_rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)


def test_16_bit_grey_is_scaled_not_clipped():
    wide = np.array([[0, 128, 129, 257], [32768, 65406, 65407, 65535]], np.uint16)
    buffer = BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    image = Image.open(buffer)
    assert image.mode == "I;16"
    expected = [[0, 0, 1, 1], [128, 254, 255, 255]]
    np.testing.assert_array_equal(np.asarray(to_rgb(image))[:, :, 0], expected)


@pytest.mark.parametrize("transparency", [0, b"\x00\x80"])
def test_palette_with_transparency_keeps_its_colours(transparency, recwarn):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = transparency
    result = to_rgb(image)
    assert [result.getpixel((x, 0)) for x in (0, 1)] == [(10, 20, 30), (40, 50, 60)]
    assert not recwarn


def test_first_frame_of_an_animation():
    buffer = BytesIO()
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    pixels = EvalTransform(32, 1.0)(Image.open(buffer))
    assert pixels[:, 16, 16].tolist() == [255, 0, 0]


def rotated_by_exif() -> Image.Image:
    image = Image.new("RGB", (80, 40), "red")
    image.paste("blue", (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    buffer = BytesIO()
    image.save(buffer, "JPEG", exif=exif, quality=95)
    return Image.open(buffer)


def test_exif_orientation_is_followed_only_when_asked():
    image = rotated_by_exif()
    as_stored = EvalTransform(32, 1.0)(image)
    upright = EvalTransform(32, 1.0, exif_rotate=True)(image)
    assert as_stored[2, 16, 4] > 200 > 50 > as_stored[2, 16, 28]  # blue left, red right
    assert upright[2, 4, 16] > 200 > 50 > upright[2, 28, 16]  # blue above, red below
    train = TrainTransform(32, AugmentSection(scale=(1, 1), ratio=(0.5, 0.5)), exif_rotate=True)
    assert train(image, (0, 0, 0))[2, 4, 16] > 200


def test_unreadable_exif_is_no_error():
    image = Image.new("RGB", (40, 40))
    image.info["exif"] = b"Exif\x00\x00not a tiff header"
    assert EvalTransform(32, 1.0, exif_rotate=True)(image).shape == (3, 32, 32)


ALL_ON = AugmentSection(jitter=0.4, erase=0.5)


def test_training_pixels_depend_on_every_part_of_the_key_and_on_nothing_else():
    image = synthetic(90, 70)
    transform = TrainTransform(32, ALL_ON)
    first = transform(image, (1, 2, 3))
    np.random.seed(7)
    torch.manual_seed(7)
    assert torch.equal(transform(image, (1, 2, 3)), first)
    for other in [(0, 2, 3), (1, 0, 3), (1, 2, 0)]:
        assert not torch.equal(transform(image, other), first)


def test_training_crop_is_the_crop_resized():
    image = synthetic(90, 70)
    only_crop = AugmentSection(flip=0.0)
    rng = np.random.default_rng((5, 0, 9))
    box = random_crop_box(image.size, only_crop.scale, only_crop.ratio, rng)
    expected = np.asarray(image.crop(box).resize((32, 32), Image.BICUBIC)).transpose(2, 0, 1)
    pixels = TrainTransform(32, only_crop)(image, (5, 0, 9))
    np.testing.assert_array_equal(pixels.numpy(), expected)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 1000))
@settings(max_examples=200, deadline=None)
def test_crop_boxes_lie_inside_the_image(width, height, seed):
    box = random_crop_box((width, height), (0.08, 1), (3 / 4, 4 / 3), np.random.default_rng(seed))
    assert 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height


def test_crop_areas_and_ratios_follow_the_recipe():
    rng = np.random.default_rng(0)
    boxes = np.array(
        [random_crop_box((500, 500), (0.2, 0.5), (0.8, 1.25), rng) for _ in range(400)]
    )
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert 0.19 < (w * h / 250_000).min() < 0.22 and 0.48 < (w * h / 250_000).max() < 0.51
    assert 0.79 < (w / h).min() < 0.83 and 1.2 < (w / h).max() < 1.26


def test_impossible_crops_fall_back_to_the_centre():
    rng = np.random.default_rng(0)
    assert random_crop_box((1000, 10), (1, 1), (3 / 4, 4 / 3), rng) == (493, 0, 506, 10)
    assert random_crop_box((10, 1000), (1, 1), (3 / 4, 4 / 3), rng) == (0, 493, 10, 506)


def share_of_changed(augment: AugmentSection) -> float:
    image = synthetic(40, 40)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    transform = TrainTransform(40, augment.model_copy(update=whole))
    untouched = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    same = [torch.equal(transform(image, (0, 0, index)), untouched) for index in range(200)]
    return 1 - sum(same) / len(same)


def test_flip_and_erase_come_as_often_as_asked():
    assert share_of_changed(AugmentSection(flip=0.0)) == 0
    assert share_of_changed(AugmentSection(flip=0.3)) == pytest.approx(0.3, abs=0.1)
    assert share_of_changed(AugmentSection(flip=0.0, erase=0.3)) == pytest.approx(0.3, abs=0.1)
    assert share_of_changed(AugmentSection(flip=0.0, jitter=0.5)) > 0.95


def test_flip_is_a_mirror():
    image = synthetic(40, 40)
    whole = AugmentSection(scale=(1, 1), ratio=(1, 1), flip=0.999)
    pixels = TrainTransform(40, whole)(image, (0, 0, 0))
    mirrored = np.asarray(image)[:, ::-1].transpose(2, 0, 1)
    np.testing.assert_array_equal(pixels.numpy(), mirrored)


def test_jitter_goes_both_ways_and_as_far_as_it_says() -> None:
    """Brightness, contrast and colour of a grey image: only the first moves its mean."""
    grey = Image.new("RGB", (8, 8), (100, 100, 100))
    augment = AugmentSection(scale=(1.0, 1.0), flip=0.0, jitter=0.4)
    transform = TrainTransform(8, augment)
    means = np.array([float(transform(grey, (0, i)).float().mean()) for i in range(400)])
    assert 58 <= means.min() < 65 and 135 < means.max() <= 142
    assert means.mean() == pytest.approx(100, abs=3)
