"""The float model of a run: its checkpoint, or trained here to ``float/model.safetensors``."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from care_compress.data.annotated_transforms import training_transform
from care_compress.data.loader import BadImages, steps_per_epoch, training_batches
from care_compress.data.samples import Samples
from care_compress.data.sources import check_classes
from care_compress.data.transforms import normalize
from care_compress.errors import DataError, TrainingError
from care_compress.files import fingerprint, sha256_file
from care_compress.model.care import Care, build_model
from care_compress.model.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint
from care_compress.model.hub import origin
from care_compress.model.predictor import Predictor
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import WATCHING, ModelSection, TrainSection
from care_compress.run.context import RunContext
from care_compress.run.processes import World
from care_compress.run.stages import once, recipe_parts
from care_compress.shipped import MAKER
from care_compress.tasks.known import task_called
from care_compress.tasks.task import Objective
from care_compress.train.loop import Course, Groups, Validate, decayed_and_free, fit
from care_compress.train.objective import check_teacher
from care_compress.train.state import STATE_FILE, Trainee, drop_damaged


@dataclass(frozen=True)
class LoadedModel:
    """A recipe's checkpoint, read once and before anything is written."""

    model: Care
    about: dict[str, object]  # what the manifest says of it
    seconds: float

    @classmethod
    def of(cls, section: ModelSection) -> "LoadedModel":
        """Read the checkpoint that the section names."""
        assert section.checkpoint is not None
        began = time.monotonic()
        # First: it says what is wrong with a file.
        model = load_checkpoint(section.checkpoint, section.arch)
        about = described(section.checkpoint)
        return cls(model, about, time.monotonic() - began)


def described(checkpoint: str) -> dict[str, object]:
    """Which weights these were: file, digest and, from the Hub, the commit."""
    path = resolve_checkpoint(checkpoint)
    return {"path": str(path), "sha256": sha256_file(path), **origin(checkpoint)}


def loaded(context: RunContext, start: LoadedModel, validation: Samples) -> Care:
    """The float model of a run that trains none; its classes must be those of the images."""
    model = start.model
    check_classes(validation, model.num_classes)
    context.spend("load", start.seconds)
    if context.world.is_main:
        context.run.record_input("checkpoint", start.about)
    shown = escape(str(start.about["path"]))
    context.console.print(
        f"loaded {model.arch}{', slimmed,' if model.is_slimmed else ''} with {model.num_classes} "
        f"classes from {shown}",
        soft_wrap=True,
    )
    return model


