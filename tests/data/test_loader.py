import contextlib
import os
import signal
import tempfile
import time

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from care_compress.data.loader import (
    BadImages,
    Batch,
    _receive,
    evaluation_batches,
    steps_per_epoch,
    training_batches,
    worker_count,
)
from care_compress.data.transforms import EvalTransform, TrainTransform
from care_compress.errors import BadImageError, DataError
from care_compress.recipe.sections import AugmentSection, DataSection


class Fake:
    """Fifty images whose pixels tell their index; some may be bad."""

    classes = ("a", "b", "c")
    in_memory = False

    def __init__(self, bad=(), deadly=()):
        self.labels = np.arange(50) % 3
        self.bad = bad
        self.deadly = deadly

    def __len__(self):
        return 50

    def name(self, index):
        return f"fake/{index}"

    def image(self, index):
        if index in self.bad:
            raise BadImageError(f"{self.name(index)} is broken.", "mend it")
        if index in self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        y, x = np.mgrid[:40, :40]
        return Image.fromarray(np.stack([x * 5, y * 5, 0 * x + index], 2).astype(np.uint8))

    def fingerprint(self):
        return "fake"


def section(workers: int, **values) -> DataSection:
    return DataSection(workers=workers, **values)


EVAL = EvalTransform(32, 0.9)
TRAIN = TrainTransform(32, AugmentSection(jitter=0.3, erase=0.3))


def evaluate(samples, workers=0, skip=False, **values):
    bad = BadImages()
    data = section(workers, skip_bad_images=skip)
    return list(evaluation_batches(samples, EVAL, 8, data, bad=bad, **values)), bad


def train(workers=0, start=0, stop=13, rank=0, world=1, samples=None, seed=3, skip=False):
    return list(
        training_batches(
            samples or Fake(),
            TRAIN,
            8,
            section(workers, skip_bad_images=skip),
            seed=seed,
            start_step=start,
            total_steps=stop,
            bad=BadImages(),
            rank=rank,
            world_size=world,
        )
    )


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.annotations == b.annotations == ()
        for left, right in zip(a[:3], b[:3], strict=True):
            assert left.dtype == right.dtype and torch.equal(left, right)


def test_evaluation_is_in_order_and_complete():
    batches, bad = evaluate(Fake())
    assert [len(batch.labels) for batch in batches] == [8] * 6 + [2] and not len(bad)
    indices = torch.cat([batch.indices for batch in batches])
    assert indices.tolist() == list(range(50))
    assert torch.equal(torch.cat([batch.labels for batch in batches]), indices % 3)
    images = torch.cat([batch.images for batch in batches])
    assert torch.equal(images[:, 2, 0, 0].long(), indices)
    assert images.dtype == torch.uint8 and images.shape == (50, 3, 32, 32)
    assert batches[0].images.is_contiguous(memory_format=torch.channels_last)


def test_evaluation_of_a_part():
    batches, _ = evaluate(Fake(), indices=range(5, 15))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(5, 15))
    batches, _ = evaluate(Fake(), indices=range(45, len(Fake())))
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(45, 50))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers):
    assert_same(evaluate(Fake())[0], evaluate(Fake(), workers)[0])
    assert_same(train(), train(workers))


def test_an_epoch_shows_every_image_at_most_once_in_a_new_order():
    batches = train(stop=13)
    assert steps_per_epoch(Fake(), 8) == 6
    epochs = [torch.cat([b.indices for b in batches[s : s + 6]]).tolist() for s in (0, 6)]
    for epoch in epochs:
        assert len(set(epoch)) == 48
    assert epochs[0] != epochs[1]
    assert epochs[0] != torch.cat([b.indices for b in train(stop=6, seed=4)]).tolist()


def test_the_same_image_looks_different_in_each_epoch():
    batches = train(stop=12)
    seen = [
        {int(i): image for b in part for i, image in zip(b.indices, b.images, strict=True)}
        for part in (batches[:6], batches[6:])
    ]
    both = seen[0].keys() & seen[1].keys()
    assert both and all(not torch.equal(seen[0][i], seen[1][i]) for i in both)


