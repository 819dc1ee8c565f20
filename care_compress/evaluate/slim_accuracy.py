"""A slimmed network beside the whole one: what the cut lost, counted honestly.

The whole network gets the same extra training before anything is held against it: one that has not
converged gets better by any training, and that is no merit of the cut. Both are told, and the
better of the two is what the cut one is held to.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from care_compress.data.loader import images_at_once
from care_compress.data.samples import Samples, spread_indices
from care_compress.errors import DataError
from care_compress.evaluate.accuracy import own_share, shown_batches
from care_compress.evaluate.run_accuracy import Candidate
from care_compress.files import digest_of
from care_compress.model.care import Care
from care_compress.model.checkpoint import state_digest
from care_compress.model.cost import measure_cost
from care_compress.model.predictor import Predictor
from care_compress.recipe.recipe import Recipe
from care_compress.run.context import RunContext
from care_compress.run.stages import Json, once, recipe_parts
from care_compress.runtime.artifact import open_predictor
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.slim.stage import Slimmed
from care_compress.tasks.known import task_called, task_of
from care_compress.tasks.task import Answers, Collected, Task

GIVEN, TRAINED, SLIM = "float", "float, trained as long", "slim"


def score_slim(
    context: RunContext,
    recipe: Recipe,
    given: Care,
    slim: Slimmed,
    best: Candidate | None,
    validation: Samples,
) -> Json:
    """Measure the whole network, as given and equally trained, and what was made of it."""
    trained = {} if slim.whole is given else {TRAINED: slim.whole}
    networks = {GIVEN: given, **trained, SLIM: slim.model}
    task = task_called(recipe.task)

    def measure() -> Json:
        device, world = context.world.device, context.world
        models: dict[str, Predictor] = {
            name: TorchPredictor(network, network.num_classes, device)
            for name, network in networks.items()
        }
        if best is not None:
            models[best.name] = open_predictor(str(best.path), device)
        all_to_given = dict.fromkeys(models, GIVEN)
        size = images_at_once(recipe.evaluate.batch_size, device)
        chosen = own_share(spread_indices(len(validation), recipe.evaluate.images), size, world)
        with context.stage("evaluate"):
            batches = shown_batches(
                validation,
                recipe.data,
                size,
                indices=chosen,
                bad=context.bad,
                console=context.console,
                device=device,
                contents=None,
            )
            mine: Collected[Answers] | None = None
            # This process may have no share of few images; others have.
            with contextlib.closing(batches), contextlib.suppress(DataError):
                mine = task.collect(models, all_to_given, batches, lambda done: None)
        parts = [part for part in world.gathered(mine) if part is not None]
        if not parts:
            raise DataError("there was no image to evaluate.", "check the val split")
        answers: dict[str, Answers] = {}
        for name in models:
            first, *others = (part.answers[name] for part in parts)
            answers[name] = sum(others, first)
        metrics, key = {name: one.metrics() for name, one in answers.items()}, task.metric.key
        # Following itself, a whole network may also end below where it began: the better counts.
        gained = bool(trained) and metrics[TRAINED][key] >= metrics[GIVEN][key]
        held_to = TRAINED if gained else GIVEN
        found = {}
        for name in models:
            against = GIVEN if name in (GIVEN, TRAINED) else held_to
            drop = answers[against].drop_to(answers[name])
            found[name] = {
                "images": sum(map(len, parts)),
                **metrics[name],
                "against": against,
                "drop": drop.value,
                "drop_ci95": [drop.low, drop.high],
            }
        return found

    made_from = {
        **recipe_parts(recipe)["evaluate"],
        **{name: state_digest(network.state_dict()) for name, network in networks.items()},
        "quantized": best and digest_of(best.path),
        "validation images": validation.content_digest(),
    }
    models = once(context, "evaluate slim", made_from, measure, together=True)
    before, after = (measure_cost(one, recipe.data.resolution) for one in (given, slim.model))
    assert recipe.slim is not None
    budget = recipe.slim.budget
    told = {
        "budget": {"kind": budget.kind, "share": budget.share},
        "macs": [before.macs, after.macs],
        "parameters": [before.parameters, after.parameters],
        "models": models,
    }
    print_slim(told, task, context.console)
    return told


def print_slim(told: dict[str, Any], task: Task, console: Console) -> None:
    """Show what the cut cost and what it saves."""
    models = told["models"]
    images = next(iter(models.values()))["images"]
    table = Table(title=f"Slimmed, on {images:,} validation images", title_justify="left")
    table.add_column("model")
    for column in (*task.shown.values(), "drop [95 %]"):
        table.add_column(column, justify="right")
    table.add_column("against")
    for name, one in models.items():
        low, high = one["drop_ci95"]
        drop = f"{one['drop']:.2f} [{low:.2f}, {high:.2f}]"
        first = name == GIVEN
        table.add_row(
            name,
            *(f"{one[key]:.2f} %" for key in task.shown),
            "" if first else drop,
            "" if first else one["against"],
        )
    console.print(table)
    for what, (before, after) in (("MACs", told["macs"]), ("parameters", told["parameters"])):
        console.print(
            f"{what}: {before / 1e6:.2f} M before, {after / 1e6:.2f} M after "
            f"({100 * (1 - after / before):.1f} % fewer)",
            highlight=False,
        )


def slim_line(results: Mapping[str, Any]) -> str:
    """What a reader of a comparison should know of a network that was cut."""
    slim, key = results["slim"], task_of(results).metric.key
    (macs, fewer), models = slim["macs"], slim["models"]
    one, whole = models[results.get("kept", SLIM)], f"{models[GIVEN][key]:.2f} % as given"
    if TRAINED in models:
        whole += f", {models[TRAINED][key]:.2f} % after the same training"
    low, high = one["drop_ci95"]
    return (
        f"cut to {fewer / macs:.3f} of the multiply-accumulates; the whole network has {whole}, "
        f"and from there the drop is {one['drop']:.2f} [{low:.2f}, {high:.2f}] points in simulation"
    )
