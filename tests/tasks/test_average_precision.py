"""mAP is COCO's, and its drops are told as surely as the images allow, not more."""

import dataclasses

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from care_compress.data.annotations import Boxes
from care_compress.device.boxes import Detections
from care_compress.errors import DataError, EvaluationError
from care_compress.libraries import silent
from care_compress.tasks.average_precision import (
    ClassMatches,
    Matches,
    _as_coco,
    curve_areas,
    match_boxes,
    precision_drop,
    precision_of,
)

SIZE = (200, 300)
CLASSES = 3


def scene(rng: np.random.Generator, objects: int = 6, crowd: float = 0.0) -> Boxes:
    near = rng.uniform(0, 150, (objects, 2))
    corners = np.hstack([near, near + rng.uniform(8, 140, (objects, 2))]).astype(np.float32)
    # The last class is rare.
    classes = rng.choice(CLASSES, objects, p=(0.6, 0.35, 0.05))
    return Boxes(corners, classes, rng.random(objects) < crowd, SIZE)


def seen(rng: np.random.Generator, labels: Boxes, noise: float = 3.0, false: int = 4) -> Detections:
    """Most objects, each a little wrong, some twice, and what is not there."""
    rows = np.flatnonzero(rng.random(len(labels)) < 0.8)
    rows = np.concatenate([rows, rows[:1]])
    guesses = scene(rng, false)
    corners = np.concatenate([labels.corners[rows], guesses.corners])
    corners = corners + rng.normal(0, noise, corners.shape).astype(np.float32)
    corners[:, 2:] = np.maximum(corners[:, 2:], corners[:, :2] + 1)
    classes = np.concatenate([labels.classes[rows], guesses.classes])
    # Few different scores, so that ties between images occur.
    scores = np.concatenate([rng.beta(4, 2, len(rows)), rng.beta(2, 4, false)]).round(2)
    order = np.argsort(-scores, kind="stable")
    return Detections(corners[order], scores[order].astype(np.float32), classes[order])


def data(seed: int, images: int, crowd: float = 0.0) -> tuple[list[Detections], list[Boxes]]:
    rng = np.random.default_rng(seed)
    labels = [scene(rng, int(rng.integers(0, 9)), crowd) for _ in range(images)]
    return [seen(rng, one) for one in labels], labels


@pytest.mark.parametrize("crowd", [0.0, 0.3])
def test_the_whole_coco_evaluation_gives_the_same_numbers(crowd: float) -> None:
    found, labels = data(0, 40, crowd)
    with silent():
        full = COCOeval(_as_coco(labels, CLASSES), _as_coco(found, CLASSES), "bbox")
        full.evaluate()
        full.accumulate()
        full.summarize()
    precision = precision_of(match_boxes(found, labels, CLASSES))
    assert 20 < precision.map < precision.map50 < 95
    assert precision.map == pytest.approx(100 * full.stats[0], abs=1e-9)
    assert precision.map50 == pytest.approx(100 * full.stats[1], abs=1e-9)
    per_class = full.eval["precision"][0, :, :, 0, -1].mean(axis=0)
    assert precision.per_class == pytest.approx(100 * per_class, abs=1e-9)
    quick = precision_of(match_boxes(found, labels, CLASSES, ious=(0.5,)))
    assert quick.map50 == pytest.approx(precision.map50)


def test_perfect_boxes_have_all_of_it_and_none_has_nothing() -> None:
    _, labels = data(0, 10)
    perfect = [Detections(b.corners, np.ones(len(b), np.float32), b.classes) for b in labels]
    nothing = [dataclasses.replace(one, broken=False).surer(2.0) for one in perfect]
    assert precision_of(match_boxes(perfect, labels, CLASSES)).map == pytest.approx(100)
    assert precision_of(match_boxes(nothing, labels, CLASSES)).map == 0


def test_a_class_that_no_image_has_is_left_out_of_the_mean() -> None:
    found, labels = data(0, 20)
    more = precision_of(match_boxes(found, labels, CLASSES + 1))
    known = precision_of(match_boxes(found, labels, CLASSES))
    assert more.map50 == known.map50 and np.isnan(more.per_class[-1])


@pytest.mark.parametrize("crowd", [0.0, 0.3])
def test_an_image_drawn_twice_counts_as_two_images(crowd: float) -> None:
    """Against pycocotools' matches of a set that really holds it twice."""
    found, labels = data(3, 12, crowd)
    counts = np.random.default_rng(0).multinomial(12, np.full(12, 1 / 12), size=3).astype(np.int32)
    drawn = curve_areas(match_boxes(found, labels, CLASSES), counts)
    for row, times in enumerate(counts):
        chosen = np.repeat(np.arange(12), times)
        repeated = match_boxes(
            [found[one] for one in chosen], [labels[one] for one in chosen], CLASSES
        )
        whole = curve_areas(repeated, np.ones((1, 12), np.int32))[0]
        # Boxes of one score lie in another order.
        np.testing.assert_allclose(drawn[row], whole, atol=0.02)


