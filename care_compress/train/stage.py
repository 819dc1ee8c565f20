"""The float model of a run: its checkpoint, or trained here to ``float/model.safetensors``."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from care_compress.data.samples import Samples
from care_compress.data.sources import check_classes, open_samples
from care_compress.errors import DataError
from care_compress.files import sha256_file
from care_compress.model.care import Care
from care_compress.model.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint
from care_compress.model.predictor import Predictor
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import ModelSection, TrainSection
from care_compress.run.context import RunContext
from care_compress.run.stages import once, recipe_parts
from care_compress.train.loop import Validate
from care_compress.train.network import Training, train_network, training_fingerprint
from care_compress.train.state import STATE_FILE, drop_damaged


@dataclass(frozen=True)
class LoadedModel:
    """A recipe's checkpoint, read once and before anything is written."""

    model: Care
    path: Path
    sha256: str
    seconds: float

    @classmethod
    def of(cls, section: ModelSection) -> "LoadedModel":
        """Read it."""
        assert section.checkpoint is not None
        began, path = time.monotonic(), resolve_checkpoint(section.checkpoint)
        model = load_checkpoint(path, section.arch)  # first: it says what is wrong with a file
        return cls(model, path, sha256_file(path), time.monotonic() - began)


def loaded(context: RunContext, start: LoadedModel, validation: Samples) -> Care:
    """The float model of a run that trains none; its classes must be those of the images."""
    model = start.model
    check_classes(validation, model.num_classes)
    context.spend("load", start.seconds)
    if context.world.is_main:
        about = {"path": str(start.path), "sha256": start.sha256}
        context.run.record_input("checkpoint", about)
    context.console.print(
        f"loaded {model.arch} with {model.num_classes} classes from {escape(str(start.path))}",
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
    """Train, or resume training; how it does is told by `validate`, which the caller hands in."""
    samples = open_samples(recipe.data, "train")
    if samples.classes != validation.classes:
        raise DataError(
            f"train has classes {samples.classes[:3]}..., val has {validation.classes[:3]}...; "
            "they must be the same.",
            "add the missing class folders, or list all classes in data.classes",
        )
    path = context.run.path / "float" / "model.safetensors"

    def train() -> None:
        teacher = open_teacher(section.distill.teacher) if section.distill else None
        with context.stage("train"):
            training = training_in(context, recipe, samples, validate, "float")
            model, progress = train_network(training, teacher)
        if context.world.is_main:
            context.run.record_input("training_images", samples.fingerprint())
            about = {
                "made_by": f"make quantize RECIPE={recipe.name}",
                "seed": str(recipe.seed),
                "validation_top1": f"{progress.history[-1]['top1']:.2f}",
            }
            save_checkpoint(model, path, about)
            context.run.record_output(path)
            context.run.write_json("float/history.json", {"validations": progress.history})
            context.console.print(f"trained {model.arch}: {escape(str(path))}", soft_wrap=True)

    made_from = {
        **recipe_parts(recipe)["train"],
        "images, checkpoint, teacher": training_fingerprint(recipe, samples),
    }
    handed_in = (validate, open_teacher) if section.distill else (validate,)
    once(context, "train", made_from, train, together=True, handed_in=handed_in)
    context.world.wait()
    return load_checkpoint(path)


def training_in(
    context: RunContext, recipe: Recipe, samples: Samples, validate: Validate, folder: str
) -> Training:
    """What a training of this run works with; its state goes to `folder` of the run."""
    place: Path = context.run.path / folder
    if context.repair and context.world.is_main:
        drop_damaged(place / STATE_FILE)
    context.world.wait()
    return Training(
        recipe=recipe,
        samples=samples,
        validate=validate,
        folder=place,
        world=context.world,
        console=context.console,
        bad=context.bad,
    )
