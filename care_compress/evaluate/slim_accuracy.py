"""A slimmed network beside the whole one: what the cut lost, counted honestly.

The whole network gets the same extra training before anything is held against it: one that has not
converged gets better by any training, and that is no merit of the cut. Both are told, and the
better of the two is what the cut one is held to.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
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
from care_compress.tasks.classification import collect_answers, drop_between

GIVEN, TRAINED, SLIM = "float", "float, trained as long", "slim"


@dataclass(frozen=True)
class _Right:
    """Which images a model got right."""

    first: NDArray[np.bool_]
    in_top5: NDArray[np.bool_]


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
            with contextlib.closing(batches):
                try:
                    answers = collect_answers(
                        models, all_to_given, batches, lambda done: None
                    ).answers
                except DataError:  # this process has no share of few images; others have
                    answers = {}
        mine = {name: _Right(one.right, one.in_top5) for name, one in answers.items()}
        parts = [part for part in world.gathered(mine) if part]
        if not parts:
            raise DataError("there was no image to evaluate.", "check the val split")
        right = {name: np.concatenate([part[name].first for part in parts]) for name in models}
        top5 = {name: np.concatenate([part[name].in_top5 for part in parts]) for name in models}
        # Following itself, a whole network may also end below where it began: the better counts.
        gained = bool(trained) and right[TRAINED].sum() >= right[GIVEN].sum()
        held_to = TRAINED if gained else GIVEN
        found = {}
        for name in models:
            against = GIVEN if name in (GIVEN, TRAINED) else held_to
            drop = drop_between(right[against], right[name])
            found[name] = {
                "images": len(right[name]),
                "top1": 100 * float(right[name].mean()),
                "top5": 100 * float(top5[name].mean()),
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
    print_slim(told, context.console)
    return told


def print_slim(told: dict[str, Any], console: Console) -> None:
    """Show what the cut cost and what it saves."""
    models = told["models"]
    images = next(iter(models.values()))["images"]
    table = Table(title=f"Slimmed, on {images:,} validation images", title_justify="left")
    table.add_column("model")
    for column in ("top-1", "top-5", "drop [95 %]"):
        table.add_column(column, justify="right")
    table.add_column("against")
    for name, one in models.items():
        low, high = one["drop_ci95"]
        drop = f"{one['drop']:.2f} [{low:.2f}, {high:.2f}]"
        first = name == GIVEN
        table.add_row(
            name,
            f"{one['top1']:.2f} %",
            f"{one['top5']:.2f} %",
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
    slim = results["slim"]
    (macs, fewer), models = slim["macs"], slim["models"]
    one, whole = models[results.get("kept", SLIM)], f"{models[GIVEN]['top1']:.2f} % as given"
    if TRAINED in models:
        whole += f", {models[TRAINED]['top1']:.2f} % after the same training"
    low, high = one["drop_ci95"]
    return (
        f"cut to {fewer / macs:.3f} of the multiply-accumulates; the whole network has {whole}, "
        f"and from there the drop is {one['drop']:.2f} [{low:.2f}, {high:.2f}] points in simulation"
    )
