"""Every task by its name."""

from collections.abc import Mapping
from typing import Any

from care_compress.data.listing import Split
from care_compress.data.samples import Samples
from care_compress.errors import RecipeError
from care_compress.model.care import Care
from care_compress.recipe.recipe import Recipe
from care_compress.tasks.classification import Classification
from care_compress.tasks.detection import Detection
from care_compress.tasks.segmentation import Segmentation
from care_compress.tasks.task import Task

TASKS: dict[str, Task] = {
    task.name: task for task in (Classification(), Segmentation(), Detection())
}


def task_called(name: str) -> Task:
    """Return the task of this name."""
    return TASKS[name]


def task_of(value: Mapping[str, Any]) -> Task:
    """Return the task of results or a comparison as JSON; older ones are of classifiers."""
    return TASKS[value.get("task", Classification.name)]


def labelled(recipe: Recipe, split: Split) -> Samples:
    """Open the images of one split of a recipe, with the labels of its task."""
    return task_called(recipe.task).samples(recipe.data, split)


def check_task(model: Care, recipe: Recipe) -> None:
    """Refuse a network that was made for another task than the recipe."""
    if model.task != recipe.task:
        raise RecipeError(
            f"the checkpoint is a {model.arch} for {model.task}, {recipe.name} is for "
            f"{recipe.task}.",
            "train a head on its stages first: a recipe that trains, with model.backbone"
            if model.task == "classification"
            else f"choose a recipe for {model.task}",
        )
