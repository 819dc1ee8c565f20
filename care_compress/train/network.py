"""Training the float network that a recipe describes."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from care_compress.data.loader import BadImages, steps_per_epoch, training_batches
from care_compress.data.samples import Samples
from care_compress.data.transforms import TrainTransform, normalize
from care_compress.errors import DataError, TrainingError
from care_compress.files import fingerprint, sha256_file
from care_compress.model.care import Care, build_model
from care_compress.model.checkpoint import load_checkpoint, resolve_checkpoint
from care_compress.model.predictor import Predictor
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import WATCHING, TrainSection
from care_compress.run.processes import World
from care_compress.train.loop import Course, Groups, Validate, decayed_and_free, fit
from care_compress.train.objective import Classification, Objective, check_teacher
from care_compress.train.state import Progress, Trainee


@dataclass(frozen=True)
class Training:
    """What every training of a run works with, float or quantized."""

    recipe: Recipe
    samples: Samples
    validate: Validate
    folder: Path  # for its state and curves
    world: World
    console: Console
    bad: BadImages

    def course(
        self, plan: TrainSection, fingerprint: str, groups: Groups = decayed_and_free
    ) -> Course:
        """What the loop works on: `plan` over the recipe's training images."""
        check_batch_size(plan, len(self.samples), self.world)
        per_epoch = steps_per_epoch(self.samples, plan.batch_size)
        data = self.recipe.data
        return Course(
            plan=plan,
            steps_per_epoch=per_epoch,
            num_classes=len(self.samples.classes),
            seed=self.recipe.seed,
            fingerprint=fingerprint,
            batches=lambda start: training_batches(
                self.samples,
                TrainTransform(data.resolution, plan.augment, data.exif_rotate),
                plan.batch_size,
                data,
                seed=self.recipe.seed,
                start_step=start,
                total_steps=plan.total_steps(per_epoch),
                bad=self.bad,
                rank=self.world.rank,
                world_size=self.world.size,
            ),
            prepare=partial(normalize, mean=data.mean, std=data.std),
            validate=self.validate,
            groups=groups,
            bad=self.bad,
        )

    def fit(self, model: nn.Module, objective: Objective, course: Course) -> Trainee:
        """Train `model` to the end of its course."""
        return fit(model, objective, course, self.folder, self.world, self.console)


def train_network(training: Training, teacher: Predictor | None) -> tuple[Care, Progress]:
    """Train as the recipe says; the result is in eval mode on the CPU."""
    recipe, samples = training.recipe, training.samples
    assert recipe.train is not None
    start = starting_point(recipe, len(samples.classes))
    if teacher is not None:
        check_teacher(teacher, len(samples.classes))
    course = training.course(recipe.train, training_fingerprint(recipe, samples))
    trainee = training.fit(start, Classification(recipe.train.distill, teacher), course)
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


def check_batch_size(plan: TrainSection, images: int, world: World) -> None:
    """Refuse a batch that cannot be shared out or filled."""
    if plan.batch_size % (2 * world.size):
        raise TrainingError(
            f"{plan.place}.batch_size {plan.batch_size} does not divide into pairs over "
            f"{world.size} processes.",
            f"use a multiple of {2 * world.size}",
        )
    if plan.batch_size > images:
        raise TrainingError(
            f"there are {images} training images, fewer than one batch of {plan.batch_size}.",
            f"set {plan.place}.batch_size to {images} or less",
        )
