"""The slim stage: cut a float network to its budget, refit what is left, and let it heal.

    slim/plan.json           which channels stay
    slim/cut.safetensors     the narrow network, refitted
    slim/model.safetensors   the same, healed
    slim/whole.safetensors   the whole network after the same healing,
    slim/whole_qat.safetensors   and after as many steps of QAT's, in float

A network that has not converged gets better by any training, and that gain is not ours: what was
cut is held to the whole network with the same training, or as it was where it has not gained.
"""

import contextlib
import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from care_compress import machine
from care_compress.console import progress_bar
from care_compress.data.loader import BadImages, prepared_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.data.sources import check_classes
from care_compress.files import fingerprint
from care_compress.model.care import Care
from care_compress.model.checkpoint import load_checkpoint, save_checkpoint, state_digest
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import WATCHING, FollowSection
from care_compress.recipe.slim import SlimSection
from care_compress.recipe.target import load_target
from care_compress.run.context import RunContext
from care_compress.run.finished import SLIM_CUT, SLIM_HEALED
from care_compress.run.stages import EVERYTHING, once, recipe_parts
from care_compress.shipped import MAKER
from care_compress.slim.cut import cut
from care_compress.slim.heal import Follower, FollowWhole
from care_compress.slim.places import Place
from care_compress.slim.plan import Cost, cost_of, make_plan, needs_images, print_slim_plan
from care_compress.slim.refit import refit
from care_compress.slim.statistics import HiddenStatistics, measure_hidden
from care_compress.tasks.known import labelled, task_called
from care_compress.train.loop import Validate
from care_compress.train.stage import training_in

PLAN_FILE = "slim/plan.json"
WHOLE_FILE = "slim/whole.safetensors"
WHOLE_AFTER_QAT = "slim/whole_qat.safetensors"
IMAGES_AT_ONCE = 16  # backward passes hold every activation
REFIT_BATCH = 64
REFITTED_AT = 224  # pixels; section.images of this size are held
FEWEST_IMAGES = 64


@dataclass(frozen=True)
class Slimmed:
    """What the slim stage made."""

    model: Care  # narrow, healed where the recipe heals
    whole: Care  # the network it was cut from, after the same training


def slimmed(
    context: RunContext,
    recipe: Recipe,
    section: SlimSection,
    model: Care,
    validate: Validate,
    latency: Callable[[Care], Cost],
) -> Slimmed:
    """Cut, refit and heal; `latency` measures what widths cost in time, where the budget asks."""
    samples, path = labelled(recipe, "train"), context.run.path / SLIM_CUT
    check_classes(samples, model.num_classes)
    made_from: dict[str, object] = {
        **recipe_parts(recipe)["slim"],
        "float model": state_digest(model.state_dict()),
        "training images": samples.content_digest(),
    }
    timed = section.budget.kind == "latency"
    if timed:  # what is timed is the network as it will be quantized and exported
        said = recipe.model_dump(mode="json", include={"quantize", "rewrite", "export"})
        (said["quantize"] or {}).pop("qat", None)
        for name in ("targets", "images"):
            said["export"].pop(name)
        target = load_target(section.target).model_dump(mode="json")
        made_from["timed"] = [said, target, machine.read_machine().cpu.kind]
        made_from["packages"] = machine.installed_versions(EVERYTHING)

    def make() -> None:
        with context.stage("slim"):
            device, console = context.world.device, context.console
            statistics = watched(recipe, section, model, samples, device, context.bad, console)
            plan = make_plan(model, section, statistics, cost_by(recipe, section, model, latency))
            print_slim_plan(plan, console)
            # Without images no mean is known, and none is put back.
            means = {place: seen.mean_H for place, seen in statistics.items()} or None
            narrow = cut(model, plan.kept, means)
            if section.refit:
                images = refit_images(context, recipe, section, samples)
                with progress_bar(
                    context.console, "refitting", len(narrow.widths.hidden1)
                ) as advance:
                    refit(narrow, model, images, advance)
        context.run.write_json(PLAN_FILE, plan.as_json())
        save_checkpoint(narrow, path, about(recipe))
        context.run.record_output(path)

    if context.world.is_main:
        once(context, "slim", made_from, make, handed_in=[latency] if timed else [])
    context.world.wait()
    narrow, whole = load_checkpoint(path), model
    follow = partial(followed, context, recipe, model, samples, validate)
    if section.heal is not None:
        narrow = follow(narrow, section.heal, SLIM_HEALED)
        whole = follow(whole, section.heal, WHOLE_FILE)
    elif context.world.is_main:  # that of an earlier recipe would pass for this one's
        (context.run.path / SLIM_HEALED).unlink(missing_ok=True)
    qat = None if recipe.quantize is None else recipe.quantize.qat
    if qat is not None:
        whole = follow(whole, qat, WHOLE_AFTER_QAT)
    return Slimmed(narrow, whole)


