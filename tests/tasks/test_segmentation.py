"""Segmentation counted by hand: overlaps, what is ignored, letterboxes, intervals of a drop."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from care_compress.data.annotations import IGNORED, Mask
from care_compress.data.letterbox import Letterbox
from care_compress.data.loader import Batch
from care_compress.errors import DataError, EvaluationError
from care_compress.tasks.dense import Records, share_agreed
from care_compress.tasks.intervals import UNSEEN
from care_compress.tasks.segmentation import MaskRecord, MaskTargets, Segmentation, mask_of

TASK = Segmentation()
CLASSES = 4
NAN = torch.full((CLASSES, 3, 3), torch.nan)


def mask(*rows: tuple[int, ...]) -> Mask:
    return np.array(rows, np.uint8)


def saying(found: Mask, side: int, sure: float = 1.0) -> Tensor:
    """Logits (K, side, side) of a square input that say this of an image in its first rows."""
    square = np.zeros((side, side), np.int64)
    square[: found.shape[0], : found.shape[1]] = found
    return sure * F.one_hot(torch.from_numpy(square), CLASSES).permute(2, 0, 1).float()


# An image of 2 x 3 fills a square of three pixels but for its last row.
LABELLED = mask((0, 0, 1), (1, 2, IGNORED))
FOUND = mask((0, 1, 1), (1, 0, 2))
RECORD = TASK.record(saying(FOUND, 3), LABELLED, 3)


def counts(record: MaskRecord) -> list[list[int]]:
    """Pixels by class: right, found, labelled."""
    return [part.tolist() for part in (record.right_K, record.found_K, record.labelled_K)]


def test_overlaps_are_those_counted_by_hand() -> None:
    """0: one of three; 1: two of three; 2: none of one; 3 is nowhere. Three of five are right."""
    assert counts(RECORD) == [[1, 2, 0, 0], [2, 3, 0, 0], [2, 2, 1, 0]]
    figures = TASK.figures([RECORD])
    assert figures.values == pytest.approx({"miou": 100 / 3, "pixel_accuracy": 60.0})
    assert list(figures.values)[0] == TASK.metric.key, "the one that counts comes first"
    assert figures.per_class[:3] == pytest.approx((100 / 3, 200 / 3, 0.0))
    assert figures.per_class[3] is None, "nobody knows how well it is found"


def test_what_is_ignored_is_neither_right_nor_wrong() -> None:
    for answer in range(CLASSES):
        found = FOUND.copy()
        found[1, 2] = answer
        assert counts(TASK.record(saying(found, 3), LABELLED, 3)) == counts(RECORD)
    with pytest.raises(DataError, match="no mask has a pixel that counts.*ignore_index"):
        TASK.figures([TASK.record(saying(FOUND, 3), np.full((2, 3), IGNORED, np.uint8), 3)])


def test_a_class_that_is_found_where_it_is_not_counts_as_missed() -> None:
    """It has no label at all; that it is never found must not make it a class without a number."""
    figures = TASK.figures([TASK.record(saying(mask((0, 3), (0, 3)), 2), mask((0, 0), (0, 0)), 2)])
    assert figures.per_class == (50.0, None, None, 0.0) and figures.values["miou"] == 25.0


def test_pixels_add_up_over_images_before_they_are_divided() -> None:
    """A large image counts for its pixels; a mean of the images' overlaps would be another."""
    small = TASK.record(saying(mask((1,)), 1), mask((0,)), 1)
    large = TASK.record(saying(np.zeros((3, 3), np.uint8), 3), np.zeros((3, 3), np.uint8), 3)
    assert TASK.figures([small, large]).per_class[:2] == (90.0, 0.0)
    assert TASK.figures([large]).per_class[:2] == (100.0, None)


