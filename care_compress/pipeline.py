"""The whole product in one place: from a recipe to results, stage after stage.

    recipe -> float model (trained, or loaded) -> rewrite -> quantize -> (train) -> export
           -> results.json

Each stage takes its own section of the recipe and the previous stage's value, and leaves what it
made in the run directory.
"""

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from care_compress.console import show_findings
from care_compress.data.samples import Samples
from care_compress.data.sources import open_samples
from care_compress.evaluate.accuracy import Accuracy
from care_compress.evaluate.checks import run_findings
from care_compress.evaluate.run_accuracy import scored
from care_compress.evaluate.tables import quantized_table, rewrite_table
from care_compress.export.result import Exported
from care_compress.export.stage import check_exports, exported
from care_compress.model.care import Care
from care_compress.model.checkpoint import (
    state_digest,
)
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import RewriteStep, rewrite_in_steps
from care_compress.preflight import check_exportable, check_recipe, check_space, space_of
from care_compress.quantize.spec import Plan
from care_compress.quantize.stages import Candidate, quantized, trained_quantized
from care_compress.recipe.recipe import Recipe
from care_compress.run.context import Workshop, opened
from care_compress.run.directory import Run
from care_compress.run.processes import join_world
from care_compress.run.stages import once, recipe_parts
from care_compress.train.stage import float_model


def run_recipe(
    recipe: Recipe, runs: Path, name: str, console: Console, repair: bool = False
) -> dict[str, Any]:
    """Run every stage of a recipe; the results, as they stand in ``results.json``.

    Stages that an earlier run of this name left are taken over where nothing they came from has
    changed (`care_compress.stages`); `repair` makes those again whose files were damaged.
    """
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(join_world())
        console = console if world.is_main else Console(quiet=True)
        # Before the run is opened: a typo leaves old results alone.
        plan = check_recipe(recipe, world)
        targets = check_exportable(recipe, console)
        check_space(space_of(recipe, plan, targets), runs / name)
        run = stack.enter_context(opened(Run(runs, name), recipe, world, repair))
        shop = Workshop(recipe, run, world, console, repair=repair)
        shop.console.print(f"[bold]{escape(recipe.name)}[/]: {escape(recipe.claim)}")
        validation = validation_images(shop)
        model = float_model(shop, validation)
        compact, steps = rewritten(shop, model)
        if recipe.quantize is None:
            accuracy = float_accuracy(shop, compact, validation)
            done = exported(shop, model, compact, None, validation)
            results = report_float(shop, validation, steps, accuracy, done)
            check_exports(done)
            return results
        tried = [quantized(shop, compact, validation)]
        if recipe.quantize.qat is not None:
            tried.append(trained_quantized(shop, tried[0], compact, validation))
        best = best_of(tried)
        show_candidates(shop, tried, best)
        done = exported(shop, model, compact, best.path, validation)
        results = report_quantized(shop, validation, steps, tried, best, done)
        check_exports(done)
        return results


def validation_images(shop: Workshop) -> Samples:
    """The images that everything is measured on."""
    validation = open_samples(shop.recipe.data, "val")
    if shop.world.is_main:
        shop.run.record_input("validation_images", validation.fingerprint())
    return validation


def rewritten(shop: Workshop, model: Care) -> tuple[CompactCare, list[RewriteStep]]:
    """Apply the exact rewrites and show what each of them saves."""
    with shop.stage("rewrite"):
        compact, steps = rewrite_in_steps(model, shop.recipe.rewrite, shop.recipe.data.resolution)
    shop.console.print(rewrite_table(steps))
    return compact, steps


def float_accuracy(shop: Workshop, compact: CompactCare, validation: Samples) -> Accuracy:
    """Accuracy of a recipe that quantizes nothing."""
    made_from = {
        **recipe_parts(shop.recipe)["evaluate"],
        "float model": state_digest(compact.state_dict()),
        "validation images": validation.content_digest(),
    }
    counted = once(
        shop,
        "evaluate",
        made_from,
        lambda: asdict(scored(shop, compact, validation)),
        together=True,
    )
    return Accuracy(**counted)


def report_float(
    shop: Workshop,
    validation: Samples,
    steps: list[RewriteStep],
    accuracy: Accuracy,
    done: list[Exported],
) -> dict[str, Any]:
    """Results of a recipe without a quantize section."""
    results = _results(shop, validation, steps, accuracy, done)
    _finish(shop, results)
    shop.console.print(
        f"[bold]top-1 {accuracy.top1:.2f} %[/]  top-5 {accuracy.top5:.2f} %  "
        f"on {accuracy.images:,} images (float32)"
    )
    return results


