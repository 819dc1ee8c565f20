"""What training a compressed network minimises: to answer as its float teacher does."""

from collections.abc import Sequence

import torch
from torch import Tensor

from care_compress.errors import TrainingError
from care_compress.model.predictor import Predictor
from care_compress.recipe.sections import FollowSection
from care_compress.tasks.task import Targets, Task


def follow_float(
    task: Task,
    answer: Tensor,
    features: Sequence[Tensor],
    taught_answer: Tensor,
    taught: Sequence[Tensor],
    targets: Targets,
    section: FollowSection,
) -> Tensor:
    """Distance of a compressed model from its float teacher, on the same images.

    (1 - labels) T^2 KL(teacher / T || student / T) + labels CE
    + features mean_i ||f_i - t_i||^2 / ||t_i||^2 over the stage outputs,

    where a task that gives out no classes has distances of its own.
    """
    distance = task.following(answer, taught_answer, section.temperature)
    loss = (1 - section.labels) * distance
    if section.labels:
        loss = loss + section.labels * task.loss(answer, targets)
    if section.features:
        distances = [
            (f.float() - t.float()).square().mean() / t.float().square().mean().clamp(min=1e-12)
            for f, t in zip(features, taught, strict=True)
            if f.shape == t.shape  # the hidden channels that the network ends in may be fewer
        ]
        loss = loss + section.features * torch.stack(distances).mean()
    return loss


def check_teacher(teacher: Predictor, num_classes: int) -> None:
    """Refuse a teacher of other classes before any work."""
    if teacher.num_classes != num_classes:
        raise TrainingError(
            f"the teacher has {teacher.num_classes} classes, the data has {num_classes}.",
            "use a teacher trained on the same classes",
        )
