import numpy as np
import pytest
import torch
from PIL import Image

from care_compress.data.annotated_transforms import (
    LetterboxTransform,
    MovingTransform,
    evaluation_transform,
    training_transform,
)
from care_compress.data.annotations import Boxes
from care_compress.data.loader import BadImages, pixel_batches, prepared_batches, training_batches
from care_compress.data.transforms import EvalTransform, TrainTransform
from care_compress.errors import BadImageError, DataError
from care_compress.recipe.sections import AugmentSection, DataSection

AUGMENT = AugmentSection(scale=(0.4, 1.0), jitter=0.3, erase=0.3)


class Fake:
    """Thirty images of different sizes with a mask or boxes; some may be bad."""

    in_memory = False
    unlabelled = 0

    def __init__(self, kind, bad=(), wrong=()):
        self.kind = kind
        self.classes = ("a", "b", "c")
        self.labels = np.zeros(30, np.int64)
        self.bad = bad
        self.wrong = wrong

    def __len__(self):
        return 30

    def name(self, index):
        return f"fake/{index}"

    def size(self, index):
        return 30 + index, 40

    def image(self, index):
        height, width = self.size(index)
        y, x = np.mgrid[:height, :width]
        return Image.fromarray(np.stack([x * 5, y * 3, 0 * x + index], 2).astype(np.uint8))

    def annotation(self, index):
        height, width = self.size(index)
        if index in self.bad:
            raise BadImageError(f"the mask of {self.name(index)} is broken.", "mend it")
        if index in self.wrong:
            height += 1
        if self.kind == "masks":
            return np.full((height, width), index % 3, np.uint8)
        corners = np.array([[2, 3, 20, 25], [10, 10, 40, 30]], np.float32)[: index % 3]
        classes = np.arange(len(corners))
        return Boxes(corners, classes, classes == 1, (height, width))


def section(workers=0, **values):
    return DataSection(resolution=32, workers=workers, **values)


def train(samples, workers=0, start=0, stop=5, **values):
    data = section(workers, **values)
    return list(
        training_batches(
            samples,
            training_transform(samples, data, AUGMENT),
            8,
            data,
            seed=3,
            start_step=start,
            total_steps=stop,
            bad=BadImages(),
        )
    )


def evaluate(samples, workers=0, bad=None, **values):
    return list(
        prepared_batches(
            samples, section(workers, **values), 8, bad=BadImages() if bad is None else bad
        )
    )


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        for left, right in zip(a[:3], b[:3], strict=True):
            assert torch.equal(left, right)
        assert len(a.annotations) == len(b.annotations) == len(a.labels)
        for one, other in zip(a.annotations, b.annotations, strict=True):
            if isinstance(one, Boxes):
                np.testing.assert_array_equal(one.corners, other.corners)
                np.testing.assert_array_equal(one.classes, other.classes)
                np.testing.assert_array_equal(one.crowd, other.crowd)
                assert one.size == other.size
            else:
                np.testing.assert_array_equal(one, other)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("kind", ["masks", "boxes"])
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(kind, workers):
    assert_same(train(Fake(kind)), train(Fake(kind), workers))
    assert_same(evaluate(Fake(kind)), evaluate(Fake(kind), workers))


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_resuming_goes_on_where_it_stopped(kind):
    assert_same(train(Fake(kind))[2:], train(Fake(kind), start=2))


def test_training_moves_annotations_into_the_square():
    for batch in train(Fake("masks")):
        for index, mask in zip(batch.indices.tolist(), batch.annotations, strict=True):
            assert mask.shape == (32, 32)
            assert set(np.unique(mask)) <= {index % 3, 255} and (mask == index % 3).any()
    found = [one for batch in train(Fake("boxes")) for one in batch.annotations]
    assert all(one.size == (32, 32) for one in found)
    assert any(len(one) for one in found)
    assert all(
        one.corners.min(initial=0) >= 0 and one.corners.max(initial=0) <= 32 for one in found
    )


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_evaluation_hands_out_what_is_stored(kind):
    samples = Fake(kind)
    batches = evaluate(samples)
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    assert indices == list(range(30))
    for index, one in enumerate(one for batch in batches for one in batch.annotations):
        stored = samples.annotation(index)
        if kind == "masks":
            np.testing.assert_array_equal(one, stored)
        else:
            np.testing.assert_array_equal(one.corners, stored.corners)
            assert one.size == samples.size(index)
    (batch,) = pixel_batches(samples, section(), [7], 1, BadImages())
    expected = LetterboxTransform(32)(samples.image(7))
    assert torch.equal(batch.images[0], expected)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_mask_is_a_bad_image(workers):
    samples = Fake("masks", bad={4, 11})
    with pytest.raises(BadImageError, match="the mask of fake/4 is broken"):
        evaluate(samples, workers)
    bad = BadImages()
    batches = evaluate(samples, workers, bad, skip_bad_images=True)
    seen = torch.cat([batch.indices for batch in batches]).tolist()
    assert seen == [index for index in range(30) if index not in {4, 11}]
    assert sum(len(batch.annotations) for batch in batches) == 28
    assert set(bad.reasons) == {"fake/4", "fake/11"}


@pytest.mark.parametrize("kind", ["masks", "boxes"])
@pytest.mark.parametrize("go", [train, evaluate])
def test_an_annotation_of_another_size_always_stops(kind, go):
    samples = Fake(kind, wrong=range(30))
    with pytest.raises(DataError, match=r"fake/\d+ has 40 x \d+ pixels and"):
        go(samples, skip_bad_images=True)


def test_rotated_images_are_held_against_what_is_shown():
    class Rotated(Fake):
        def image(self, index):
            image = super().image(index)
            image.getexif()[0x0112] = 6
            return image

    with pytest.raises(DataError, match="pixels and a mask"):
        evaluate(Rotated("masks"), exif_rotate=True)
    assert evaluate(Rotated("masks"))


def test_the_transform_follows_from_the_samples():
    class Plain:
        classes = ("a",)

    data = section(crop_pct=0.9, exif_rotate=True)
    assert evaluation_transform(Plain(), data) == EvalTransform(32, 0.9, True)
    assert training_transform(Plain(), data, AUGMENT) == TrainTransform(32, AUGMENT, True)
    assert evaluation_transform(Fake("masks"), data) == LetterboxTransform(32, True)
    assert training_transform(Fake("masks"), data, AUGMENT) == MovingTransform(32, AUGMENT, True)
