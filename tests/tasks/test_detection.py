"""Detection as the line asks it: what is learned, what is answered, and how answers compare."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from care_compress.data.annotations import Boxes
from care_compress.device.boxes import Detections, draw_boxes
from care_compress.model.boxes import BoxDecoder, BoxHead, places
from care_compress.tasks.detection import (
    TOP,
    BoxAgreement,
    BoxRecord,
    Detection,
    assign,
    boxes_agreed,
    detection_loss,
    generalized_overlap,
    objects_of,
    output_distance,
    overlaps_of,
)

SIDE = 64
LEVELS = [(8, 8), (4, 4), (2, 2)]
PLACES = 84
TASK = Detection()


def boxes(*rows: tuple[int, ...], crowd: tuple[int, ...] = ()) -> Boxes:
    """Rows of x1, y1, x2, y2, class; those of these numbers are crowds."""
    table = np.array(rows, np.float32).reshape(-1, 5)
    crowds = np.isin(np.arange(len(table)), crowd)
    return Boxes(table[:, :4], table[:, 4].astype(np.int64), crowds, (SIDE, SIDE))


def untrained(images: int = 1) -> list[Tensor]:
    """Raw distances and logits of three levels, which may be learned."""
    raw = [torch.zeros(images, 4, *one) for one in LEVELS]
    raw += [torch.full((images, 3, *one), -3.0) for one in LEVELS]
    return [one.requires_grad_() for one in raw]


def decoded(raw: list[Tensor]) -> Tensor:
    out: Tensor = BoxDecoder()(raw[:3], raw[3:])
    return out


def assigned(output: Tensor, *labels: Boxes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = objects_of(labels, output.device)
    return assign(output[:, :4], output[:, 4:], places(LEVELS, output), wanted)


def records(output: Tensor, *labels: Boxes) -> list[BoxRecord]:
    """What is found in each image of a batch, beside what is there."""
    pairs = zip(output.detach(), labels, strict=True)
    return [TASK.record(one, annotation, SIDE) for one, annotation in pairs]


def agreement(before: list[Detections], after: list[Detections]) -> BoxAgreement:
    """Of several images."""
    pairs = zip(before, after, strict=True)
    return sum((boxes_agreed(one, other) for one, other in pairs), BoxAgreement())


def test_what_is_learned_is_found() -> None:
    """An object of any size, an image without one, and another batch mate: all from one loss."""
    labels = [boxes((4, 4, 60, 40, 0), (30, 42, 44, 60, 2), (10, 50, 13, 53, 1)), boxes()]
    raw = untrained(images=2)
    optimizer = torch.optim.Adam(raw, lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        detection_loss(decoded(raw), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    learned = records(decoded(raw), *labels)
    found, nothing = learned[0].found.surer(0.5), learned[1].found.surer()
    assert found.classes.tolist().count(0) == 1 and len(found) == 3 and len(nothing) == 0
    order = [found.classes.tolist().index(place) for place in (0, 2, 1)]
    np.testing.assert_allclose(found.corners[order], labels[0].corners, atol=1.0)
    assert TASK.figures(learned).values["map50"] == pytest.approx(100)


def test_an_object_takes_places_whose_centre_it_holds() -> None:
    scores, corners, weights, silent = assigned(decoded(untrained()), boxes((0, 0, 33, 33, 1)))
    centres = places(LEVELS, scores)[0] * SIDE
    at = weights[0] > 0
    assert 0 < at.sum() <= TOP and (centres[:, at] < 33).all() and not silent.any()
    assert (scores[0, 1] == weights[0]).all() and not scores[0, [0, 2]].any()
    assert torch.equal(corners[0, at] * SIDE, torch.tensor([[0.0, 0, 33, 33]]).expand(at.sum(), 4))


def test_the_best_place_is_asked_for_the_overlap_it_reaches() -> None:
    raw = untrained()
    raw[1].data[0, :, 1, 1] = 1.0  # of the middle level: two strides of 16 to each side of (24, 24)
    _, _, weights, _ = assigned(decoded(raw), boxes((0, 0, 48, 56, 0)))
    assert weights[0].argmax() == 64 + 5
    assert weights[0].max() == pytest.approx(48 * 56 / 64**2)


def test_a_place_that_overlaps_well_is_asked_for_more_than_one_that_is_sure() -> None:
    """t = s u^6 by hand: 0.2 * 1 of one place, 0.8 * 0.5^6 of the other, in parts of the larger."""
    output = torch.zeros(1, 4 + 3, PLACES)
    output[0, 4:] = -20.0
    near, sure = 9, 10  # centres at (12, 12) and (20, 12)
    output[0, :4, near] = torch.tensor([8.0, 8, 24, 16]) / SIDE
    output[0, :4, sure] = torch.tensor([8.0, 8, 16, 16]) / SIDE  # the left half of the object
    output[0, 4, near], output[0, 4, sure] = np.log(0.2 / 0.8), np.log(0.8 / 0.2)
    _, _, weights, _ = assigned(output, boxes((8, 8, 24, 16, 0)))
    assert weights[0].nonzero().flatten().tolist() == [near, sure]
    assert weights[0, [near, sure]].tolist() == pytest.approx([1.0, 0.8 * 0.5**6 / 0.2], rel=1e-4)


def test_a_place_goes_to_the_object_it_overlaps_most() -> None:
    output = torch.zeros(1, 4 + 3, PLACES)
    output[0, :4, 9] = torch.tensor([8.0, 8, 24, 16]) / SIDE
    for rows in ([(8, 8, 24, 18, 0), (8, 8, 16, 16, 1)], [(8, 8, 16, 16, 1), (8, 8, 24, 18, 0)]):
        scores, corners, _, _ = assigned(output, boxes(*rows))
        assert scores[0, :, 9].argmax() == 0
        assert (corners[0, 9] * SIDE).tolist() == [8, 8, 24, 18]


def test_the_loss_counts_a_box_twice_and_by_what_its_place_is_asked_for() -> None:
    """Of one object that one place finds by half: (BCE + 2 u (1 - GIoU)) / 1."""
    output = torch.zeros(1, 4 + 3, PLACES)
    output[0, 4:] = -20.0
    output[0, 4, 9] = 0.0
    output[0, :4, 9] = torch.tensor([8.0, 8, 24, 16]) / SIDE
    loss = float(detection_loss(output, [boxes((8, 8, 16, 16, 0))]))
    # Asked for the overlap reached, 0.5, at even odds; the hull is the box found.
    assert loss == pytest.approx(np.log(2) + 2 * 0.5 * (1 - 0.5), rel=1e-4)


def test_an_object_between_all_centres_is_not_lost() -> None:
    """The nearest place of the finest level learns it, though its box does not overlap yet."""
    raw = untrained()
    output = decoded(raw)
    _, _, weights, _ = assigned(output, boxes((6, 6, 7, 7, 0)))
    assert weights[0].nonzero().flatten().tolist() == [0]
    detection_loss(output, [boxes((6, 6, 7, 7, 0))]).backward()  # type: ignore[no-untyped-call]
    assert raw[0].grad is not None and raw[0].grad[0, :, 0, 0].abs().min() > 0


def test_a_place_belongs_to_one_object() -> None:
    """Two objects of other classes over one another: none of their places is both."""
    output = decoded(untrained())
    labels = boxes((0, 0, 64, 64, 0), (8, 8, 56, 56, 1), (8, 8, 56, 56, 2))
    scores, _, weights, _ = assigned(output, labels)
    assert ((scores > 0).sum(dim=1) <= 1).all()
    assert (scores.sum(dim=1) == weights).all() and (scores > 0).any(dim=2)[0, :2].all()
    reached = overlaps_of(objects_of([labels], output.device).corners_BM4, output[:, :4])
    assert weights.max() <= reached.max(), "it is asked for two objects' scores at once"


def test_nothing_is_wrong_in_a_crowd() -> None:
    """Its places learn nothing; an object inside is still to be found."""
    crowd = boxes((0, 0, 32, 64, 1), crowd=(0,))
    raw = untrained()
    detection_loss(decoded(raw), [crowd]).backward()  # type: ignore[no-untyped-call]
    gradient = raw[3].grad
    assert gradient is not None
    assert not gradient[..., :4].any() and gradient[..., 4:].all()
    both = boxes((0, 0, 32, 64, 1), (4, 4, 28, 28, 0), crowd=(0,))
    _, _, weights, silent = assigned(decoded(untrained()), both)
    assert weights.any() and not (silent & (weights > 0)).any()


def test_images_of_a_batch_do_not_see_one_another() -> None:
    """A longer list of objects in one changes nothing in the other."""
    torch.manual_seed(0)
    raw = [one.detach() + torch.randn_like(one) for one in untrained(images=2)]
    few, many = boxes((4, 4, 30, 40, 0)), boxes(*[(i, i, i + 20, i + 30, i % 3) for i in range(9)])
    together = assigned(decoded(raw), few, many)
    for row, labels in enumerate((few, many)):
        alone = assigned(decoded([one[row : row + 1] for one in raw]), labels)
        assert torch.equal(together[0][row], alone[0][0])
        assert torch.equal(together[2][row], alone[2][0])


def test_giou_falls_as_boxes_move_apart() -> None:
    """1 for equal boxes; known where they share a half; below 0 and falling where nothing."""
    one = torch.tensor([[0.0, 0, 2, 2]])
    moved = [torch.tensor([[x, 0.0, x + 2, 2]]) for x in (0.0, 1.0, 3.0, 6.0)]
    values = [float(generalized_overlap(one, other)) for other in moved]
    assert values == pytest.approx([1, 1 / 3, -1 / 5, -4 / 8])


def test_a_student_that_equals_its_teacher_has_no_distance() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        taught = decoded([one + torch.randn_like(one) for one in untrained(images=2)])
    student = taught.clone().requires_grad_()
    distance = output_distance(student, taught)
    assert float(distance.detach()) == pytest.approx(0, abs=1e-4)
    others = [taught + 0.1 * amount * torch.randn_like(taught) for amount in (0.1, 1.0)]
    near, far = (float(output_distance(one, taught).detach()) for one in others)
    assert 0 < near < far
    distance.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None and student.grad.isfinite().all()


def test_distance_counts_where_the_teacher_sees_something() -> None:
    taught = decoded(untrained()).detach()
    taught[0, 4, 10] = 4.0
    there, elsewhere = taught.clone(), taught.clone()
    there[0, 2, 10] += 0.1
    elsewhere[0, 2, 9] += 0.1
    assert output_distance(there, taught) > 5 * output_distance(elsewhere, taught)


def found(*rows: tuple[float, ...]) -> Detections:
    """Rows of x1, y1, x2, y2, class, score."""
    table = np.array(rows, np.float32).reshape(-1, 6)
    return Detections(table[:, :4], table[:, 5], table[:, 4].astype(np.int64))


def test_agreement_pairs_boxes_one_to_one() -> None:
    """Two boxes over one have one partner; another class, or no certainty, has none."""
    one = found((0, 0, 10, 10, 0, 0.9), (20, 20, 30, 30, 1, 0.9), (40, 40, 50, 50, 2, 0.1))
    two = found((0, 0, 10, 9, 0, 0.5), (0, 0, 10, 10, 0, 0.4), (20, 20, 30, 30, 2, 0.9))
    both = agreement([one, one, found()], [two, one, found()])
    assert (both.images, both.same_images) == (3, 2)
    assert (both.boxes, both.matched) == (5 + 4, 1 + 2)
    assert both.percent == pytest.approx(100 * 6 / 9)
    assert agreement([two], [one]).matched == 1
    assert agreement([found()], [found()]).percent == 100


def test_a_place_says_nothing_until_it_is_sure_enough_to_be_shown() -> None:
    """What files are compared by: the highest of a row is what a place answers."""
    answer = torch.full((1, 4 + 2, 2), -9.0)
    for place, score in enumerate((0.24, 0.26)):
        answer[0, 4 + 1, place] = np.log(score / (1 - score))
    assert TASK.rows(answer).argmax(dim=1).tolist() == [2, 1]


def seen(*corners: tuple[int, ...]) -> list[BoxRecord]:
    """One image after another with an object of 10 x 10, and the one box found there, if any."""
    return [
        BoxRecord(found((*one, 0, 0.9)) if one else found(), boxes((0, 0, 10, 10, 0)), 1)
        for one in corners
    ]


def test_intervals_are_of_the_metric_that_counts() -> None:
    """A box that overlaps by 0.7 is found, whatever the mean over stricter overlaps says."""
    loose = seen(*[(0, 0, 10, 7)] * 8)
    assert TASK.figures(loose).values["map"] < 60
    assert TASK.spread(loose) == pytest.approx((100, 100))


def test_what_is_no_longer_found_is_a_drop() -> None:
    right, half = seen(*[(0, 0, 10, 10)] * 8), seen(*[(0, 0, 10, 10), ()] * 4)
    drop = TASK.drop(right, half)
    assert drop.value == pytest.approx(50, abs=1) and drop.low < drop.value < drop.high
    assert TASK.drop(half, right).value == pytest.approx(-drop.value)


def test_a_broken_answer_agrees_with_none() -> None:
    output = decoded(untrained(images=2)).detach()
    output[1, 5, 3] = torch.nan
    answers = [one.found for one in records(output, boxes(), boxes())]
    assert [one.broken for one in answers] == [False, True]
    assert agreement(answers, answers).same_images == 1


def test_a_drawing_names_the_classes() -> None:
    image = Image.new("RGB", (100, 80))
    answer = found((10, 20, 60, 70, 1, 0.9))
    pictures = [np.asarray(draw_boxes(image, answer, names)) for names in (("", "a"), ("", "b"))]
    assert (pictures[0] != pictures[1]).any()


def test_the_head_of_the_task_answers_in_its_form() -> None:
    """Features of all four stages may be given; the loss reads what the head says."""
    channels = (8, 16, 32, 48)
    head = BoxHead(channels[1:], 3, 24)
    output = head([torch.randn(2, c, 16 >> i, 16 >> i) for i, c in enumerate(channels)])
    assert output.shape == (2, 4 + 3, PLACES)
    loss = TASK.loss(output, [boxes((4, 4, 30, 40, 0)), boxes()])
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(one.grad is not None and one.grad.isfinite().all() for one in head.parameters())
