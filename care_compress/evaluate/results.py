"""``results.json``: what a run was made from, how its models did, and what it exported.

With it goes everything a reader should know about the numbers: the checks of the run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from care_compress.console import CheckResult, show_checks
from care_compress.data.annotations import is_annotated
from care_compress.data.checks import coverage_check, overlap_checks
from care_compress.data.samples import Samples, spread_indices
from care_compress.evaluate.accuracy import answers_check, metrics_line
from care_compress.evaluate.readback import exports_check
from care_compress.evaluate.run_accuracy import Scores, seen_images
from care_compress.evaluate.slim_accuracy import SLIM
from care_compress.files import read_json
from care_compress.model.rewrite import RewriteStep
from care_compress.quantize.health import NNCF_TELLS_NOTHING, Health, read_health
from care_compress.quantize.stages import CALIBRATION_FILE
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import DROPS
from care_compress.run.context import RunContext
from care_compress.shipped import COMPARE
from care_compress.tasks.dense import Figures, Records
from care_compress.tasks.known import task_called

UNREADABLE = "health.json is not beside the model: make the run again under another --name"


def write_results(
    context: RunContext,
    recipe: Recipe,
    validation: Samples,
    steps: Sequence[RewriteStep],
    scores: Scores,
    exports: Mapping[str, Any],
    slim: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Put the results together, write and tell them; `exports` by target, as in ``export.json``.

    `slim` is what `score_slim` found of a network that was cut.
    """
    console, accuracy = context.console, scores.accuracy
    # The other processes report nothing, and may not see the run directory.
    main = context.world.is_main
    checks = run_checks(context, recipe, validation, scores, exports) if main else []
    show_checks(checks, console)
    results = {
        "run": context.run.name,
        "recipe": recipe.name,
        "precision": recipe.precision,
        "task": recipe.task,
        "accuracy": {"images": accuracy.images, **accuracy.metrics()},
        "rewrites": [{"name": step.name, **asdict(step.cost)} for step in steps],
        "data": {
            "source": recipe.data.source,
            "fingerprint": validation.fingerprint(),
            "classes": list(validation.classes),
            "skipped_images": context.bad.reasons,
        },
        "checks": [check.as_json() for check in checks],
        "exports": dict(exports),
        "seconds": context.seconds,
        **_quantized(context, recipe, scores),
        **_slimmed(recipe, scores, slim),
    }
    if main:
        path = context.run.write_json("results.json", results)
        if len(context.bad):
            console.print(
                f"[yellow]{len(context.bad)} images could not be decoded and were skipped"
            )
        console.print(f"results: {escape(str(path))}", soft_wrap=True)
    _tell(context, recipe, scores, results.get("budget"))
    return results


def run_checks(
    context: RunContext,
    recipe: Recipe,
    validation: Samples,
    scores: Scores,
    exports: Mapping[str, Any],
) -> list[CheckResult]:
    """Make every check of the run's numbers; worst first."""
    indices, best = spread_indices(len(validation), recipe.evaluate.images), scores.best
    answers = {"float": scores.accuracy}
    health: list[CheckResult] = []
    if best is not None:
        assert recipe.quantize is not None
        answers = {"float": best.paired.baseline, best.name: best.paired.candidate}
        if recipe.quantize.backend == "nncf":
            health = Health.missing(NNCF_TELLS_NOTHING)
        else:
            read = read_health(best.path.with_name("health.json"))
            health = Health.missing(UNREADABLE) if read is None else read.checks()
    # Names of the calibration images, and digests of what they are stored as.
    calibration: list[tuple[str, int]] | None = []
    if recipe.quantize is not None:
        images = read_json(context.run.path / CALIBRATION_FILE)["images"]
        if all("stored" in image for image in images):
            calibration = [(image["name"], int(image["stored"], 16)) for image in images]
        else:
            calibration = None  # a list of an earlier version, taken over with its stage
    found = [
        choice_check(recipe, scores),
        exports_check(exports),
        answers_check(answers),
        coverage_check(validation.classes, _images_of_classes(validation, indices, scores)),
        *overlap_checks(validation, seen_images(context, validation), calibration),
        *health,
    ]
    order = ("warning", "not measured", "fine")
    return sorted(found, key=lambda check: order.index(check.status))