def test_a_set_without_objects_or_answers_is_an_error() -> None:
    found, labels = data(0, 3)
    empty = [Boxes(one.corners[:0], one.classes[:0], one.crowd[:0], SIZE) for one in labels]
    with pytest.raises(DataError, match="no image has a box"):
        precision_of(match_boxes(found, empty, CLASSES))
    broken = [dataclasses.replace(one.surer(2.0), broken=True) for one in found]
    with pytest.raises(EvaluationError, match="NaN or infinity to all 3"):
        precision_of(match_boxes(broken, labels, CLASSES))
    assert precision_of(match_boxes([found[0], *broken[1:]], labels, CLASSES)).broken == 2


def test_equal_models_have_no_drop_but_are_not_known_to_be_equal() -> None:
    """The rarest class says least: the interval is as wide as its few objects leave it."""
    found, labels = data(0, 60)
    matches = match_boxes(found, labels, CLASSES)
    value, low, high = precision_drop(matches, matches, resamples=100).map50
    rarest = min(int(one.wanted_I.sum()) for one in matches.classes)
    assert value == 0 and low == -high
    assert high >= 100 * 3.68 / (CLASSES * rarest)
    more = match_boxes(found * 4, labels * 4, CLASSES)
    assert precision_drop(more, more, resamples=100).map50[2] == pytest.approx(high / 4)


def test_less_evidence_never_looks_surer() -> None:
    """One object lost leaves an interval that is no narrower than none lost."""
    found, labels = data(0, 60)
    before = match_boxes(found, labels, CLASSES)
    lost = [found[0].surer(float(found[0].scores[0]) + 0.001), *found[1:]]
    _, low, high = precision_drop(before, match_boxes(lost, labels, CLASSES)).map50
    _, equal_low, equal_high = precision_drop(before, before).map50
    assert high - low >= equal_high - equal_low
    assert high > equal_high


def test_a_drop_and_its_mirror_have_mirrored_intervals() -> None:
    found, labels = data(0, 80)
    rng = np.random.default_rng(1)
    moved = [
        dataclasses.replace(one, corners=one.corners + rng.normal(0, 10, one.corners.shape))
        for one in found
    ]
    one, two = (match_boxes(each, labels, CLASSES) for each in (found, moved))
    drop, mirrored = precision_drop(one, two), precision_drop(two, one)
    for (value, low, high), (back, back_low, back_high) in (
        (drop.map, mirrored.map),
        (drop.map50, mirrored.map50),
    ):
        assert (value, low, high) == pytest.approx((-back, -back_high, -back_low), abs=1e-9)
        assert low < value < high
    assert drop.map[1] > 0, "boxes that moved by so much are worse"
    assert precision_drop(one, two) == drop, "the resamples have a fixed seed"


def only_right(there_IO: np.ndarray, classes_O: np.ndarray) -> Matches:
    """Matches of a model that finds some objects, the same number in each image, and no more."""
    images = len(there_IO)
    parts = []
    for place in range(2):
        own = there_IO[:, classes_O == place]
        at = np.nonzero(own)[0]
        right = np.ones((1, len(at)), np.bool_)
        parts.append(ClassMatches(at, right, right, np.full(images, own.shape[1])))
    return Matches(images, 0, tuple(parts))


@pytest.mark.parametrize(("turning", "images"), [(0.0, 60), (0.01, 60), (0.1, 60), (0.1, 300)])
def test_the_interval_covers_the_drop(turning: float, images: int) -> None:
    """Objects of two classes are lost or found anew by chance; AP without false boxes is recall."""
    rng, classes, covered = np.random.default_rng(0), np.array([0, 0, 0, 1]), []
    truth = 100 * (0.9 * turning - 0.1 * turning / 2)
    for _ in range(100):
        before = rng.random((images, 4)) < 0.9
        # An object that was found is lost with `turning`; one that was not, found with a half.
        found_anew = rng.random((images, 4)) < turning / 2
        after = np.where(before, rng.random((images, 4)) >= turning, found_anew)
        matches = [only_right(one, classes) for one in (before, after)]
        _, low, high = precision_drop(*matches, resamples=100).map50
        covered.append(low <= truth <= high)
    print(f"{images} images, {turning:.0%} turning: covered {np.mean(covered):.3f}")
    assert np.mean(covered) >= 0.94
