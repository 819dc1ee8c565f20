"""The whole product in one place: from a recipe to results, stage after stage.

    recipe -> float model (trained, or loaded) -> (slim) -> rewrite -> quantize -> (train)
           -> export -> results.json

Each stage takes its own section of the recipe and the previous stage's value, and leaves what it
made in the run directory. What must score on the way is handed the function that does.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from care_compress.data.samples import Samples
from care_compress.evaluate.accuracy import validating
from care_compress.evaluate.results import rewrite_table, write_results
from care_compress.evaluate.run_accuracy import Candidate, evaluated, judging, score
from care_compress.evaluate.slim_accuracy import score_slim
from care_compress.export.stage import check_exports, exported
from care_compress.export.width_times import timing
from care_compress.model.care import Care
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import RewriteStep, rewrite, rewrite_in_steps
from care_compress.preflight import (
    Ready,
    check_space,
    own_section,
    preflight,
    with_pinned_checkpoint,
)
from care_compress.quantize.search import MeasureNoises, noises_here
from care_compress.quantize.sensitivity import MeasureSites, Sensitivity, one_by_one
from care_compress.quantize.stages import measure_sites, quantized, trained_quantized
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.slim import SlimSection
from care_compress.run.context import RunContext, Watch, open_run
from care_compress.run.directory import Run
from care_compress.run.processes import World, join_world
from care_compress.runtime.artifact import teacher_opener
from care_compress.slim.stage import Slimmed, slimmed
from care_compress.tasks.known import labelled
from care_compress.train.stage import loaded, trained


def run_recipe(
    recipe: Recipe,
    runs: Path,
    name: str,
    console: Console,
    repair: bool = False,
    watch: Watch | None = None,
    measure: MeasureNoises = noises_here,
) -> dict[str, Any]:
    """Run every stage of a recipe; the results, as they stand in ``results.json``.

    Stages that an earlier run of this name left are taken over where nothing they came from has
    changed (`care_compress.run.stages`); `repair` makes those again whose files were damaged.
    `watch` is told of every validation of a training, and may end the run by raising. `measure`
    may spread what a search for bits measures over processes (`care_compress.sweep.sites`).
    """
    recipe = with_pinned_checkpoint(recipe)
    with _begun(recipe, runs, name, console, repair, watch) as (context, ready):
        validation = labelled(recipe, "val")  # everything is measured on these images
        if context.world.is_main:
            context.run.record_input("validation_images", validation.fingerprint())
        given = model = _float_model(context, recipe, ready, validation)
        slim = None
        if recipe.slim is not None:
            slim = _slimmed(context, recipe, recipe.slim, given, validation)
            model = slim.model
        compact, steps = _rewritten(context, recipe, model)

        tried: list[Candidate] = []
        section = recipe.quantize
        if section is not None:
            judge = judging(context, recipe, compact)
            ptq = quantized(context, recipe, section, compact, judge, measure)
            tried.append(evaluated(context, recipe, "ptq", ptq, compact, validation))
            if section.qat is not None:
                validate = validating(context, recipe, validation)
                teacher = compact if slim is None else rewrite(given, recipe.rewrite)
                qat = trained_quantized(
                    context, recipe, section, section.qat, compact, teacher, ptq, validate
                )
                tried.append(evaluated(context, recipe, "qat", qat, compact, validation))

        scores = score(context, recipe, compact, tried, validation)
        kept = scores.best.path if scores.best else None
        exports = exported(context, recipe, model, compact, kept, validation)
        as_json = {one.target.name: one.as_json() for one in exports}
        lost = None
        if slim is not None:
            lost = score_slim(context, recipe, given, slim, scores.best, validation)
        results = write_results(context, recipe, validation, steps, scores, as_json, lost)
        check_exports(exports)
        return results


def run_sensitivity(
    recipe: Recipe,
    runs: Path,
    name: str,
    images: int,
    console: Console,
    measure: MeasureSites = one_by_one,
) -> list[Sensitivity]:
    """Measure every site of a recipe's PTQ result alone, in a run of its own.

    `measure` may spread the sites over processes (`care_compress.sweep.sites`).
    """
    section, recipe = own_section(recipe), with_pinned_checkpoint(recipe)
    nothing = recipe.export.model_copy(update={"targets": ()})
    recipe = recipe.model_copy(update={"export": nothing})
    ready = preflight(recipe, World(), Console(quiet=True))
    with open_run(Run(runs, name), recipe, World(), console) as context:
        validation = labelled(recipe, "val")
        model = _float_model(context, recipe, ready, validation)
        if recipe.slim is not None:
            model = _slimmed(context, recipe, recipe.slim, model, validation).model
        compact, _ = _rewritten(context, recipe, model)
        return measure_sites(context, recipe, section, compact, validation, images, measure)


@contextmanager
def _begun(
    recipe: Recipe,
    runs: Path,
    name: str,
    console: Console,
    repair: bool,
    watch: Watch | None,
) -> Iterator[tuple[RunContext, Ready]]:
    """Open the run, but only after all checks: a typo should leave old results alone."""
    with join_world() as world:
        console = console if world.is_main else Console(quiet=True)
        ready = preflight(recipe, world, console)
        check_space(ready.space, runs / name)
        with open_run(Run(runs, name), recipe, world, console, repair, watch) as context:
            console.print(f"[bold]{escape(recipe.name)}[/]: {escape(recipe.claim)}")
            yield context, ready


def _float_model(context: RunContext, recipe: Recipe, ready: Ready, validation: Samples) -> Care:
    """Load the recipe's checkpoint, or train a model where there is a train section."""
    if ready.start is not None:
        return loaded(context, ready.start, validation)
    assert recipe.train is not None
    validate = validating(context, recipe, validation)
    teacher = teacher_opener(recipe.data.resolution, context.world.device)
    return trained(context, recipe, recipe.train, validation, validate, teacher)


def _slimmed(
    context: RunContext, recipe: Recipe, section: SlimSection, given: Care, validation: Samples
) -> Slimmed:
    """Cut the float model to its budget, by the clock of the target where the budget asks."""
    latency = timing(recipe, context.run.path.parent, context.console)
    return slimmed(
        context, recipe, section, given, validating(context, recipe, validation), latency
    )


def _rewritten(
    context: RunContext, recipe: Recipe, model: Care
) -> tuple[CompactCare, list[RewriteStep]]:
    """Apply the exact rewrites and show what each of them saves."""
    with context.stage("rewrite"):
        compact, steps = rewrite_in_steps(model, recipe.rewrite, recipe.data.resolution)
    context.console.print(rewrite_table(steps))
    return compact, steps
