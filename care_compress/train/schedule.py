"""Learning rate as a function of the step alone, so that a resumed run needs no scheduler state."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from care_compress.recipe.sections import TrainSection

ONE_CYCLE_START = 1 / 25  # where one-cycle begins, as a fraction of its peak


def learning_rate(step: int, steps_per_epoch: int, plan: TrainSection) -> float:
    """The rate of one step: warm-up, then a cosine down to ``final_lr_fraction`` of the peak.

    `cosine` warms up on a line from zero; `one_cycle` on a cosine from 1/25 of the peak.
    """
    peak, final = plan.learning_rate, plan.learning_rate * plan.final_lr_fraction
    warmup = round(plan.warmup_epochs * steps_per_epoch)
    total = plan.total_steps(steps_per_epoch)
    if step < warmup:
        if plan.schedule == "one_cycle":
            return _cosine(peak * ONE_CYCLE_START, peak, step / warmup)
        return peak * (step + 1) / warmup
    return _cosine(peak, final, (step - warmup) / max(1, total - 1 - warmup))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """An `AveragedModel` whose decay grows as min(decay, (1 + n) / (10 + n)) with its updates n.

    Without the warm-up a short training would end with an average of its own initialisation.
    """

    @torch.no_grad()
    def update(means: Sequence[Tensor], values: Sequence[Tensor], updates: Tensor | int) -> None:
        n = int(updates)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        if means[0].is_floating_point():
            torch._foreach_lerp_(list(means), list(values), weight)
        else:
            torch._foreach_copy_(list(means), list(values))

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
