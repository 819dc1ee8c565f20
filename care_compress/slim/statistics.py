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
from care_compress.slim.places import Place, bottleneck_at, find_places


@dataclass
class HiddenStatistics:
    """Of one place: moments of what the layer behind it reads, and what errors there cost."""

    mean_H: Tensor  # of the hidden channels; of the last place, of what the head's product reads
    covariance_HH: Tensor
    taylor_H: Tensor  # E[(sum over positions of gradient x activation)^2], of the training loss
    importance_O: Tensor  # E[sum over positions of (d logits / d output)^2]


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
    model: Care, batches: Iterable[Batch], seed: int, advance: Callable[[int], None]
) -> dict[Place, HiddenStatistics]:
    """Watch every place while the network sees the images; one pass forward, two back."""
    places = find_places(model)
    hidden: dict[Place, Tensor] = {}
    outputs: dict[Place, Tensor] = {}
    sums: dict[Place, _Sums] = {}
    generator = torch.Generator().manual_seed(seed)
    with watching(model.eval(), places, hidden, outputs), torch.enable_grad():
        for batch in batches:
            logits = model(batch.images.detach().requires_grad_())
            labels = batch.labels.to(logits.device)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            inner = [hidden[place] for place in places]
            by_loss = torch.autograd.grad(loss, inner, retain_graph=True)
            # A random direction among the logits, free of the constant that changes no answer: the
            # mean square of its gradient is that of the whole Jacobian (Hutchinson).
            probe = torch.randn(logits.shape, generator=generator).to(logits)
            along = (logits * (probe - probe.mean(dim=1, keepdim=True))).sum()
            # The last place has no layer behind it but the heads: its outputs are the logits.
            outer = [logits if place.last else outputs[place] for place in places]
            by_logits = torch.autograd.grad(along, outer)
            for place, x, dx, dy in zip(places, inner, by_loss, by_logits, strict=True):
                x, dx, dy = (flat(one.detach()) for one in (x, dx, dy))
                if place not in sums:
                    sums[place] = _Sums(x.shape[1], dy.shape[1])
                held = sums[place]
                held.images += len(x)
                held.add_hidden(head_input(x.mean(dim=2))[:, :, None] if place.last else x)
                held.taylor += (x * dx).sum(dim=2).square().sum(dim=0).double().cpu()
                held.output += dy.square().sum(dim=(0, 2)).double().cpu()
            advance(len(labels))
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
        half = bottleneck_at(model, place)
        for layer, seen in ((half.conv, hidden), (half.fc2, outputs)):
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
    """What the mean of both heads multiplies it by (K, H), each with the scales of its own norm."""
    heads = [head.fc.weight * head.norm.weight for head in (model.head, model.dist_head)]
    return torch.stack(heads).mean(dim=0).detach()


def flat(x: Tensor) -> Tensor:
    """Image-shaped values or logits as (B, C, N)."""
    return x.flatten(2) if x.dim() == 4 else x[:, :, None]
