"""What the hidden channels of a float network do on calibration images."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from care_compress.data.loader import Batch
from care_compress.model.care import Care
from care_compress.slim.places import Place, bottleneck_at, find_places


@dataclass
class HiddenStatistics:
    """Of one place: moments of what the layer behind it reads, and what errors there cost."""

    mean_H: Tensor
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
    seen: dict[Place, tuple[Tensor, Tensor]] = {}
    sums: dict[Place, _Sums] = {}
    generator = torch.Generator().manual_seed(seed)
    with watching(model, places, seen), torch.enable_grad():
        for batch in batches:
            images = batch.images.detach().requires_grad_()
            seen.clear()
            logits = model.eval()(images)
            labels = batch.labels.to(logits.device)
            hidden = [seen[place][0] for place in places]
            outputs = [seen[place][1] for place in places]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            by_loss = torch.autograd.grad(loss, hidden, retain_graph=True)
            # A random direction among the logits, free of the constant that changes no answer: the
            # mean square of its gradient is that of the whole Jacobian (Hutchinson).
            probe = torch.randn(logits.shape, generator=generator).to(logits)
            by_logits = torch.autograd.grad(
                (logits * (probe - probe.mean(dim=1, keepdim=True))).sum(), outputs
            )
            for place, x, dx, dy in zip(places, hidden, by_loss, by_logits, strict=True):
                x, dx, dy = (flat(one.detach()) for one in (x, dx, dy))
                if place not in sums:
                    sums[place] = _Sums(x.shape[1], dy.shape[1])
                held = sums[place]
                held.images += len(x)
                held.add_hidden(x)
                held.taylor += (x * dx).sum(dim=2).square().sum(dim=0).double().cpu()
                held.output += dy.square().sum(dim=(0, 2)).double().cpu()
            advance(len(labels))
    return {place: held.result() for place, held in sums.items()}


@contextlib.contextmanager
def watching(
    model: Care, places: Iterable[Place], seen: dict[Place, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    """Keep what goes into and comes out of the layer behind each place."""
    handles = []
    for place in places:
        fc2 = bottleneck_at(model, place).fc2

        def keep(
            module: nn.Module, args: tuple[Tensor, ...], out: Tensor, place: Place = place
        ) -> None:
            seen[place] = (args[0], out)

        handles.append((model.head.fc if fc2 is None else fc2).register_forward_hook(keep))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def flat(x: Tensor) -> Tensor:
    """Image-shaped or pooled values as (B, C, N)."""
    return x.flatten(2) if x.dim() == 4 else x[:, :, None]
