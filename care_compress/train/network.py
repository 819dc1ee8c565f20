"""Training the float network that a recipe describes."""

from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from care_compress.data.loader import BadImages, steps_per_epoch, training_batches
from care_compress.data.samples import Samples
from care_compress.data.transforms import TrainTransform, normalize
from care_compress.errors import DataError, TrainingError
from care_compress.model.care import Care, build_model
from care_compress.model.checkpoint import load_checkpoint, resolve_checkpoint
from care_compress.predictor import Predictor
from care_compress.recipe import Recipe
from care_compress.run import fingerprint, sha256_file
from care_compress.sections import TrainSection
from care_compress.train.distributed import World
from care_compress.train.loop import Course, Groups, Validate, decayed_and_free, fit
from care_compress.train.objective import Classification, check_teacher
from care_compress.train.state import Progress

# Settings that change how a training is watched, not what it computes.
WATCHING = {"checkpoint_steps", "validate_epochs"}


def train_network(
    recipe: Recipe,
    samples: Samples,
    teacher: Predictor | None,
    validate: Validate,
    folder: Path,
    world: World,
    console: Console,
    bad: BadImages,
) -> tuple[Care, Progress]:
    """Train as the recipe says; the result is in eval mode on the CPU."""
    plan = recipe.train
    assert plan is not None
    start = starting_point(recipe, len(samples.classes))
    if teacher is not None:
        check_teacher(teacher, len(samples.classes))
    decides = training_fingerprint(recipe, samples)
    course = course_of(plan, recipe, samples, decides, validate, world, bad)
    trainee = fit(start, Classification(plan.distill, teacher), course, folder, world, console)
    trained = Care(start.arch, start.num_classes)
    trained.load_state_dict(trainee.result.state_dict())
    return trained.eval(), trainee.progress


def starting_point(recipe: Recipe, num_classes: int) -> Care:
    """The network before its first step: fresh from the seed, or a checkpoint to fine-tune."""
    torch.manual_seed(recipe.seed)
    drop_path = recipe.train.drop_path if recipe.train else 0.0
    if recipe.model.checkpoint is None:
        assert recipe.model.arch is not None
        return build_model(recipe.model.arch, num_classes, drop_path)
    loaded = load_checkpoint(recipe.model.checkpoint, recipe.model.arch)
    if loaded.num_classes != num_classes:
        raise DataError(
            f"the checkpoint has {loaded.num_classes} classes, the data has {num_classes}.",
            "choose a checkpoint trained on this data, or set data.classes",
        )
    model = Care(loaded.arch, loaded.num_classes, drop_path)
    model.load_state_dict(loaded.state_dict())
    return model


def course_of(
    plan: TrainSection,
    recipe: Recipe,
    samples: Samples,
    decides: str,
    validate: Validate,
    world: World,
    bad: BadImages,
    groups: Groups = decayed_and_free,
) -> Course:
    """What the loop works on: `plan` over the recipe's training images."""
    _check_share(plan, world)
    per_epoch = steps_per_epoch(samples, plan.batch_size)
    total = plan.total_steps(per_epoch)
    return Course(
        plan=plan,
        steps_per_epoch=per_epoch,
        num_classes=len(samples.classes),
        seed=recipe.seed,
        fingerprint=decides,
        batches=lambda start: training_batches(
            samples,
            TrainTransform(recipe.data.resolution, plan.augment, recipe.data.exif_rotate),
            plan.batch_size,
            recipe.data,
            seed=recipe.seed,
            start_step=start,
            total_steps=total,
            bad=bad,
            rank=world.rank,
            world_size=world.size,
        ),
        prepare=partial(normalize, mean=recipe.data.mean, std=recipe.data.std),
        validate=validate,
        groups=groups,
    )


def training_fingerprint(recipe: Recipe, samples: Samples) -> str:
    """Digest of everything that decides the trained weights."""
    assert recipe.train is not None
    files = [recipe.model.checkpoint, recipe.train.distill and recipe.train.distill.teacher]
    return fingerprint(
        {
            "train": recipe.train.model_dump(mode="json", exclude=WATCHING),
            "arch": recipe.model.arch,
            "files": [sha256_file(resolve_checkpoint(file)) for file in files if file],
            "data": recipe.data.model_dump(mode="json", exclude={"workers", "crop_pct"}),
            "samples": samples.content_digest(),
            "seed": recipe.seed,
        }
    )


def _check_share(plan: TrainSection, world: World) -> None:
    if plan.batch_size % (2 * world.size):
        raise TrainingError(
            f"train.batch_size {plan.batch_size} does not divide into pairs over {world.size} "
            "processes.",
            f"use a multiple of {2 * world.size}",
        )
