import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from care_compress.data.annotations import IGNORED, Boxes
from care_compress.data.letterbox import Letterbox
from care_compress.device.letterbox import GREY

SIDES = st.integers(1, 700)


def test_a_wide_image_lies_between_bars():
    box = Letterbox.of((360, 480), 256)
    assert (box.left, box.top, box.width, box.height) == (0, 32, 256, 192)
    assert box.window == (slice(32, 224), slice(0, 256))
    pixels = np.asarray(box.pixels(Image.new("RGB", (480, 360), (200, 10, 10))))
    assert pixels.shape == (256, 256, 3)
    assert (pixels[box.window] == (200, 10, 10)).all()
    assert (pixels[:32] == GREY).all() and (pixels[224:] == GREY).all()


def test_a_small_image_is_enlarged():
    box = Letterbox.of((20, 10), 100)
    assert (box.width, box.height, box.left, box.top) == (50, 100, 25, 0)
    mask = box.mask(np.full((20, 10), 3, np.uint8))
    assert (mask[box.window] == 3).all() and (mask[:, :25] == IGNORED).all()
    assert (mask == 3).sum() == 50 * 100


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, st.integers(32, 400), st.integers(0, 2**32))
def test_boxes_come_back_where_they_were(height, width, resolution, seed):
    box = Letterbox.of((height, width), resolution)
    rng = np.random.default_rng(seed)
    ends = np.sort(rng.random((5, 2, 2)), axis=1) * (width, height)
    corners = ends.reshape(5, 4).astype(np.float32)
    inside = box.inside(corners)
    rows, columns = box.window
    assert (inside[:, ::2] >= columns.start - 1e-3).all()
    assert (inside[:, 2] <= columns.stop + 1e-3).all() and (inside[:, 3] <= rows.stop + 1e-3).all()
    # The square has float32 pixels, of which one may be many of the image.
    tolerance = 1e-3 * max(1, max(height, width) / resolution)
    np.testing.assert_allclose(box.outside(inside), corners, atol=tolerance, rtol=1e-4)


def test_the_way_back_ends_at_the_image():
    box = Letterbox.of((50, 100), 64)
    back = box.outside(np.array([[-5, 0, 70, 64]], np.float32))
    np.testing.assert_allclose(back, [[0, 0, 100, 50]])


@pytest.mark.parametrize("size", [(33, 57), (64, 64), (90, 31)])
def test_a_mask_enlarged_and_cut_out_comes_back_whole(size):
    mask = np.random.default_rng(0).integers(9, size=size).astype(np.uint8)
    box = Letterbox.of(size, 3 * max(size))
    window = box.mask(mask)[box.window]
    back = Image.fromarray(window).resize(size[::-1], Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(back), mask)


def test_boxes_mask_and_pixels_are_moved_alike():
    """A bright block fills its box and its mask after letterboxing too."""
    mask = np.zeros((60, 90), np.uint8)
    mask[12:36, 30:66] = 1
    boxes = Boxes(
        np.array([[30, 12, 66, 36]], np.float32), np.array([0]), np.array([False]), (60, 90)
    )
    box = Letterbox.of((60, 90), 180)
    x1, y1, x2, y2 = map(int, box.annotation(boxes).corners[0])
    moved = box.annotation(mask)
    assert (moved[y1:y2, x1:x2] == 1).all() and (moved == 1).sum() == (y2 - y1) * (x2 - x1)
    image = np.repeat(mask[:, :, None] * np.uint8(255), 3, axis=2)
    pixels = np.asarray(box.pixels(Image.fromarray(image)))[:, :, 0]
    assert (pixels[y1 + 1 : y2 - 1, x1 + 1 : x2 - 1] == 255).all()
    assert (pixels[: y1 - 2][pixels[: y1 - 2] != GREY] == 0).all()


def test_the_thinnest_image_keeps_a_pixel():
    box = Letterbox.of((1, 4000), 64)
    assert box.height == 1 and box.mask(np.zeros((1, 4000), np.uint8)).min() == 0
    corners = np.array([[10, 0, 3000, 1]], np.float32)
    np.testing.assert_allclose(box.outside(box.inside(corners)), corners, atol=0.01)