def watched(
    recipe: Recipe,
    section: SlimSection,
    model: Care,
    samples: Samples,
    device: torch.device,
    bad: BadImages,
    console: Console,
) -> dict[Place, HiddenStatistics]:
    """Watch hidden channels on training images; nothing where the measure needs no images."""
    if not needs_images(section):
        return {}
    indices = spread_indices(len(samples), section.images)
    batches = prepared_batches(
        samples, recipe.data, IMAGES_AT_ONCE, bad=bad, indices=indices, device=device
    )
    with (
        contextlib.closing(batches),
        progress_bar(console, "watching channels", len(indices)) as advance,
    ):
        task = task_called(recipe.task)
        found = measure_hidden(task, model.to(device), batches, recipe.seed, advance)
    model.cpu()
    return found


def cost_by(
    recipe: Recipe, section: SlimSection, model: Care, latency: Callable[[Care], Cost]
) -> Cost:
    """What widths cost in the unit of the budget."""
    if section.budget.kind == "latency":
        return latency(model)
    return cost_of(model, section.budget.kind, recipe.data.resolution)


def refit_images(
    context: RunContext, recipe: Recipe, section: SlimSection, samples: Samples
) -> list[Tensor]:
    """The images that layers are refitted on, held in memory with what both networks make of them.

    At more pixels they are fewer: convolutions see as many positions, in as much memory.
    """
    shrunk = min(1.0, (REFITTED_AT / recipe.data.resolution) ** 2)
    count = max(FEWEST_IMAGES, int(section.images * shrunk))
    indices = spread_indices(len(samples), count)
    batches = prepared_batches(samples, recipe.data, REFIT_BATCH, bad=context.bad, indices=indices)
    with contextlib.closing(batches):
        return [batch.images for batch in batches]


def followed(
    context: RunContext,
    recipe: Recipe,
    teacher: Care,
    samples: Samples,
    validate: Validate,
    start: Care,
    section: FollowSection,
    file: str,
) -> Care:
    """Train `start` to follow `teacher`; kept in `file` of the run, its state beside it."""
    path = context.run.path / file
    learned = recipe_parts(recipe)["heal"]
    decided_by = {
        **learned,
        "course": section.model_dump(mode="json", exclude=WATCHING),
        "start": state_digest(start.state_dict()),
        "teacher": state_digest(teacher.state_dict()),
        "training images": samples.content_digest(),
    }

    def make() -> None:
        stage = path.stem
        with context.stage(f"slim {stage}"):
            folder = str(Path(file).with_suffix(""))
            training = training_in(context, recipe, samples, validate, folder)
            objective = FollowWhole(
                task_called(recipe.task), teacher, section, context.world.device
            )
            course = training.course(section, fingerprint(decided_by))
            trainee = training.fit(Follower(copy.deepcopy(start)), objective, course)
            result = trainee.result
            assert isinstance(result, Follower)
        if context.world.is_main:
            save_checkpoint(result.care.cpu(), path, about(recipe))
            context.run.record_output(path)
            context.run.write_json(
                f"{folder}/history.json", {"validations": trainee.progress.history}
            )

    once(context, f"slim {path.stem}", decided_by, make, together=True, handed_in=[validate])
    context.world.wait()
    return load_checkpoint(path)


def about(recipe: Recipe) -> dict[str, str]:
    """What a file of weights says about itself."""
    return {"made_by": MAKER, "seed": str(recipe.seed)}