@pytest.mark.parametrize("size", [(20, 40), (40, 20), (64, 64), (8, 62), (300, 100)])
@pytest.mark.parametrize("stride", [1, 4])
def test_an_answer_comes_back_at_the_size_of_the_image(size: tuple[int, int], stride: int) -> None:
    """Bars around the image belong to nobody, whatever the network says of them."""
    halves = np.zeros(size, np.uint8)
    halves[:, size[1] // 2 :] = 1
    square = Letterbox.of(size, 64).mask(halves)
    square[square == IGNORED] = 2
    logits = F.one_hot(
        torch.from_numpy(square[stride // 2 :: stride, stride // 2 :: stride]).long(), CLASSES
    )
    found = mask_of(logits.permute(2, 0, 1).float(), size, 64)
    assert found.shape == size and found.dtype == np.uint8
    assert (found == halves).mean() > 1 - 0.05 * stride
    # But for a place of the network at the edge between the halves, and at those of the image.
    place = stride * max(size) / 64
    rows, columns = (np.arange(side) + 0.5 for side in size)
    inside = (rows > place) & (rows < size[0] - place)
    far = np.abs(columns - size[1] / 2)
    sure = (far > place) & (far < size[1] / 2 - place)
    assert (found[inside][:, sure] == halves[inside][:, sure]).all() and sure.sum() > 2


def test_a_part_of_an_answer_that_is_no_number_makes_it_broken() -> None:
    answer = saying(FOUND, 3)
    answer[3, 2, 2] = torch.nan  # outside the image, and in a class that is nowhere
    broken = TASK.record(answer, LABELLED, 3)
    assert TASK.is_broken(broken) and not TASK.is_broken(RECORD)
    assert broken.labelled_K.tolist() == [2, 2, 1, 0], "its pixels are still to be found"
    both = TASK.figures([RECORD, broken])
    assert (both.images, both.broken) == (2, 1)
    assert both.values["pixel_accuracy"] == pytest.approx(30.0)
    score = Records(TASK, [broken, broken])
    with pytest.raises(EvaluationError, match="NaN or infinity to all 2 images"):
        score.metrics()


def test_agreement_is_of_places_and_a_broken_answer_agrees_with_nothing() -> None:
    whole = saying(mask((0, 1), (2, 3)), 2)
    part = whole.clone()
    part[3, 0, 0] = torch.nan  # all other places are the same
    one = torch.stack([whole, NAN[:, :2, :2], whole])
    other = torch.stack([saying(mask((0, 1), (2, 0)), 2), NAN[:, :2, :2], part])
    labels = mask((0, 1), (2, 3))
    records = [
        (TASK.record(a, labels, 2), TASK.record(b, labels, 2))
        for a, b in zip(one, other, strict=True)
    ]
    agreed = TASK.agreed(one, other, records)
    assert agreed == [(3, 4), (0, 4), (0, 4)] and share_agreed(agreed) == 25


def drawn(rng: np.random.Generator, images: int, turned: float) -> tuple[list, list]:
    """Records of images of 400 pixels in two classes before and after a share of them turned.

    Pixels of an image are right together, and turn together, as those of objects do.
    """
    before, after = [], []
    for _ in range(images):
        labelled = np.array([300, 100]) + rng.integers(-60, 60) * np.array([1, -1])
        share = rng.beta(8, 1, 2)
        lost = turned * rng.beta(0.5, 2, 2) * 5 * rng.choice([1, -0.5], 2)
        for records, part in ((before, share), (after, (share - lost).clip(0, 1))):
            right = np.round(labelled * part).astype(np.int64)
            found = right + (labelled - right)[::-1]  # what is wrong is the other class
            records.append(MaskRecord(right, found, labelled, False))
    return before, after


def test_the_interval_of_a_drop_covers_the_true_one() -> None:
    """Forty images at a time of a thousand, whose drop is known."""
    rng = np.random.default_rng(0)
    before, after = drawn(rng, 1000, 0.05)
    truth = TASK.drop(before, after).value
    assert 0.5 < truth < 5
    covered, widths = 0, []
    for _ in range(60):
        chosen = rng.choice(1000, 40, replace=False)
        drop = TASK.drop([before[i] for i in chosen], [after[i] for i in chosen])
        assert drop.low <= drop.value <= drop.high
        covered += drop.low <= truth <= drop.high
        widths.append(drop.high - drop.low)
    assert covered >= 54, "95 in a hundred"
    assert np.median(widths) < 12, "it says something"


def test_equal_masks_of_few_images_are_not_known_to_stay_equal() -> None:
    """A bootstrap of no difference is sure that there is none; more pixels say more."""
    few, many = (drawn(np.random.default_rng(0), images, 0.0)[0] for images in (5, 80))
    ends = {}
    for name, records in (("few", few), ("many", many)):
        drop = TASK.drop(records, records)
        assert drop.value == 0 and drop.low < 0 < drop.high and drop.low == -drop.high
        ends[name] = drop.high
    assert ends["few"] > 10 * ends["many"] > 0


def test_what_may_turn_unnoticed_are_whole_places_of_each_class_that_is_there() -> None:
    """One place is 16 pixels of what a class has; the mean is over the two that are there."""
    pixels = np.array([100, 400, 0])
    record = MaskRecord(pixels, pixels, pixels, False)
    drop = TASK.drop([record], [record])
    one, other = (100 * UNSEEN * 16 / (2 * count) for count in (100, 400))
    assert (drop.value, drop.high) == pytest.approx((0.0, np.hypot(one, other)))


def test_the_interval_of_one_model_covers_what_it_does_on_all_images() -> None:
    rng = np.random.default_rng(2)
    every, _ = drawn(rng, 1000, 0.0)
    truth = TASK.figures(every).values["miou"]
    covered = 0
    for _ in range(20):
        low, high = TASK.spread([every[i] for i in rng.choice(1000, 40, replace=False)])
        covered += low <= truth <= high
        assert high - low < 15, "it says something"
    assert covered >= 16, "95 in a hundred"


def test_images_without_a_pixel_that_counts_leave_an_interval_of_numbers() -> None:
    """Of three images a bootstrap draws the two without labels alone, now and then."""
    hidden = TASK.record(saying(FOUND, 3), np.full((2, 3), IGNORED, np.uint8), 3)
    worse = TASK.record(saying(mask((1, 1, 0), (0, 0, 0)), 3), LABELLED, 3)
    drop = TASK.drop([RECORD, hidden, hidden], [worse, hidden, hidden])
    assert drop.value == pytest.approx(100 / 3) and np.isfinite((drop.low, drop.high)).all()


def test_a_model_that_is_better_has_a_negative_drop() -> None:
    before, after = drawn(np.random.default_rng(1), 60, 0.05)
    there, back = TASK.drop(before, after), TASK.drop(after, before)
    assert there.value == pytest.approx(-back.value) and there.value > 0
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=0.3)


def test_ignored_pixels_teach_nothing() -> None:
    masks = torch.tensor([[[0, IGNORED], [IGNORED, 3]]])
    answer = torch.zeros(1, CLASSES, 2, 2, requires_grad=True)
    loss = TASK.loss(answer, MaskTargets(masks, 0.0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == pytest.approx(np.log(CLASSES)), "a mean over what counts"
    assert answer.grad is not None
    taught = answer.grad.abs().sum(dim=1)[0] > 0
    assert taught.tolist() == [[True, False], [False, True]]
    nothing = TASK.loss(answer, MaskTargets(torch.full((1, 2, 2), IGNORED), 0.0))
    assert float(nothing.detach()) == 0.0, "a batch of bars is no NaN"
    lost = TASK.loss(answer * torch.nan, MaskTargets(masks, 0.0))
    assert not torch.isfinite(lost), "and no divergence is hidden"


def test_the_loss_is_that_of_the_enlarged_answer() -> None:
    """Labels are not shrunk to the places of the network: thin things would be gone."""
    torch.manual_seed(0)
    answer, masks = torch.randn(2, CLASSES, 4, 4), torch.randint(0, CLASSES, (2, 16, 16))
    wide = F.interpolate(answer, size=(16, 16), mode="bilinear", align_corners=False)
    expected = F.cross_entropy(wide, masks, label_smoothing=0.1)
    assert float(TASK.loss(answer, MaskTargets(masks, 0.1))) == pytest.approx(float(expected))


def test_a_running_score_is_of_the_places() -> None:
    square = np.zeros((8, 8), np.uint8)
    square[:, 4:] = 1
    square[0] = IGNORED
    batch = Batch(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1), (square,))
    answer = saying(mask((0, 1), (0, 0)), 2)[None]
    assert TASK.running_score(answer, batch) == 75.0
    hidden = batch._replace(annotations=(np.full((8, 8), IGNORED, np.uint8),))
    assert TASK.running_score(answer, hidden) == 100.0


def test_every_place_is_a_row() -> None:
    answer = torch.arange(2 * CLASSES * 6.0).reshape(2, CLASSES, 2, 3)
    rows = TASK.rows(answer)
    assert rows.shape == (12, CLASSES)
    assert torch.equal(rows[7], answer[1, :, 0, 1])


def test_a_student_that_equals_its_teacher_has_no_distance() -> None:
    torch.manual_seed(0)
    taught = torch.randn(2, CLASSES, 4, 4)
    same, near, far = (
        float(TASK.following(taught + much * torch.randn_like(taught), taught, 2.0))
        for much in (0.0, 0.1, 1.0)
    )
    assert same == pytest.approx(0, abs=1e-6) and 0 < near < far


def test_the_distance_of_a_student_is_a_mean_over_places() -> None:
    """One place of four says 3 : 1 where its teacher is undecided, in units of T squared."""
    taught = torch.zeros(1, 2, 2, 2)
    answer = taught.clone()
    answer[0, 0, 0, 1] = 2 * np.log(3)
    divergence = 0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)
    found = float(TASK.following(answer, taught, 2.0))
    assert found == pytest.approx(4 * divergence / 4, rel=1e-5)
