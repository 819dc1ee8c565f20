"""Training steps to time, and how two things are timed fairly; shared by the benches."""

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from care_compress.data.loader import Batch
from care_compress.data.transforms import normalize
from care_compress.recipe.sections import TrainSection
from care_compress.run.processes import World
from care_compress.tasks.classification import Classification
from care_compress.tasks.task import Objective
from care_compress.train.display import Silent
from care_compress.train.loop import Course, Groups, decayed_and_free, set_up, train_step

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES, SIZE = 10, 96


def random_batch(images: int) -> Batch:
    """Random pixels and labels, as the loader delivers them."""
    pixels = torch.randint(0, 256, (images, 3, SIZE, SIZE), dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    return Batch(pixels, torch.randint(0, CLASSES, (images,)), torch.arange(images))


def trainer_step(
    model: nn.Module,
    objective: Objective,
    plan: TrainSection,
    batch: Batch,
    groups: Groups = decayed_and_free,
    display: Silent | None = None,
) -> Callable[[], None]:
    """One step of the trainer's loop."""
    course = Course(
        plan=plan,
        task=Classification(),
        steps_per_epoch=1000,
        num_classes=CLASSES,
        seed=0,
        fingerprint="",
        batches=lambda start: (ready for ready in (batch,)),
        prepare=partial(normalize, mean=MEAN, std=STD),
        validate=lambda model: None,
        groups=groups,
    )
    trainee = set_up(model, plan, World(), groups)
    runner = trainee.model.train()
    shown = display or Silent()
    return lambda: train_step(trainee, runner, objective, batch, course, World(), shown)


def timed(work: Callable[[], None], times: int) -> float:
    """Seconds of one call, over several."""
    began = time.perf_counter()
    for _ in range(times):
        work()
    return (time.perf_counter() - began) / times


def interleaved(
    ours: Callable[[], None], base: Callable[[], None], rounds: int, times: int = 1
) -> list[tuple[float, float]]:
    """Seconds per call of both, in neighbouring groups whose order alternates."""
    timed(ours, times), timed(base, times)
    pairs = []
    for number in range(rounds):
        order = (ours, base) if number % 2 else (base, ours)
        first, second = (timed(work, times) for work in order)
        pairs.append((first, second) if order[0] is ours else (second, first))
    return pairs
