"""Masks over images: every class has a colour of its own, and what is no class stays grey."""

import numpy as np
import pytest
from PIL import Image

from care_compress.data.annotations import IGNORED
from care_compress.device.boxes import COLOURS
from care_compress.tasks.overlay import colour_of, draw_mask, legend_of

NAMES = ("background", "road", "car")


def test_colours_of_many_classes_differ_and_begin_as_those_of_boxes() -> None:
    colours = [colour_of(place) for place in range(150)]
    assert tuple(colours[: len(COLOURS)]) == COLOURS
    assert len(set(colours)) == 150


def test_each_class_has_its_colour_and_the_rest_is_grey() -> None:
    image = Image.new("RGB", (600, 400), (200, 20, 20))
    mask = np.zeros((400, 600), np.uint8)
    mask[:, 200:400], mask[:, 400:500], mask[:, 500:] = 1, 2, IGNORED
    drawn = np.asarray(draw_mask(image, mask, NAMES)).astype(int)
    assert drawn.shape == (400, 600, 3)
    for x in (100, 550):
        assert np.ptp(drawn[200, x]) == 0, "neither a class called background nor one unknown"
    for x, place in ((300, 1), (450, 2)):
        towards = np.array(colour_of(place)) - 80  # the mean of the image's pixels
        assert np.dot(drawn[200, x] - 80, towards) > 0.5 * np.dot(towards, towards)
    assert drawn[200, 199].max() < 40 < drawn[200, 198].min(), "a dark line between classes"
    assert legend_of(mask, NAMES) == {"road": colour_of(1), "car": colour_of(2)}
    assert legend_of(mask[:, :300], NAMES) == {"road": colour_of(1)}


def test_a_small_image_is_enlarged_and_a_mask_of_another_is_refused() -> None:
    image = Image.new("RGB", (100, 50))
    assert draw_mask(image, np.zeros((50, 100), np.uint8), NAMES).size == (500, 250)
    with pytest.raises(AssertionError):
        draw_mask(image, np.zeros((100, 50), np.uint8), NAMES)
