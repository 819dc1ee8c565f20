"""A detector's output as boxes of an image: on a board as in the product."""

import numpy as np
import pytest
from PIL import Image

from care_compress.data.letterbox import Letterbox
from care_compress.device.boxes import (
    MOST,
    Detections,
    draw_boxes,
    find_boxes,
    overlaps,
    suppress,
)
from care_compress.device.drawing import READABLE

SQUARE = Letterbox.of((100, 100), 100)


def output(rows: list[tuple[float, ...]], places: int = 0) -> np.ndarray:
    """An output (4 + K, N) whose places are these rows of corners and logits, and empty ones."""
    classes = len(rows[0]) - 4
    empty = [(0.4, 0.4, 0.6, 0.6, *[-20.0] * classes)] * places
    return np.array([*rows, *empty], np.float32).T


def test_boxes_come_back_to_the_image_they_were_seen_in() -> None:
    """An image of 200 x 100 fills the middle half of the square."""
    square = Letterbox.of((100, 200), 64)
    found = find_boxes(output([(0.25, 0.5, 0.5, 0.75, 2.0, -9.0)], places=20), square)
    assert found.corners.tolist() == [pytest.approx([50, 50, 100, 100])]
    assert found.classes.tolist() == [0]
    assert found.scores.tolist() == pytest.approx([1 / (1 + np.exp(-2.0))])


def test_boxes_end_at_the_image() -> None:
    """What reaches into a bar is cut, and what lies in it is no box."""
    square = Letterbox.of((100, 200), 64)
    rows = [(-0.5, 0.0, 0.5, 1.5, 3.0), (0.1, 0.0, 0.9, 0.2, 2.0), (0.1, 0.1, 0.9, 0.25, 2.0)]
    found = find_boxes(output(rows), square)
    assert found.corners.tolist() == [pytest.approx([0, 0, 100, 100])]


def test_one_object_is_found_once_for_each_class() -> None:
    """The surest box removes its like, but none of another class or that hardly overlaps."""
    rows = [
        (0.10, 0.10, 0.50, 0.50, 1.0, -9.0),
        (0.11, 0.10, 0.50, 0.50, 3.0, 0.5),
        (0.10, 0.30, 0.50, 0.70, 0.0, -9.0),
    ]
    found = find_boxes(output(rows), SQUARE)
    assert found.classes.tolist() == [0, 1, 0]
    tops = found.corners[:, :2]
    np.testing.assert_allclose(tops, [[11, 10], [11, 10], [10, 30]], rtol=1e-5)
    assert (np.diff(found.scores) < 0).all()


def test_suppression_is_that_of_the_textbook() -> None:
    rng = np.random.default_rng(0)
    near = rng.uniform(0, 60, (300, 2))
    corners = np.hstack([near, near + rng.uniform(5, 40, (300, 2))]).astype(np.float32)
    classes = rng.integers(0, 3, 300)
    stay: list[int] = []
    for row in range(300):
        rivals = [one for one in stay if classes[one] == classes[row]]
        if not any(overlaps(corners[[one]], corners[[row]])[0, 0] > 0.6 for one in rivals):
            stay.append(row)
    assert len(stay) > MOST
    assert suppress(corners, classes).tolist() == stay[:MOST]


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 5])
def test_an_output_that_is_no_number_says_nothing(number: float, row: int) -> None:
    broken = output([(0.1, 0.1, 0.5, 0.5, 5.0, 1.0)], places=3)
    broken[row, 2] = number
    found = find_boxes(broken, SQUARE)
    assert found.broken and len(found) == 0


def test_nothing_found_is_an_answer() -> None:
    found = find_boxes(output([(0.1, 0.1, 0.5, 0.5, -20.0)]), SQUARE)
    assert not found.broken and len(found) == 0 and found.corners.shape == (0, 4)


def test_float16_outputs_are_read_in_float32() -> None:
    """Pixels of a large square are more than float16 tells apart."""
    rows = [(0.2501, 0.25, 0.75, 0.75, 3.0)]
    square = Letterbox.of((4096, 4096), 4096)
    half = find_boxes(output(rows).astype(np.float16), square)
    assert half.corners.dtype == np.float32
    assert half.corners[0, 2] == pytest.approx(3072)


@pytest.mark.parametrize("size", [(40, 30), (640, 480)])
def test_a_drawing_shows_each_box(size: tuple[int, int]) -> None:
    """Small images are enlarged, in proportion; unsure boxes are left out."""
    image = Image.new("L", size, 128)
    width, height = size
    corners = np.array([[0.2, 0.4, 0.6, 0.9], [0.7, 0.0, 1.0, 0.3]], np.float32)
    corners *= [width, height, width, height]
    sure = Detections(corners, np.array([0.9, 0.5], np.float32), np.array([0, 12]))
    names = [f"a rather long name of class {place}" for place in range(13)]
    picture = draw_boxes(image, sure, names)
    assert max(picture.size) >= READABLE
    assert picture.width / picture.height == width / height
    changed = np.asarray(picture) != 128
    for x1, y1, x2, y2 in corners * picture.width / width:
        sides = changed.any(axis=2)
        middle = int((x1 + x2) / 2), int((y1 + y2) / 2)
        assert sides[middle[1], max(0, int(x1) - 1) : int(x1) + 3].any()
        assert sides[min(int(y2), picture.height - 1) - 2 : int(y2) + 2, middle[0]].any()
        assert not sides[int(0.9 * y2 + 0.1 * y1), middle[0]]
    unsure = Detections(corners, np.array([0.2, 0.1], np.float32), np.array([0, 1]))
    assert (np.asarray(draw_boxes(image, unsure, names)) == 128).all()
