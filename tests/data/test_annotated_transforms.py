import numpy as np
import pytest
import torch
from PIL import Image

from care_compress.data.annotated_transforms import LetterboxTransform, MovingTransform
from care_compress.data.annotations import IGNORED, Boxes, check_size, flipped
from care_compress.device.letterbox import GREY
from care_compress.errors import DataError
from care_compress.recipe.sections import AugmentSection

WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


def block(height: int, width: int, x1: int, y1: int, x2: int, y2: int):
    """A white block on black: its image, its mask and its box."""
    mask = np.zeros((height, width), np.uint8)
    mask[y1:y2, x1:x2] = 1
    image = Image.fromarray(np.repeat(mask[:, :, None] * np.uint8(255), 3, axis=2))
    corners = np.array([[x1, y1, x2, y2]], np.float32)
    return image, mask, Boxes(corners, np.array([4]), np.array([True]), (height, width))


def moved(annotation, image, augment, key=(0, 0, 0), resolution=64):
    return MovingTransform(resolution, augment)(image, annotation, key)


@pytest.mark.parametrize("epoch", range(12))
def test_masks_and_boxes_stay_on_their_pixels(epoch):
    image, mask, boxes = block(60, 90, 20, 10, 70, 50)
    augment = AugmentSection(scale=(0.3, 1.0), ratio=(0.7, 1.5))
    pixels, square = moved(mask, image, augment, (3, epoch, 1))
    again, found = moved(boxes, image, augment, (3, epoch, 1))
    assert torch.equal(pixels, again)
    assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.uint8
    bright = pixels[0].numpy() > 127
    differs = (square == 1) != bright
    assert differs.sum() <= 1.5 * 64, "only along the edges"
    assert (pixels.numpy()[:, square == IGNORED] == GREY).all()
    if len(found):
        y, x = np.nonzero(square == 1)
        seen = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        np.testing.assert_allclose(found.corners[0], seen, atol=1.0)
        assert found.classes.tolist() == [4] and found.crowd.tolist() == [True]
        assert found.size == (64, 64)


def test_flipping_the_image_flips_the_annotation():
    image, mask, boxes = block(64, 64, 5, 10, 30, 40)
    straight, turned = (AugmentSection(flip=flip, **WHOLE) for flip in (0.0, 0.9999))
    for annotation in (mask, boxes):
        pixels, kept = moved(annotation, image, straight)
        mirrored, other = moved(annotation, image, turned)
        assert torch.equal(mirrored, pixels.flip(2))
        expected = flipped(kept)
        if isinstance(annotation, Boxes):
            np.testing.assert_array_equal(other.corners, expected.corners)
            np.testing.assert_array_equal(other.corners, [[34, 10, 59, 40]])
            np.testing.assert_array_equal(flipped(expected).corners, kept.corners)
        else:
            np.testing.assert_array_equal(other, expected)
            np.testing.assert_array_equal(flipped(other), kept)


def test_the_whole_image_is_what_evaluation_shows_somewhere_else():
    image, mask, _ = block(30, 60, 10, 5, 40, 20)
    pixels, square = moved(mask, image, AugmentSection(flip=0.0, **WHOLE))
    shown = LetterboxTransform(64)(image)
    top = int(np.nonzero((square != IGNORED).any(axis=1))[0][0])
    assert torch.equal(pixels[:, top : top + 32], shown[:, 16:48])


def test_a_box_of_which_little_is_left_is_left_out():
    counts = {True: 0, False: 0}
    augment = AugmentSection(scale=(0.25, 0.25), ratio=(1.0, 1.0), flip=0.0)
    image, mask, boxes = block(64, 64, 4, 24, 20, 40)
    for index in range(80):
        _, square = moved(mask, image, augment, (0, 0, index))
        _, found = moved(boxes, image, augment, (0, 0, index))
        share = (square == 1).sum() / 32**2  # of the block, twice as large now
        if abs(share - 0.2) > 0.05:
            assert len(found) == (share > 0.2)
            counts[share > 0.2] += 1
    assert min(counts.values()) > 3, "both cases are seen"


def test_draws_follow_from_the_key_alone():
    image, mask, _ = block(60, 90, 20, 10, 70, 50)
    augment = AugmentSection(jitter=0.4, erase=0.5)
    first, second = (moved(mask, image, augment, (1, 2, 3)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    other = moved(mask, image, augment, (1, 3, 3))
    assert not torch.equal(first[0], other[0])


def test_erasing_and_jitter_leave_the_annotation_and_the_bars_alone():
    image, mask, _ = block(30, 60, 10, 5, 40, 20)
    plain = moved(mask, image, AugmentSection(flip=0.0, **WHOLE))
    wild = moved(mask, image, AugmentSection(flip=0.0, jitter=0.9, erase=0.999, **WHOLE))
    assert np.array_equal(plain[1], wild[1]) and not torch.equal(plain[0], wild[0])
    assert (wild[0].numpy()[:, wild[1] == IGNORED] == GREY).all()


def test_an_image_without_objects_stays_one():
    image, _, boxes = block(30, 60, 10, 5, 40, 20)
    none = boxes.take(np.zeros(1, bool))
    _, found = moved(none, image, AugmentSection())
    assert len(found) == 0 and found.corners.shape == (0, 4)


def test_pixels_are_as_long_as_the_annotation_says():
    mask = np.zeros((4, 6), np.uint8)
    check_size(mask, (6, 4), "a.png")
    with pytest.raises(DataError, match="a.png has 4 x 6 pixels and a mask of 6 x 4.*exif_rotate"):
        check_size(mask, (4, 6), "a.png")
    with pytest.raises(DataError, match="a.png has 5 x 5 pixels.*its own size"):
        check_size(mask, (5, 5), "a.png")
