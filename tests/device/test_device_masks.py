"""Letterboxes, masks and their comparison on a board are those of the product."""

import numpy as np
import pytest
import torch
from PIL import Image

from care_compress.data.annotated_transforms import LetterboxTransform
from care_compress.data.letterbox import Letterbox
from care_compress.device.answers import ANSWERS, LEAST_AGREEMENT
from care_compress.device.boxes import Detections, found_again
from care_compress.device.letterbox import ImageSquare
from care_compress.device.masks import draw_mask, find_mask, shares_of
from care_compress.tasks.segmentation import mask_of

SIZES = [(48, 64), (100, 37), (64, 64), (3, 200), (360, 480)]  # height, width


@pytest.mark.parametrize("size", SIZES)
def test_a_square_shows_what_the_evaluation_shows(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    square = ImageSquare.of(size, 64)
    assert np.array_equal(square.array(image), LetterboxTransform(64)(image).numpy())
    corners = rng.uniform(-8, 72, (20, 4)).astype(np.float32)
    assert np.array_equal(square.outside(corners), Letterbox.of(size, 64).outside(corners))


@pytest.mark.parametrize("size", SIZES)
def test_masks_are_those_that_are_scored(size: tuple[int, int]) -> None:
    logits = torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(0))
    found = find_mask(logits.numpy(), ImageSquare.of(size, 64))
    wanted = mask_of(logits, size, 64)
    # Sums are in another order: a pixel between two classes may fall on either side.
    assert (found != wanted).mean() < 0.001


def test_large_images_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 8, 8)).astype(np.float32)
    square = ImageSquare.of((50, 70), 32)
    whole = find_mask(logits, square)
    monkeypatch.setattr("care_compress.device.masks._NUMBERS_AT_ONCE", 4 * 70 * 7)
    assert np.array_equal(find_mask(logits, square), whole) and whole.shape == (50, 70)


def test_a_drawing_has_the_colours_of_its_classes_and_names_them() -> None:
    mask = np.zeros((40, 60), np.int64)
    mask[:, 30:] = 2
    picture = draw_mask(Image.new("RGB", (60, 40), (9, 9, 9)), mask, ["background", "a", "b"])
    assert shares_of(mask, 3) == [(0, 0.5), (2, 0.5)]
    pixels = np.asarray(picture)
    factor = pixels.shape[1] // 60
    assert factor == 8 and pixels.shape[0] > 40 * factor, "a list lies below the image"
    assert (pixels[: 40 * factor, : 30 * factor] == 9).all(), "what is behind has no colour"
    assert (pixels[: 40 * factor, 30 * factor :] > 9).any(axis=2).all()


def detections(*boxes: tuple[float, float, int]) -> Detections:
    """Boxes of ten pixels: left edge, score, class."""
    corners = [[left, 0, left + 10, 10] for left, _, _ in boxes]
    scores = [score for _, score, _ in boxes]
    kinds = [kind for _, _, kind in boxes]
    return Detections(
        np.array(corners, np.float32).reshape(-1, 4), np.array(scores, np.float32),
        np.array(kinds, np.int64),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("other", "again"),
    [
        ([(0, 0.9, 1)], 1),
        ([(1, 0.13, 1)], 1),  # at the bar it may fall on either side
        ([(1, 0.12, 1)], 0),
        ([(0, 0.9, 2)], 0),
        ([(4, 0.9, 1)], 0),
        ([], 0),
    ],
)
def test_a_box_is_found_again_if_its_like_is_there(
    other: list[tuple[float, float, int]], again: int
) -> None:
    assert found_again(detections((0, 0.9, 1), (50, 0.2, 1)), detections(*other)) == again


def test_masks_may_turn_where_noise_may_grow() -> None:
    masks = ANSWERS["segmentation"]
    assert masks.least_agreement(99.9, 1.0) == LEAST_AGREEMENT
    assert masks.least_agreement(98.0, 4.0) == 92.0
    assert masks.least_agreement(90.0, 10.0) == 80.0, "below that it is another mask"
    for task in ("classification", "detection"):
        assert ANSWERS[task].least_agreement(90.0, 10.0) == LEAST_AGREEMENT
