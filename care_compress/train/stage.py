"""What the stages share: the run they write to, who is watching, and how a model is measured."""

from pathlib import Path

from rich.markup import escape

from care_compress.data.samples import Samples
from care_compress.data.sources import check_classes, open_samples
from care_compress.errors import DataError
from care_compress.evaluate.run_accuracy import validating
from care_compress.files import sha256_file
from care_compress.model.care import Care
from care_compress.model.checkpoint import (
    load_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
)
from care_compress.run.context import Workshop
from care_compress.run.stages import once, recipe_parts
from care_compress.runtime.artifact import artifact_path, open_predictor
from care_compress.runtime.probe import probe
from care_compress.train.network import Training, train_network, training_fingerprint
from care_compress.train.state import STATE_FILE, drop_damaged


def training_in(shop: Workshop, samples: Samples, validation: Samples, folder: str) -> Training:
    """What a training of this run works with; its state goes to `folder` of the run."""
    if shop.repair and shop.world.is_main:
        drop_damaged(shop.run.path / folder / STATE_FILE)
    shop.world.wait()
    return Training(
        recipe=shop.recipe,
        samples=samples,
        validate=validating(shop, validation),
        folder=shop.run.path / folder,
        world=shop.world,
        console=shop.console,
        bad=shop.bad,
    )


def float_model(shop: Workshop, validation: Samples) -> Care:
    """Load the recipe's checkpoint, or train when it has a train section."""
    recipe, run = shop.recipe, shop.run
    if recipe.train is None:
        assert recipe.model.checkpoint is not None
        path = resolve_checkpoint(recipe.model.checkpoint)
        with shop.stage("load"):
            model = load_checkpoint(path, recipe.model.arch)
        check_classes(validation, model.num_classes)
        if shop.world.is_main:
            run.record_input("checkpoint", {"path": str(path), "sha256": sha256_file(path)})
        shop.console.print(
            f"loaded {model.arch} with {model.num_classes} classes from {escape(str(path))}",
            soft_wrap=True,
        )
        return model
    return trained(shop, validation)


def trained(shop: Workshop, validation: Samples) -> Care:
    """Train, or resume training, and keep the weights in ``float/model.safetensors``."""
    recipe = shop.recipe
    assert recipe.train is not None
    samples = open_samples(recipe.data, "train")
    if samples.classes != validation.classes:
        raise DataError(
            f"train has classes {samples.classes[:3]}..., val has {validation.classes[:3]}...; "
            "they must be the same.",
            "add the missing class folders, or list all classes in data.classes",
        )
    made_from = {
        **recipe_parts(recipe)["train"],
        "images, checkpoint, teacher": training_fingerprint(recipe, samples),
    }
    path = shop.run.path / "float" / "model.safetensors"
    once(shop, "train", made_from, lambda: train(shop, samples, validation, path), together=True)
    shop.world.wait()
    return load_checkpoint(path)


def train(shop: Workshop, samples: Samples, validation: Samples, path: Path) -> None:
    """Train to the end, from where an interrupted training stopped."""
    recipe, run, world = shop.recipe, shop.run, shop.world
    assert recipe.train is not None
    distill = recipe.train.distill
    teacher = None
    if distill is not None:
        probe(artifact_path(distill.teacher), recipe.data.resolution)
        teacher = open_predictor(distill.teacher, world.device)
    with shop.stage("train"):
        training = training_in(shop, samples, validation, "float")
        model, progress = train_network(training, teacher)
    if world.is_main:
        run.record_input("training_images", samples.fingerprint())
        top1 = f"{progress.history[-1]['top1']:.2f}"
        made_by = f"make quantize RECIPE={recipe.name}"
        save_checkpoint(
            model, path, {"made_by": made_by, "seed": str(recipe.seed), "validation_top1": top1}
        )
        run.record_output(path)
        run.write_json("float/history.json", {"validations": progress.history})
        shop.console.print(f"trained {model.arch}: {escape(str(path))}", soft_wrap=True)
