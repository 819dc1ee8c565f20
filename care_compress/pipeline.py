"""The whole product in one place: from a recipe to results, stage after stage.

    recipe -> float model (trained, or loaded) -> rewrite -> evaluate -> results.json

Each stage takes its own section of the recipe and the previous stage's value, and leaves what it
made in the run directory.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import nn

from care_compress import machine
from care_compress.data.loader import BadImages
from care_compress.data.samples import Samples
from care_compress.data.sources import check_classes, open_samples
from care_compress.errors import DataError
from care_compress.evaluate.accuracy import Accuracy, measure_accuracy, spread_indices
from care_compress.evaluate.display import rewrite_table
from care_compress.model.care import Care
from care_compress.model.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import RewriteStep, rewrite_in_steps
from care_compress.recipe import Recipe
from care_compress.run import Run, sha256_file
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.train.distributed import World, join_world
from care_compress.train.network import train_network

# What an int8 recipe asks for beyond this version; shrinks as the stages arrive.
PENDING_STAGES = ("quantize", "export", "compare")


@dataclass
class Workshop:
    """What every stage may use: the recipe, the run it writes to, and who is watching."""

    recipe: Recipe
    run: Run
    world: World
    console: Console
    bad: BadImages = field(default_factory=BadImages)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        began = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - began, 2)


def run_recipe(recipe: Recipe, runs: Path, name: str, console: Console) -> dict[str, Any]:
    """Run every stage of a recipe; the results, as they stand in ``results.json``."""
    with join_world() as world, _opened(Run(runs, name), recipe, world) as run:
        shop = Workshop(recipe, run, world, console if world.is_main else Console(quiet=True))
        _announce(shop)
        validation = open_samples(recipe.data, "val")
        model = float_model(shop, validation)
        if not world.is_main:
            return {}
        compact, steps = rewritten(shop, model)
        accuracy = evaluated(shop, compact, validation)
        return report(shop, validation, steps, accuracy)


def float_model(shop: Workshop, validation: Samples) -> Care:
    """Load the recipe's checkpoint, or train when it has a train section."""
    recipe, run = shop.recipe, shop.run
    if recipe.train is None:
        assert recipe.model.checkpoint is not None
        path = resolve_checkpoint(recipe.model.checkpoint)
        with shop.stage("load"):
            model = load_checkpoint(path, recipe.model.arch)
        check_classes(validation, model.num_classes)
        run.record_input("checkpoint", {"path": str(path), "sha256": sha256_file(path)})
        shop.console.print(
            f"loaded {model.arch} with {model.num_classes} classes from {escape(str(path))}",
            soft_wrap=True,
        )
        return model
    return trained(shop, validation)


def trained(shop: Workshop, validation: Samples) -> Care:
    """Train, or resume training, and keep the weights in ``float/model.safetensors``."""
    recipe, run, world = shop.recipe, shop.run, shop.world
    assert recipe.train is not None
    samples = open_samples(recipe.data, "train")
    if samples.classes != validation.classes:
        raise DataError(
            f"train has classes {samples.classes[:3]}..., val has {validation.classes[:3]}...; "
            "they must be the same.",
            "add the missing class folders, or list all classes in data.classes",
        )

    def validate(candidate: nn.Module) -> tuple[int, int]:
        chosen = spread_indices(len(validation), recipe.evaluate.images)
        accuracy = _measure(shop, candidate, validation, chosen[slice(*world.share(len(chosen)))])
        return accuracy.images, accuracy.correct

    with shop.stage("train"):
        model, progress = train_network(
            recipe, samples, validate, run.path / "float", world, shop.console, shop.bad
        )
    if world.is_main:
        run.record_input("training_images", samples.fingerprint())
        path = run.path / "float" / "model.safetensors"
        top1 = f"{progress.history[-1]['top1']:.2f}"
        made_by = f"make quantize RECIPE={recipe.name}"
        save_checkpoint(
            model, path, {"made_by": made_by, "seed": str(recipe.seed), "validation_top1": top1}
        )
        run.record_output(path)
        run.write_json("float/history.json", {"validations": progress.history})
        shop.console.print(f"trained {model.arch}: {escape(str(path))}", soft_wrap=True)
    return model


def rewritten(shop: Workshop, model: Care) -> tuple[CompactCare, list[RewriteStep]]:
    """Apply the exact rewrites and show what each of them saves."""
    with shop.stage("rewrite"):
        compact, steps = rewrite_in_steps(model, shop.recipe.rewrite, shop.recipe.data.resolution)
    shop.console.print(rewrite_table(steps))
    return compact, steps


def evaluated(shop: Workshop, model: CompactCare, validation: Samples) -> Accuracy:
    """Top-1 and top-5 on the validation images."""
    with shop.stage("evaluate"):
        chosen = spread_indices(len(validation), shop.recipe.evaluate.images)
        return _measure(shop, model, validation, chosen)


def report(
    shop: Workshop, validation: Samples, steps: list[RewriteStep], accuracy: Accuracy
) -> dict[str, Any]:
    """Write ``results.json`` and say what came out."""
    recipe, run, console = shop.recipe, shop.run, shop.console
    results = {
        "run": run.name,
        "recipe": recipe.name,
        "precision": "fp32",
        "pending_stages": list(PENDING_STAGES) if recipe.precision != "fp32" else [],
        "accuracy": {"images": accuracy.images, "top1": accuracy.top1, "top5": accuracy.top5},
        "rewrites": [{"name": step.name, **asdict(step.cost)} for step in steps],
        "data": {
            "source": recipe.data.source,
            "fingerprint": validation.fingerprint(),
            "classes": list(validation.classes),
            "skipped_images": shop.bad.reasons,
        },
        "seconds": shop.seconds,
    }
    path = run.write_json("results.json", results)
    if len(shop.bad):
        console.print(f"[yellow]{len(shop.bad)} images could not be decoded and were skipped")
    console.print(
        f"[bold]top-1 {accuracy.top1:.2f} %[/]  top-5 {accuracy.top5:.2f} %  "
        f"on {accuracy.images:,} images (float32)"
    )
    console.print(f"results: {escape(str(path))}", soft_wrap=True)
    if recipe.precision != "fp32":
        console.print(
            f"[yellow]This is the FLOAT model.[/] {recipe.name} also asks for "
            f"{', '.join(PENDING_STAGES)}, which this version does not do yet."
        )
    return results


def _announce(shop: Workshop) -> None:
    recipe = shop.recipe
    shop.console.print(f"[bold]{recipe.name}[/]: {escape(recipe.claim)}")
    if recipe.precision != "fp32":
        shop.console.print(
            f"[yellow]{recipe.precision} stages ({', '.join(PENDING_STAGES)}) are not part of this "
            "version: what runs now is the float model they will start from."
        )


@contextlib.contextmanager
def _opened(run: Run, recipe: Recipe, world: World) -> Iterator[Run]:
    """Only the main process holds and writes the run directory."""
    if not world.is_main:
        yield run
        return
    with run.open(recipe, machine.describe()):
        yield run


def _measure(
    shop: Workshop, model: nn.Module, validation: Samples, indices: Sequence[int]
) -> Accuracy:
    predict = TorchPredictor(model, len(validation.classes), shop.world.device)
    return measure_accuracy(
        predict,
        validation,
        shop.recipe.data,
        batch_size=shop.recipe.evaluate.batch_size,
        indices=indices,
        bad=shop.bad,
        console=shop.console,
        device=shop.world.device,
    )