def _images_of_classes(
    validation: Samples, indices: Sequence[int], scores: Scores
) -> NDArray[np.int64]:
    """Count images by class; of labels with a place it is only known whether there are any."""
    if not is_annotated(validation):
        labels = validation.labels[list(indices)]
        return np.bincount(labels, minlength=len(validation.classes))
    assert isinstance(scores.accuracy, Figures | Records)
    return np.array([one is not None for one in scores.accuracy.per_class], np.int64)


def choice_check(recipe: Recipe, scores: Scores) -> CheckResult:
    """Say what was chosen by images, and whether those were the ones that are reported."""
    if scores.best is not None and scores.best is not scores.candidates[-1]:
        kept, dropped = scores.best.name, scores.candidates[-1].name
        text = f"{dropped} was beyond doubt worse, so the images that are reported chose {kept}"
        return CheckResult("choices", "warning", text)
    quantize = recipe.quantize
    told = ["nothing was chosen by the validation images that are reported"]
    if quantize is not None and quantize.searches:
        told.append("the search chose by training images that calibrate nothing")
    if quantize is not None and quantize.qat is not None:
        told.append("QAT's weights are kept unless they are beyond doubt worse than PTQ's")
    return CheckResult("choices", "fine", "; ".join(told))


def _quantized(context: RunContext, recipe: Recipe, scores: Scores) -> dict[str, Any]:
    """Return what only a run with a quantize section has."""
    best = scores.best
    if best is None or recipe.quantize is None:
        return {}
    baseline, plan = best.paired.baseline, best.plan
    in_short = plan and {
        "target": plan.target,
        "macs": plan.macs_by_precision(),
        "energy_mj": plan.energy_mj,
    }
    return {
        "float": baseline.metrics(),
        "backend": recipe.quantize.backend,
        "kept": best.name,
        "model": str(best.path.relative_to(context.run.path)),
        "candidates": {one.name: one.paired.as_json() for one in scores.candidates},
        **({"plan": in_short} if in_short else {}),
        "budget": _budget(recipe, best.paired.drop),
    }


def _slimmed(recipe: Recipe, scores: Scores, slim: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what only a run with a slim section has; its drop counts from the whole network."""
    if slim is None:
        return {}
    one = slim["models"][SLIM if scores.best is None else scores.best.name]
    return {"slim": dict(slim), "budget": _budget(recipe, one["drop"])}


def _budget(recipe: Recipe, drop: float) -> dict[str, Any] | None:
    """Return the limit of the drop and whether it holds; None where the recipe sets none."""
    limit = recipe.budget.max_drop
    return None if limit is None else {DROPS[recipe.task]: limit, "met": drop <= limit}


def _tell(
    context: RunContext, recipe: Recipe, scores: Scores, budget: Mapping[str, Any] | None
) -> None:
    """Tell the outcome in one or two lines, and what to do next."""
    console, accuracy, best = context.console, scores.accuracy, scores.best
    if budget is not None and not budget["met"]:
        limit = recipe.budget.max_drop
        what = task_called(recipe.task).metric.name
        console.print(f"[yellow]the drop in {what} is over the budget of {limit} points[/]")
    if best is None or recipe.quantize is None:
        first, *others = metrics_line(task_called(recipe.task), accuracy)
        console.print(
            f"[bold]{first}[/]  {'  '.join(others)}  on {accuracy.images:,} images (float32)"
        )
        return
    measured = "the file" if recipe.quantize.backend == "nncf" else "the simulation"
    console.print(
        f"Accuracy is that of {measured}. Next, accuracy and speed of the exported files: "
        f"{COMPARE} fp32 {context.run.name}"
    )


def rewrite_table(steps: list[RewriteStep]) -> Table:
    """Show the cost of one image after each exact rewrite."""
    table = Table(title="Exact rewrites", title_justify="left")
    table.add_column("after")
    for column in ("parameters", "MACs (M)", "operations"):
        table.add_column(column, justify="right")
    for step in steps:
        cost = step.cost
        table.add_row(
            step.name, f"{cost.parameters:,}", f"{cost.macs / 1e6:.2f}", str(cost.operations)
        )
    return table
