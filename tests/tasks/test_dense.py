"""Records of images: they add up, are written down, and tell what changed most."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from care_compress.data.annotations import Mask
from care_compress.data.loader import Batch
from care_compress.errors import DataError, EvaluationError, TrainingError
from care_compress.evaluate.agreement import HeldImages, drop_on_held
from care_compress.evaluate.readback import read_back
from care_compress.recipe.sections import DataSection, TrainSection
from care_compress.tasks.dense import Compared, Figures
from care_compress.tasks.detection import Detection
from care_compress.tasks.distance import Distance
from care_compress.tasks.segmentation import Segmentation
from care_compress.tasks.task import Drop, value_of

TASK = Segmentation()
SIDE, CLASSES = 8, 3
NAMES = ("sky", "road", "car")


def batches(sizes: tuple[int, ...] = (4, 3, 1), start: int = 0) -> list[Batch]:
    """Images of two classes, of which one in eight shows the third; the pixels say the class."""
    made, first = [], start
    for size in sizes:
        masks: list[Mask] = []
        for index in range(first, first + size):
            mask = np.random.default_rng(index).integers(0, 2, (SIDE, SIDE)).astype(np.uint8)
            mask[0, 0] = 2 if index % 8 == 0 else 0
            masks.append(mask)
        shown = torch.from_numpy(np.stack(masks)).float()
        numbers = torch.arange(first, first + size)
        images = torch.stack([shown, shown, shown], dim=1)
        made.append(Batch(images, torch.zeros(size, dtype=torch.int64), 10 * numbers, tuple(masks)))
        first += size
    return made


def seeing(wrong: Callable[[int], int], broken: tuple[int, ...] = ()) -> Callable[[Tensor], Tensor]:
    """A model that calls so many pixels of its n-th image, from the second on, the next class."""
    count: Iterator[int] = iter(range(1000))

    def predict(images: Tensor) -> Tensor:
        answers = []
        for image in images[:, 0]:
            number = next(count)
            classes = image.long().flatten()
            many = wrong(number)
            classes[1 : 1 + many] = (classes[1 : 1 + many] + 1) % CLASSES
            one = torch.nn.functional.one_hot(classes, CLASSES).T.reshape(CLASSES, SIDE, SIDE)
            answers.append(torch.where(torch.tensor(number in broken), torch.nan, 5.0 * one))
        return torch.stack(answers)

    return predict


def exact() -> Callable[[Tensor], Tensor]:
    return seeing(lambda number: 0)


def compared(drop: float, low: float, high: float) -> Compared:
    figures = Figures(8, 0, {"miou": 50.0}, (50.0,))
    return Compared(figures, figures, drop, (low, high), 100.0, Distance(1.0, 0.1))


def test_processes_count_what_one_would() -> None:
    """Two of them have their own images; a third may have none at all."""

    def wrong(number: int) -> int:
        return number * 3

    whole = TASK.count_pairs(exact(), seeing(wrong, broken=(6,)), batches())
    first = TASK.count_pairs(exact(), seeing(wrong), batches((4,)))
    second = TASK.count_pairs(
        exact(), seeing(lambda number: wrong(number + 4), broken=(2,)), batches((3, 1), start=4)
    )
    nothing = TASK.count_pairs(exact(), exact(), [])
    for parts in (first + nothing + second, nothing + first + second):
        assert parts.settled() == whole.settled()
    found = whole.settled()
    assert (found.baseline.images, found.candidate.broken, found.baseline.broken) == (8, 1, 0)
    assert found.baseline.values["miou"] == 100 and found.drop > 0
    assert found.as_json()["images"] == 8 and found.as_json()["sqnr_db"] is not None
    with pytest.raises(DataError, match="no image to evaluate"):
        nothing.settled()


def test_scores_add_up() -> None:
    predict = seeing(lambda number: number)
    parts = [TASK.count(predict(batch.images), batch) for batch in batches()]
    added = parts[0] + parts[1] + parts[2]
    predict = seeing(lambda number: number)
    (batch,) = batches((8,))
    whole = TASK.count(predict(batch.images), batch)
    assert added.metrics() == whole.metrics() and added.images == whole.images == 8
    assert added.per_class == whole.per_class


def test_what_is_written_down_is_read_back_the_same() -> None:
    pair = TASK.count_pairs(exact(), seeing(lambda number: 5), batches()).settled()
    assert TASK.pair_of(TASK.record_of(pair)) == pair
    same = TASK.count_pairs(exact(), exact(), batches()).settled()
    assert same.distance.sqnr_db == float("inf") and same.agreement == 100
    assert TASK.pair_of(TASK.record_of(same)) == same, "JSON has no infinity"
    score = TASK.count(exact()(batches()[0].images), batches()[0])
    assert TASK.score_of(TASK.record_of_score(score)) == score.figures
    with pytest.raises(TypeError, match="no sum"):
        TASK.score_of(TASK.record_of_score(score)) + score.figures


def test_a_pair_is_below_another_beyond_doubt_only() -> None:
    kept, near, far = compared(1.0, 0.5, 1.5), compared(1.6, 1.1, 2.1), compared(4.0, 3.5, 4.5)
    assert far.is_below(kept) and not kept.is_below(far)
    assert not near.is_below(kept) and not kept.is_below(near), "they may be the same"
    # Their errors are joined as deviations are: 0.5 each make 0.71.
    assert compared(1.72, 1.22, 2.22).is_below(kept)
    assert not compared(1.70, 1.20, 2.20).is_below(kept)
    assert not kept.is_below(kept)


def test_the_images_that_changed_most_are_listed_first() -> None:
    """By their positions in the data set; those that did not change are not listed."""
    turned = [0, 9, 0, 40, 3, 0, 3, 20]
    models = {"a": exact(), "b": seeing(turned.__getitem__)}
    seen: list[int] = []
    found = TASK.collect(models, {"a": "a", "b": "a"}, batches(), seen.append)
    assert seen == [4, 3, 1] and len(found) == 8
    before, after = found.answers["a"], found.answers["b"]
    details = before.details(after, ("a", "b"), found, NAMES)
    assert [one["index"] for one in details["changed"]] == [30, 70, 10, 40, 60]
    assert details["changed_in_all"] == 5
    shares = [100 * (1 - turned[one["index"] // 10] / SIDE**2) for one in details["changed"]]
    assert [one["agreement"] for one in details["changed"]] == pytest.approx(shares)
    assert before.agreement(after) == pytest.approx(100 * (1 - sum(turned) / (8 * SIDE**2)))
    assert set(details["drop_per_class"]) == set(NAMES)
    mean = sum(details["drop_per_class"].values()) / 3
    assert before.drop_to(after).value == pytest.approx(mean)
    assert before.sqnr_db is None and after.sqnr_db is not None
    assert before.details(before, ("a", "a"), found, NAMES)["changed"] == []


def test_a_class_that_no_image_shows_has_lost_nothing() -> None:
    (batch,) = batches((3,), start=1)
    found = TASK.collect({"a": exact(), "b": exact()}, {"a": "a", "b": "a"}, [batch], print)
    details = found.answers["a"].details(found.answers["b"], ("a", "b"), found, NAMES)
    assert set(details["drop_per_class"]) == {"sky", "road"}


def test_a_model_that_answers_no_image_is_named() -> None:
    models = {"a": exact(), "bad": seeing(lambda number: 0, broken=tuple(range(8)))}
    with pytest.raises(EvaluationError, match="bad answers NaN or infinity to all 8 images"):
        TASK.collect(models, dict.fromkeys(models, "a"), batches(), print)
    with pytest.raises(DataError, match="no image to evaluate"):
        TASK.collect({"a": exact()}, {"a": "a"}, [], print)


def test_the_metric_is_nothing_only_where_no_answer_is_a_number() -> None:
    """One broken answer counts as wrong, which is not the end of all others."""
    (batch,) = batches((4,))
    some, none = (
        TASK.count(seeing(lambda number: 0, broken=broken)(batch.images), batch)
        for broken in ((2,), (0, 1, 2, 3))
    )
    assert value_of(some, TASK.metric) == some.metrics()["miou"] > 50
    assert value_of(none, TASK.metric) == 0.0


def test_what_is_no_number_has_no_distance_and_agrees_with_nothing() -> None:
    models = {"a": exact(), "b": seeing(lambda number: 0, broken=(2,))}
    found = TASK.collect(models, dict.fromkeys(models, "a"), batches(), print).answers
    assert found["b"].broken == 1 and found["b"].sqnr_db is None, "of the others there is none"
    assert found["a"].agreement(found["b"]) == pytest.approx(100 * 7 / 8)
    drop: Drop = found["a"].drop_to(found["b"])
    assert drop.value > 0 and drop.low <= drop.value <= drop.high


def test_images_that_are_held_keep_their_labels() -> None:
    """A file is read back, and a placement judged, by the metric on few images."""
    (batch,) = batches((6,))
    every = HeldImages(batch.images, batch.labels, DataSection(source="none"), batch.annotations)
    held = every.only([0, 2, 5])
    images = batch.images[[0, 2, 5]]
    right, wrong = exact()(images), seeing(lambda number: 30 * (number == 1))(images)
    found = read_back(TASK, right, wrong, held, 0.0)
    assert (found.model_value, found.images) == (100.0, 3)
    assert found.value == TASK.count(wrong, held.as_batch()).metrics()["miou"] < 100
    assert found.as_json()["model_miou"] == 100.0
    assert drop_on_held(TASK, right, wrong, held).value == pytest.approx(100 - found.value)


@pytest.mark.parametrize("task", [Segmentation(), Detection()], ids=lambda task: task.name)
@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"augment": {"mixup": 0.2}}, "mixes images.*leave out mixup and cutmix"),
        ({"augment": {"cutmix": 1.0}}, "mixes images.*leave out mixup and cutmix"),
        ({"distill": {"teacher": "x.onnx"}}, "second head.*leave it out for"),
    ],
)
def test_what_labels_with_a_place_cannot_be_trained_with_is_refused(
    task: Segmentation | Detection, asked: dict[str, object], words: str
) -> None:
    usual = {"epochs": 1, "batch_size": 2, "learning_rate": 1e-3}
    task.check_training(TrainSection.model_validate(usual))
    with pytest.raises(TrainingError, match=words):
        task.check_training(TrainSection.model_validate(usual | asked))
