"""Exact rewrites: the same function with fewer parameters, operations and hard-to-export shapes.

`rewrite` turns a `Care` into a `CompactCare` for inference and applies the switched-on rewrites.
Each is an identity over the reals; in floating point they agree to rounding (tested at 1e-12 in
float64). All folding arithmetic is done in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from care_compress.model.attention import FusedCore
from care_compress.model.care import Care
from care_compress.model.compact import (
    CompactCare,
    MergedHead,
    PooledDepthwise,
    SlicedMixer,
    TwinHeads,
    assign,
    blocks,
    stages,
)
from care_compress.model.cost import Cost, measure_cost
from care_compress.model.pyramid import ConvUnit
from care_compress.recipe.sections import RewriteSection


def rewrite(model: Care, switches: RewriteSection | None = None) -> CompactCare:
    """An equivalent inference model; `model` itself stays as it is."""
    compact, switches = CompactCare(model), switches or RewriteSection()
    for name, apply in REWRITES.items():
        if getattr(switches, name):
            apply(compact)
    return compact


@dataclass(frozen=True)
class RewriteStep:
    """What the model costs after one rewrite."""

    name: str
    cost: Cost


def rewrite_in_steps(
    model: Care, switches: RewriteSection, resolution: int
) -> tuple[CompactCare, list[RewriteStep]]:
    """Like `rewrite`, and the cost of one image as published and after every step."""
    steps = [RewriteStep("published", measure_cost(model, resolution))]
    compact = CompactCare(model)
    for name, apply in REWRITES.items():
        if getattr(switches, name):
            apply(compact)
            steps.append(RewriteStep(name, measure_cost(compact, resolution)))
    return compact, steps


@torch.no_grad()
def fold_stem(model: CompactCare) -> None:
    """Convolution then BatchNorm, as in the stem: W' = a W, b' = a b + c, per output channel."""
    _fold_norm_backward(_conv(model.stem[0]), model.stem[1])
    model.stem = nn.Sequential(model.stem[0])
    for unit in model.heads.modules():
        if isinstance(unit, ConvUnit):
            _fold_norm_backward(unit.conv, unit.norm)
            unit.norm = nn.Identity()


@torch.no_grad()
def fold_norms(model: CompactCare) -> None:
    """BatchNorm before an unpadded convolution: W' = W a per input channel, b' = b + sum W c.

    Exact here because none of these convolutions pads; a padded one would see c at its border.
    """
    for block in blocks(model):
        for half in block.inter_layer.bottlenecks():
            _fold_norm_forward(half.norm, half.fc1)
            setattr(block.inter_layer, f"{half.name}_norm", nn.Identity())
    for stage in stages(model):
        if stage.downsample is not None:
            conv = _conv(stage.downsample[1])
            _fold_norm_forward(stage.downsample[0], conv)
            stage.downsample = nn.Sequential(conv)


@torch.no_grad()
def merge_heads(model: CompactCare) -> None:
    """Two averaged heads as one affine-free LayerNorm and one Linear."""
    if not isinstance(model.heads, TwinHeads):  # another task's head is one alone
        return
    model.heads = MergedHead(model.heads).requires_grad_(False)


@torch.no_grad()
def fold_depthwise_bias(model: CompactCare) -> None:
    """A depthwise bias is constant over positions, so the following 1x1 can add it: b2 + W2 b."""
    for block in blocks(model):
        for half in block.inter_layer.bottlenecks():
            if half.fc2 is None:
                continue
            weight = half.fc2.weight.double()
            assert half.fc2.bias is not None and half.conv.bias is not None
            bias = half.fc2.bias.double() + weight.flatten(1) @ half.conv.bias.double()
            assign(half.fc2, weight, bias)
            half.conv.bias = None


@torch.no_grad()
def pool_last_depthwise(model: CompactCare) -> None:
    """The network's last depthwise 3x3 becomes part of the global mean, where there is one."""
    if model.pool is None:
        return
    *_, last = blocks(model)
    model.pool = PooledDepthwise(last.inter_layer.inter2_conv).requires_grad_(False)
    setattr(last.inter_layer, "inter2_conv", nn.Identity())  # noqa: B010 (not a Conv2d to mypy)


def fuse_normaliser(model: CompactCare) -> None:
    """Attention numerator and denominator from one matrix product."""
    for block in blocks(model):
        assert isinstance(block.token_mixer, SlicedMixer)
        if block.token_mixer.core is not None:
            block.token_mixer.core = FusedCore()


REWRITES: dict[str, Callable[[CompactCare], None]] = {
    "fold_stem": fold_stem,
    "fold_norms": fold_norms,
    "merge_heads": merge_heads,
    "fold_depthwise_bias": fold_depthwise_bias,
    "pool_last_depthwise": pool_last_depthwise,
    "fuse_normaliser": fuse_normaliser,
}


def _conv(module: nn.Module) -> nn.Conv2d:
    assert isinstance(module, nn.Conv2d)
    return module


def norm_as_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode as y = scale x + shift, in float64."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _fold_norm_backward(conv: nn.Conv2d, norm: nn.Module) -> None:
    scale, shift = norm_as_affine(norm)
    bias = conv.bias.double() if conv.bias is not None else torch.zeros_like(scale)
    assign(conv, conv.weight.double() * scale.view(-1, 1, 1, 1), bias * scale + shift)


def _fold_norm_forward(norm: nn.Module, conv: nn.Conv2d) -> None:
    scale, shift = norm_as_affine(norm)
    weight = conv.weight.double()
    assert conv.bias is not None and not any(conv.padding)
    bias = conv.bias.double() + (weight * shift.view(1, -1, 1, 1)).sum(dim=(1, 2, 3))
    assign(conv, weight * scale.view(1, -1, 1, 1), bias)
