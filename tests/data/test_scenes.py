import hashlib

import numpy as np
import pytest

from care_compress.data import scenes
from care_compress.data.loader import BadImages, prepared_batches
from care_compress.data.scenes import CLASSES, SIZE, Scenes, boxes_of, mask_of, render
from care_compress.data.sources import open_annotated, open_samples
from care_compress.errors import DataError
from care_compress.recipe.sections import DataSection

DATA = DataSection(source="builtin:scenes", resolution=SIZE, workers=0)


@pytest.fixture(autouse=True)
def small_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(scenes, "COUNTS", {"train": 40, "val": 24})


# Another digest is another data set: raise scenes.VERSION, and train its weights again.
@pytest.mark.parametrize(
    ("split", "expected"), [("train", "8f1ab8b2c80060f6"), ("val", "0f10e2cdb461b0de")]
)
def test_the_bits_are_the_stored_ones(split, expected):
    digest = hashlib.sha256(render(split, range(32)).tobytes()).hexdigest()[:16]
    assert (scenes.VERSION, digest) == ("v1", expected)


def test_an_image_does_not_depend_on_its_neighbours():
    together = render("val", range(5))
    np.testing.assert_array_equal(render("val", [3])[0], together[3])


def test_boxes_are_around_what_the_mask_shows():
    masks, boxes = (open_annotated(DATA, "val", kind) for kind in ("masks", "boxes"))
    assert masks.classes == ("background", *CLASSES) and boxes.classes == CLASSES
    crowds = 0
    for index in range(len(masks)):
        mask, found = masks.annotation(index), boxes.annotation(index)
        assert mask.shape == (SIZE, SIZE) and mask.max() <= len(CLASSES)
        assert found.size == (SIZE, SIZE) and len(found) <= 7
        inside = np.zeros((SIZE, SIZE), bool)
        for corners, label in zip(found.corners.astype(int), found.classes, strict=True):
            x1, y1, x2, y2 = corners
            window = mask[y1:y2, x1:x2] == label + 1
            inside[y1:y2, x1:x2] |= window
            for edge in (window[0], window[-1], window[:, 0], window[:, -1]):
                assert edge.any(), "no side of a box is too far out"
        assert (inside == (mask > 0)).all(), "every pixel of an object is in a box of its class"
        crowds += found.crowd.sum()
    assert 0 < crowds < 24


def test_scenes_are_of_every_class_and_of_small_and_large_objects():
    scene = Scenes("train", "boxes")
    found = [scene.annotation(index) for index in range(len(scene))]
    counts = np.bincount(np.concatenate([one.classes for one in found]), minlength=len(CLASSES))
    assert (counts > 10).all()
    sides = np.concatenate([one.corners[:, 2] - one.corners[:, 0] for one in found])
    assert np.percentile(sides, 25) < 14 and np.percentile(sides, 90) > 28


def test_codes_are_read_as_they_were_written():
    shown = np.zeros((4, 6), np.uint8)
    shown[1:3, 2:4] = 1 | 5 << 3
    shown[0, 5] = 2 | 0 << 3 | 64
    boxes = boxes_of(shown)
    order = np.argsort(boxes.classes)
    assert boxes.corners[order].tolist() == [[5, 0, 6, 1], [2, 1, 4, 3]]
    assert boxes.classes[order].tolist() == [0, 5] and boxes.crowd[order].tolist() == [True, False]
    assert mask_of(shown)[1, 2] == 6 and mask_of(shown)[0, 5] == 1 and mask_of(shown)[3, 0] == 0


def test_the_loader_serves_scenes():
    samples = open_annotated(DATA, "val", "masks")
    (batch,) = prepared_batches(samples, DATA, 24, bad=BadImages())
    assert batch.images.shape == (24, 3, SIZE, SIZE) and len(batch.annotations) == 24
    np.testing.assert_array_equal(batch.annotations[5], samples.annotation(5))


def test_what_scenes_are_not_for():
    with pytest.raises(DataError, match="no class for a whole image"):
        open_samples(DATA, "val")
    with pytest.raises(DataError, match="builtin:shapes has no masks.*builtin:scenes"):
        open_annotated(DataSection(source="builtin:shapes"), "val", "masks")
    with pytest.raises(DataError, match="leave out data.val_fraction"):
        open_annotated(DATA.model_copy(update={"val_fraction": 0.1}), "val", "masks")