def best_of(tried: list[Candidate]) -> Candidate:
    """The last candidate, unless it ended below an earlier one."""
    return max(reversed(tried), key=lambda candidate: candidate.paired.candidate.correct)


def show_candidates(shop: Workshop, tried: list[Candidate], best: Candidate) -> None:
    """Float and quantized side by side, and which is kept."""
    named = [(candidate.name, candidate.paired) for candidate in tried]
    shop.console.print(quantized_table(named, best.name))
    if best is not tried[-1]:
        shop.console.print(
            f"[yellow]{tried[-1].name} ended below {best.name}[/], so the {best.name} weights "
            "are kept; try a lower quantize.qat.learning_rate"
        )
    shop.console.print(f"quantized model: {escape(str(best.path))}", soft_wrap=True)


def report_quantized(
    shop: Workshop,
    validation: Samples,
    steps: list[RewriteStep],
    tried: list[Candidate],
    best: Candidate,
    done: list[Exported],
) -> dict[str, Any]:
    """Results of a quantized recipe."""
    recipe, section = shop.recipe, shop.recipe.quantize
    assert section is not None
    results = {
        **_results(shop, validation, steps, best.paired.candidate, done, best),
        "float": {
            "top1": best.paired.baseline.top1,
            "top5": best.paired.baseline.top5,
        },
        "backend": section.backend,
        "kept": best.name,
        "model": str(best.path.relative_to(shop.run.path)),
        "candidates": {candidate.name: candidate.paired.as_json() for candidate in tried},
        **({} if best.plan is None else {"plan": _plan_in_short(best.plan)}),
        "budget": _budget(recipe, best.paired.drop),
    }
    _finish(shop, results)
    if results["budget"] and not results["budget"]["met"]:
        limit = results["budget"]["max_top1_drop"]
        shop.console.print(
            f"[yellow]a drop of {best.paired.drop:.2f} points is over the budget of {limit}[/]"
        )
    measured = "the file" if section.backend == "nncf" else "the simulation"
    shop.console.print(
        f"Accuracy is that of {measured}. Next, accuracy and speed of the exported files: "
        f"python eval/compare.py fp32 {shop.run.name}"
    )
    return results


def _budget(recipe: Recipe, drop: float) -> dict[str, Any] | None:
    limit = recipe.budget.max_top1_drop
    return None if limit is None else {"max_top1_drop": limit, "met": drop <= limit}


def _plan_in_short(plan: Plan) -> dict[str, Any]:
    return {
        "target": plan.target,
        "macs": plan.macs_by_precision(),
        "energy_mj": plan.energy_mj,
    }


def _results(
    shop: Workshop,
    validation: Samples,
    steps: list[RewriteStep],
    accuracy: Accuracy,
    done: list[Exported],
    best: Candidate | None = None,
) -> dict[str, Any]:
    """What every kind of recipe reports."""
    recipe = shop.recipe
    # The other processes report nothing, and may not see the run directory.
    main = shop.world.is_main
    findings = run_findings(shop, validation, accuracy, best, done) if main else []
    show_findings(findings, shop.console)
    return {
        "run": shop.run.name,
        "recipe": recipe.name,
        "precision": recipe.precision,
        "accuracy": {"images": accuracy.images, "top1": accuracy.top1, "top5": accuracy.top5},
        "rewrites": [{"name": step.name, **asdict(step.cost)} for step in steps],
        "data": {
            "source": recipe.data.source,
            "fingerprint": validation.fingerprint(),
            "classes": list(validation.classes),
            "skipped_images": shop.bad.reasons,
        },
        "checks": [finding.as_json() for finding in findings],
        "exports": {one.target.name: one.as_json() for one in done},
        "seconds": shop.seconds,
    }


def _finish(shop: Workshop, results: dict[str, Any]) -> None:
    """Write ``results.json`` and say where."""
    if not shop.world.is_main:
        return
    path = shop.run.write_json("results.json", results)
    if len(shop.bad):
        shop.console.print(f"[yellow]{len(shop.bad)} images could not be decoded and were skipped")
    shop.console.print(f"results: {escape(str(path))}", soft_wrap=True)