def trained(
    context: RunContext,
    recipe: Recipe,
    section: TrainSection,
    validation: Samples,
    validate: Validate,
    open_teacher: Callable[[str], Predictor],
) -> Care:
    """Train, or resume training; `validate`, which the caller hands in, judges it on the way."""
    task = task_called(recipe.task)
    samples = task.samples(recipe.data, "train")
    if samples.classes != validation.classes:
        raise DataError(
            f"train has classes {samples.classes[:3]}..., val has {validation.classes[:3]}...; "
            "they must be the same.",
            "add the missing class folders, or list all classes in data.classes",
        )
    path = context.run.path / "float" / "model.safetensors"
    decided_by = training_fingerprint(recipe, samples)

    def train() -> None:
        teacher = open_teacher(section.distill.teacher) if section.distill else None
        with context.stage("train"):
            training = training_in(context, recipe, samples, validate, "float")
            start = starting_point(recipe, len(samples.classes))
            if teacher is not None:
                check_teacher(teacher, len(samples.classes))
            course = training.course(section, decided_by)
            trainee = training.fit(start, task.objective(section.distill, teacher), course)
            model = task.kind(start.arch, start.num_classes, widths=start.widths)  # on the CPU
            model.load_state_dict(trainee.result.state_dict())
            history = trainee.progress.history
        if context.world.is_main:
            context.run.record_input("training_images", samples.fingerprint())
            if recipe.model.checkpoint is not None:
                context.run.record_input("checkpoint", described(recipe.model.checkpoint))
            about = {
                "made_by": MAKER,
                "seed": str(recipe.seed),
                f"validation_{task.metric.key}": f"{history[-1][task.metric.key]:.2f}",
            }
            save_checkpoint(model, path, about)
            context.run.record_output(path)
            context.run.write_json("float/history.json", {"validations": history})
            context.console.print(f"trained {model.arch}: {escape(str(path))}", soft_wrap=True)

    made_from = {**recipe_parts(recipe)["train"], "images, checkpoint, teacher": decided_by}
    handed_in = (validate, open_teacher) if section.distill else (validate,)
    once(context, "train", made_from, train, together=True, handed_in=handed_in)
    context.world.wait()
    return load_checkpoint(path)


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
    watch: Callable[[int, float], None] | None = None

    def course(
        self, plan: TrainSection, fingerprint: str, groups: Groups = decayed_and_free
    ) -> Course:
        """What the loop works on: `plan` over the recipe's training images."""
        check_batch_size(plan, len(self.samples), self.world)
        per_epoch = steps_per_epoch(self.samples, plan.batch_size)
        data = self.recipe.data
        return Course(
            plan=plan,
            task=task_called(self.recipe.task),
            steps_per_epoch=per_epoch,
            num_classes=len(self.samples.classes),
            seed=self.recipe.seed,
            fingerprint=fingerprint,
            batches=lambda start: training_batches(
                self.samples,
                training_transform(self.samples, data, plan.augment),
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
            watch=self.watch,
        )

    def fit(self, model: nn.Module, objective: Objective, course: Course) -> Trainee:
        """Train `model` to the end of its course."""
        return fit(model, objective, course, self.folder, self.world, self.console)


def training_in(
    context: RunContext, recipe: Recipe, samples: Samples, validate: Validate, folder: str
) -> Training:
    """What a training of this run works with; its state goes to `folder` of the run."""
    place: Path = context.run.path / folder
    if context.repair and context.world.is_main:
        drop_damaged(place / STATE_FILE)
    context.world.wait()
    world, console, bad = context.world, context.console, context.bad
    watch = None if context.watch is None else partial(context.watch, folder)
    return Training(recipe, samples, validate, place, world, console, bad, watch)


def starting_point(recipe: Recipe, num_classes: int) -> Care:
    """The network before its first step: fresh from the seed, or a checkpoint to fine-tune."""
    torch.manual_seed(recipe.seed)
    drop_path = recipe.train.drop_path if recipe.train else 0.0
    if recipe.model.checkpoint is None:
        assert recipe.model.arch is not None
        kind = task_called(recipe.task).kind
        if recipe.model.backbone is None:
            return build_model(recipe.model.arch, num_classes, drop_path, kind)
        source = load_checkpoint(recipe.model.backbone, recipe.model.arch)
        model = build_model(source.arch, num_classes, drop_path, kind, source.widths)
        model.stem.load_state_dict(source.stem.state_dict())
        model.stages.load_state_dict(source.stages.state_dict())
        return model
    loaded = load_checkpoint(recipe.model.checkpoint, recipe.model.arch)
    if loaded.num_classes != num_classes:
        raise DataError(
            f"the checkpoint has {loaded.num_classes} classes, the data has {num_classes}.",
            "choose a checkpoint trained on this data, or set data.classes",
        )
    model = type(loaded)(loaded.arch, loaded.num_classes, drop_path, loaded.widths)
    model.load_state_dict(loaded.state_dict())
    return model


def training_fingerprint(recipe: Recipe, samples: Samples) -> str:
    """Digest of everything that decides the trained weights."""
    assert recipe.train is not None
    model = recipe.model
    files = [
        model.checkpoint,
        model.backbone,
        recipe.train.distill and recipe.train.distill.teacher,
    ]
    return fingerprint(
        {
            "train": recipe.train.model_dump(mode="json", exclude=WATCHING),
            "task": recipe.task,
            "arch": model.arch,
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
