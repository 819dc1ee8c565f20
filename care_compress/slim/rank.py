"""Which hidden channels matter least, and what is lost with them: pure formulas.

Each measure of importance ends in a `Ranking`: the order in which the channels of one place may
go, and the loss when the first k of them are gone. Losses of one measure can be added over places,
so that an allocation can weigh one place against another.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from care_compress.model.care import Bottleneck

DAMPING = 1e-4  # of a covariance's mean diagonal: channels that never vary have no inverse


@dataclass(frozen=True)
class Ranking:
    """Channels of one place, least important first."""

    order: tuple[int, ...]
    loss: tuple[float, ...]  # loss[k] with the first k of `order` gone; loss[0] is 0

    def kept(self, count: int) -> list[int]:
        """The `count` most important channels, in the network's order."""
        return sorted(self.order[len(self.order) - count :])


def by_scores(scores_H: Tensor) -> Ranking:
    """A ranking by importances that add up: the loss is the sum of what is gone."""
    scores = scores_H.double()
    order = scores.argsort(stable=True)
    losses = torch.cat([scores.new_zeros(1), scores[order].cumsum(0)])
    return Ranking(tuple(order.tolist()), tuple(losses.tolist()))


def magnitude(half: Bottleneck, readers_OH: Tensor) -> Tensor:
    """||w_c||^2 over everything that belongs to a channel (H,).

    `readers_OH` is what reads the hidden channels: the second 1x1, or the mean of both heads.
    """
    return torch.stack(_squares(half, readers_OH)).sum(dim=0)


def module_aware(half: Bottleneck, readers_OH: Tensor) -> Tensor:
    """Sum over layers of ||w_c||^2 / ||W||^2: a channel's share of its modules (H,).

    DIMAP (arXiv 2404.13648): magnitudes of different modules are comparable as shares alone. Needs
    no data.
    """
    return torch.stack([one / one.sum() for one in _squares(half, readers_OH)]).sum(dim=0)


def _squares(half: Bottleneck, readers_OH: Tensor) -> list[Tensor]:
    """||w_c||^2 of each layer, by hidden channel."""
    own = [half.fc1.weight.detach().flatten(1), half.conv.weight.detach().flatten(1)]
    return [layer.double().square().sum(dim=1) for layer in (*own, readers_OH.detach().T)]


def by_reconstruction(weight_OH: Tensor, covariance_HH: Tensor, importance_O: Tensor) -> Ranking:
    """Eliminate one channel after the other; what is left always makes up for it as it can.

    The output is W h. When channel c goes and the others are refitted by least squares, the error
    of output o grows by W_oc^2 / [C^-1]_cc, C being the covariance of h (Optimal Brain Surgeon;
    for structures arXiv 2302.04089). So the channel with the least sum over outputs of
    importance_o W_oc^2 / [C^-1]_cc goes, the weights take its part over,
    W <- W - W_c [C^-1]_c / [C^-1]_cc, and C^-1 loses its row and column. All errors are exact.
    """
    channels = len(covariance_HH)
    damping = DAMPING * covariance_HH.diagonal().mean().clamp(min=1e-30)
    damped = covariance_HH.double() + damping * torch.eye(channels, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    weight = weight_OH.double() * importance_O.double().sqrt()[:, None]
    left = torch.ones(channels, dtype=torch.bool)
    order: list[int] = []
    losses = [0.0]
    for _ in range(channels):
        errors = weight.square().sum(dim=0) / inverse.diagonal().clamp(min=1e-300)
        errors[~left] = torch.inf
        chosen = int(errors.argmin())
        pivot, row = inverse[chosen, chosen].clone(), inverse[chosen].clone()
        weight -= torch.outer(weight[:, chosen] / pivot, row)
        inverse -= torch.outer(row, row) / pivot
        left[chosen] = False
        # What was eliminated stays exactly zero, whatever rounding says.
        weight[:, chosen] = 0
        inverse[chosen], inverse[:, chosen] = 0, 0
        order.append(chosen)
        losses.append(losses[-1] + float(errors[chosen]))
    return Ranking(tuple(order), tuple(losses))
