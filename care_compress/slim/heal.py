"""Healing: a cut network is trained to answer as the whole one does, at its stages too."""

import copy

import torch
from torch import Tensor, nn

from care_compress.model.care import Care
from care_compress.recipe.sections import FollowSection
from care_compress.tasks.task import Outcome, Targets, Task
from care_compress.train.objective import follow_float


class Follower(nn.Module):
    """A CARE in training that hands out what it is compared by."""

    def __init__(self, care: Care) -> None:
        super().__init__()
        self.care = care
        self.task = care.task

    def forward(self, x_BCHW: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        """(answer, stage outputs) in training mode, the answer in eval mode."""
        answer, features = self.answers(x_BCHW)
        return (answer, features) if self.training else answer

    def answers(self, x_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Answer and stage outputs in any mode.

        Of a classifier's two heads the mean is deployed, so the mean is what learns.
        """
        features = self.care.forward_features(x_BCHW)
        said = self.care.answer(features)
        return (said[0] + said[1]) / 2 if isinstance(said, tuple) else said, features


class FollowWhole:
    """Distance of a cut network from the whole one."""

    def __init__(
        self, task: Task, whole: Care, section: FollowSection, device: torch.device
    ) -> None:
        self.task = task
        # A copy: the caller's may be in another place or layout, whose sums round otherwise.
        layout = torch.channels_last
        twin = Follower(copy.deepcopy(whole)).eval()
        self.teacher: Follower = twin.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        self.section = section

    def __call__(
        self, model: nn.Module, images_BCHW: Tensor, targets: Targets, progress: float
    ) -> Outcome:
        """Run student and teacher on the same images."""
        with torch.no_grad():
            taught_answer, taught = self.teacher.answers(images_BCHW)
        answer, features = model(images_BCHW)
        loss = follow_float(
            self.task, answer, features, taught_answer, taught, targets, self.section
        )
        return Outcome(loss, answer.detach())
