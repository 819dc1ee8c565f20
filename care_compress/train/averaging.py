"""Exponential moving average of weights and BatchNorm statistics, with a warm-up."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


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
