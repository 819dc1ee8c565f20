"""What the hidden channels of a float network do on calibration images."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from care_compress.data.loader import Batch
from care_compress.errors import DataError
from care_compress.model.care import HEAD_EPS, Care
from care_compress.slim.places import Place, bottleneck_at, find_places, layer_behind
from care_compress.tasks.task import Task


@dataclass
class HiddenStatistics:
    """Of one place: moments of what the layer behind it reads, and what errors there cost."""

    # Of the hidden channels; where a classifier pools them, of what its head's product reads.
    mean_H: Tensor
    covariance_HH: Tensor
    taylor_H: Tensor  # E[(sum over positions of gradient x activation)^2], of the training loss
    importance_O: Tensor  # E[sum over positions of (d answer / d output)^2]


class _Sums:
    """Running sums of one place."""

    def __init__(self, hidden: int, outputs: int) -> None:
        self.samples, self.images = 0, 0
        self.first = torch.zeros(hidden, dtype=torch.float64)
        self.second = torch.zeros(hidden, hidden, dtype=torch.float64)
        self.taylor = torch.zeros(hidden, dtype=torch.float64)
        self.output = torch.zeros(outputs, dtype=torch.float64)

    def add_hidden(self, x_BHN: Tensor) -> None:
        rows = x_BHN.transpose(1, 2).flatten(0, 1)
        self.samples += len(rows)
        self.first += rows.sum(dim=0).double().cpu()
        self.second += (rows.T @ rows).double().cpu()

    def result(self) -> HiddenStatistics:
        mean = self.first / self.samples
        covariance = self.second / self.samples - torch.outer(mean, mean)
        return HiddenStatistics(
            mean, covariance, self.taylor / self.images, self.output / self.images
        )


def measure_hidden(
    task: Task,
    model: Care,
    batches: Iterable[Batch],
    seed: int,
    advance: Callable[[int], None],
) -> dict[Place, HiddenStatistics]:
    """Watch every place while the network sees the images; one pass forward, two back."""
    places = find_places(model)
    hidden: dict[Place, Tensor] = {}
    outputs: dict[Place, Tensor] = {}
    sums: dict[Place, _Sums] = {}
    generator = torch.Generator().manual_seed(seed)
    with watching(model.eval(), places, hidden, outputs), torch.enable_grad():
        for batch in batches:
            answer = model(batch.images.detach().requires_grad_())
            loss = task.loss_of_images(answer, batch)
            inner = [hidden[place] for place in places]
            by_loss = torch.autograd.grad(loss, inner, retain_graph=True)
            # The mean square of a random direction's gradient is that of the whole Jacobian
            # (Hutchinson).
            along = task.along(answer, generator)
            # Where a classifier pools the last place, its outputs are the logits.
            outer = [outputs.get(place, answer) for place in places]
            by_answer = torch.autograd.grad(along, outer)
            for place, x, dx, dy in zip(places, inner, by_loss, by_answer, strict=True):
                x, dx, dy = (flat(one.detach()) for one in (x, dx, dy))
                if place not in sums:
                    sums[place] = _Sums(x.shape[1], dy.shape[1])
                held = sums[place]
                held.images += len(x)
                pooled = place not in outputs
                held.add_hidden(head_input(x.mean(dim=2))[:, :, None] if pooled else x)
                held.taylor += (x * dx).sum(dim=2).square().sum(dim=0).double().cpu()
                held.output += dy.square().sum(dim=(0, 2)).double().cpu()
            advance(len(batch.labels))
    if not sums:
        raise DataError("there was no image to watch.", "check the train split of data.source")
    return {place: held.result() for place, held in sums.items()}


@contextlib.contextmanager
def watching(
    model: Care, places: Iterable[Place], hidden: dict[Place, Tensor], outputs: dict[Place, Tensor]
) -> Iterator[None]:
    """Keep the hidden channels of each place, and what the layer behind them makes of them."""
    handles = []
    for place in places:
        conv = bottleneck_at(model, place).conv
        for layer, seen in ((conv, hidden), (layer_behind(model, place), outputs)):
            if layer is None:
                continue

            def keep(
                module: nn.Module,
                args: tuple[Tensor, ...],
                out: Tensor,
                place: Place = place,
                seen: dict[Place, Tensor] = seen,
            ) -> None:
                seen[place] = out

            handles.append(layer.register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def head_input(pooled_BH: Tensor) -> Tensor:
    """What both heads multiply: GELU and the part of LayerNorm that they share."""
    return F.layer_norm(F.gelu(pooled_BH), pooled_BH.shape[1:], eps=HEAD_EPS)


def head_weight(model: Care) -> Tensor:
    """What the mean of both heads multiplies it by (K, H), each with the scales of its own norm.

    Only a classifier has them, which is deployed with their mean.
    """
    heads = [head.fc.weight * head.norm.weight for head in (model.head, model.dist_head)]
    return torch.stack(heads).mean(dim=0).detach()


def flat(x: Tensor) -> Tensor:
    """Image-shaped values or logits as (B, C, N)."""
    return x.flatten(2) if x.dim() == 4 else x[:, :, None]