@pytest.mark.parametrize("start", [4, 6, 9])
def test_resuming_goes_on_where_it_stopped(start):
    assert_same(train(stop=13)[start:], train(start=start, stop=13))


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_one_global_batch(world):
    shares = [train(rank=rank, world=world, stop=7) for rank in range(world)]
    joined = [
        Batch(*(torch.cat(parts) for parts in zip(*(one[:3] for one in step), strict=True)))
        for step in zip(*shares, strict=True)
    ]
    assert_same(train(stop=7), joined)


def test_set_smaller_than_a_batch():
    with pytest.raises(DataError, match="50 training images"):
        steps_per_epoch(Fake(), 51)


@pytest.mark.parametrize("workers", [0, 2])
def test_first_bad_image_stops_with_its_own_message(workers):
    with pytest.raises(BadImageError) as caught:
        evaluate(Fake(bad={30, 13, 14}), workers)
    assert str(caught.value) == "fake/13 is broken. Fix: mend it"


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_left_out_counted_and_named(workers):
    bad_indices = {13, *range(16, 24), 48, 49}
    batches, bad = evaluate(Fake(bad=bad_indices), workers, skip=True)
    seen = torch.cat([batch.indices for batch in batches]).tolist()
    assert seen == [i for i in range(50) if i not in bad_indices]
    assert bad.reasons["fake/13"] == "fake/13 is broken." and len(bad) == len(bad_indices)
    assert len(train(workers, samples=Fake(bad={1}), skip=True, stop=6)) == 6


def test_training_on_bad_images_alone():
    with pytest.raises(DataError, match="nothing but images"):
        train(samples=Fake(bad=range(50)), skip=True)


def children() -> int:
    return len(psutil.Process().children(recursive=True))


def test_a_temporary_folder_too_deep_for_sockets_is_named_and_not_waited_for(monkeypatch, tmp_path):
    deep = tmp_path / ("d" * 80)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(DataError, match="the path is too long.*TMPDIR"):
        evaluate(Fake(), 1)
    assert len(evaluate(Fake())[0]) == 7, "without processes there is no socket"


def test_closing_ends_the_workers():
    before = children()
    batches = evaluation_batches(Fake(), EVAL, 4, section(2), bad=BadImages())
    next(batches)
    assert children() >= before + 2
    batches.close()
    assert children() == before


def test_an_error_ends_the_workers():
    before = children()
    with pytest.raises(BadImageError) as caught:
        evaluate(Fake(bad={3}), 2)
    assert children() == before and caught.value


def test_a_dead_worker_is_a_named_error():
    with pytest.raises(DataError, match="decoding process died.*data.workers"):
        evaluate(Fake(deadly={9}), 2)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset"), EOFError()])
def test_a_worker_that_dies_with_a_batch_in_its_hands_is_named_too(error):
    def handed_over():
        raise error
        yield

    with pytest.raises(DataError, match="decoding process died: [^.]"):
        list(_receive(handed_over(), BadImages(), None))


def test_a_death_does_not_interrupt_other_code():
    batches = evaluation_batches(Fake(), EVAL, 4, section(1), bad=BadImages())
    with contextlib.closing(batches):
        next(batches)
        (worker,) = psutil.Process().children()
        worker.kill()
        time.sleep(0.3)  # torch alone would raise a RuntimeError here
        with pytest.raises(DataError, match="decoding process died"):
            list(batches)


def test_loading_leaves_the_global_generators_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    evaluate(Fake(), 1)
    train()
    assert torch.equal(torch.rand(1), expected)


def test_worker_count(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    fake = Fake()
    assert worker_count(fake, DataSection()) == 8
    assert worker_count(fake, DataSection(workers=11)) == 11
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    assert worker_count(fake, DataSection()) == 3
    fake.in_memory = True
    assert worker_count(fake, DataSection()) == 0
