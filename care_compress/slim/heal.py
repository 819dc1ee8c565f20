"""Healing: a cut network is trained to answer as the whole one does, logits and stage outputs."""

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

    def forward(self, x_BCHW: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        """(logits, stage outputs) in training mode, logits in eval mode; the mean of both heads.

        The mean is what is deployed, so the mean is what learns.
        """
        logits, features = self.answers(x_BCHW)
        return (logits, features) if self.training else logits

    def answers(self, x_BCHW: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits and stage outputs in any mode."""
        features = self.care.forward_features(x_BCHW)
        pooled = features[-1].mean(dim=(2, 3))
        return (self.care.head(pooled) + self.care.dist_head(pooled)) / 2, features


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
        self, model: nn.Module, images_BCHW: Tensor, targets_BK: Targets, progress: float
    ) -> Outcome:
        """Run student and teacher on the same images."""
        with torch.no_grad():
            taught_BK, taught = self.teacher.answers(images_BCHW)
        logits_BK, features = model(images_BCHW)
        loss = follow_float(
            self.task, logits_BK, features, taught_BK, taught, targets_BK, self.section
        )
        return Outcome(loss, logits_BK.detach())
