"""Refitting a cut network: the layers behind the cuts make up for what is gone, by least squares.

Front to back, so that each layer also makes up for what the layers before it could not (arXiv
1707.06168): its target is what the whole network had there, its input what the cut one has.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from care_compress.model.care import Block, Bottleneck, Care, Stage
from care_compress.model.compact import assign

RIDGE = 1e-3  # of the inputs' mean variance; pulls towards the weights that are there


class Normal:
    """The normal equations of a linear layer, summed up batch by batch."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self.samples = 0
        self.first = torch.zeros(inputs, dtype=torch.float64)
        self.target = torch.zeros(outputs, dtype=torch.float64)
        self.second = torch.zeros(inputs, inputs, dtype=torch.float64)
        self.cross = torch.zeros(outputs, inputs, dtype=torch.float64)

    def add(self, h_SH: Tensor, t_SO: Tensor) -> None:
        """Add samples."""
        self.samples += len(h_SH)
        self.first += h_SH.sum(dim=0).double().cpu()
        self.target += t_SO.sum(dim=0).double().cpu()
        self.second += (h_SH.T @ h_SH).double().cpu()
        self.cross += (t_SO.T @ h_SH).double().cpu()

    def solve(self, weight_OH: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Argmin over W, b of E||W h + b - t||^2 + ridge mean(var h) ||W - weight||^2."""
        mean, target = self.first / self.samples, self.target / self.samples
        covariance = self.second / self.samples - torch.outer(mean, mean)
        cross = self.cross / self.samples - torch.outer(target, mean)
        pull = ridge * covariance.diagonal().mean().clamp(min=1e-30)
        damped = covariance + pull * torch.eye(len(mean), dtype=torch.float64)
        wanted = cross + pull * weight_OH.double().cpu()
        weight = torch.linalg.solve(damped, wanted.T).T
        return weight, target - weight @ mean


@torch.no_grad()
def refit(
    slim: Care, whole: Care, images: Sequence[Tensor], advance: Callable[[int], None]
) -> None:
    """Refit every second 1x1 and what of the head reads a stage to what `whole` computes."""
    ours, theirs = ([model.eval().stem(batch) for batch in images] for model in (slim, whole))
    for number, (stage, twin) in enumerate(zip(_stages(slim), _stages(whole), strict=True)):
        if stage.downsample is not None and twin.downsample is not None:
            ours = [stage.downsample(x) for x in ours]
            theirs = [twin.downsample(x) for x in theirs]
        for block, other in zip(stage.blocks, twin.blocks, strict=True):
            assert isinstance(block, Block) and isinstance(other, Block)
            ours, theirs = _refit_block(block, other, ours, theirs)
            advance(1)
        if not slim.pools:
            for name in slim.readers_of(number):
                own, teacher = (model.get_submodule(name) for model in (slim, whole))
                assert isinstance(own, nn.Conv2d)
                fit = Normal(own.in_channels, own.out_channels)
                for x, y in zip(ours, theirs, strict=True):
                    fit.add(_rows(x), _rows(teacher(y)))
                _assign_1x1(own, fit)
    if slim.pools:
        _refit_classifier(slim, whole, ours, theirs)
    slim.requires_grad_(True)


def _refit_classifier(
    slim: Care, whole: Care, ours: Sequence[Tensor], theirs: Sequence[Tensor]
) -> None:
    """Refit both heads to the logits of the whole network."""
    pooled, wanted = ([x.mean(dim=(2, 3)) for x in one] for one in (ours, theirs))
    for head, teacher in ((slim.head, whole.head), (slim.dist_head, whole.dist_head)):
        normal = Normal(head.fc.in_features, head.fc.out_features)
        for x, y in zip(pooled, wanted, strict=True):
            normal.add(head.norm(F.gelu(x)), teacher(y))
        if normal.samples >= head.fc.in_features:  # an image is one sample; fewer fit anything
            assign(head.fc, *normal.solve(head.fc.weight, RIDGE))


def _refit_block(
    block: Block, other: Block, ours: list[Tensor], theirs: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Refit one block; what both blocks hand on."""
    mixed = [block.token_mixer(x) for x in ours]
    wanted = [other.token_mixer(x) for x in theirs]
    own = {half.name: half for half in block.inter_layer.bottlenecks()}
    known = {half.name: half for half in other.inter_layer.bottlenecks()}
    features, aims = [f for _, f in mixed], [f for _, f in wanted]
    features, aims = _refit_half(own.get("inter1"), known.get("inter1"), features, aims)
    everything = [torch.cat([m, f], dim=1) for (m, _), f in zip(mixed, features, strict=True)]
    aims = [torch.cat([m, f], dim=1) for (m, _), f in zip(wanted, aims, strict=True)]
    outputs, aims = _refit_half(own.get("inter2"), known.get("inter2"), everything, aims)
    return _handed_on(block, ours, outputs), _handed_on(other, theirs, aims)


def _refit_half(
    half: Bottleneck | None, whole: Bottleneck | None, ours: list[Tensor], theirs: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Refit the second 1x1 of one bottleneck, if it has one; what both hand on."""
    if whole is not None:
        theirs = [_through(whole, x) for x in theirs]
    if half is None:
        return ours, theirs
    if half.fc2 is not None:
        normal = Normal(half.fc2.in_channels, half.fc2.out_channels)
        for x, y in zip(ours, theirs, strict=True):
            normal.add(_rows(_hidden(half, x)), _rows(y - x))
        _assign_1x1(half.fc2, normal)
    return [_through(half, x) for x in ours], theirs


def _assign_1x1(layer: nn.Conv2d, normal: Normal) -> None:
    """Give a 1x1 the solution."""
    weight, bias = normal.solve(layer.weight.flatten(1), RIDGE)
    assign(layer, weight.reshape(layer.weight.shape), bias)


def _hidden(half: Bottleneck, x: Tensor) -> Tensor:
    hidden: Tensor = half.conv(F.gelu(half.fc1(half.norm(x))))
    return hidden


def _through(half: Bottleneck, x: Tensor) -> Tensor:
    hidden = _hidden(half, x)
    return hidden if half.fc2 is None else x + half.fc2(hidden)


def _handed_on(block: Block, inputs: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    if block.gamma is None:
        return outputs
    gamma = block.gamma.view(-1, 1, 1)
    return [x + y * gamma for x, y in zip(inputs, outputs, strict=True)]


def _rows(x: Tensor) -> Tensor:
    """Every position as a sample (S, C)."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _stages(model: Care) -> Iterator[Stage]:
    for stage in model.stages:
        assert isinstance(stage, Stage)
        yield stage
