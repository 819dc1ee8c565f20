"""Exact rescalings in front of a quantized 1x1: where CARE's accuracy is won or lost.

A 1x1 conv takes its input from something that acts on each channel alone and linearly: the
pre-norm BatchNorm (RepQuant's scale reparameterization, arXiv 2402.05628) or the depthwise conv of
an interaction. So each channel can be shifted and scaled for free,

    x'_c = (x_c - m_c) / s_c,    W'[:, c] = W[:, c] s_c,    b' = b + sum_c W[:, c] m_c,

with m_c = (max x_c + min x_c) / 2 and s_c = max|x_c - m_c|^alpha / max|W[:, c]|^(1 - alpha).
alpha = 1 makes every channel fill the activation range (as a scale per channel would), alpha = 0
every column of the weight. ``search`` takes the alpha, or no scaling at all, whose quantized
product is nearest to the float one on sampled rows.
"""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from care_compress.model.care import Interaction
from care_compress.model.compact import (
    ChannelAffine,
    CompactCare,
    Rotation,
    assign,
    blocks,
    stages,
)
from care_compress.model.rewrite import norm_as_affine
from care_compress.quantize.fakequant import round_to_integers
from care_compress.quantize.spec import Plan, TensorSpec
from care_compress.quantize.statistics import InputStatistics

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
CLIPS = (1.0, 0.85, 0.7, 0.55)  # ranges tried for inputs that will be clipped
TINY = 1e-8
LARGEST_SCALING = 1024.0
LARGEST_ROTATION = 32

Alpha = float | Literal["trained", "off", "search"]


@dataclass(frozen=True)
class Rescaling:
    """x'_c = (x_c - shift_c) / scale_c, and the alpha that made it."""

    scale: Tensor  # (C,)
    shift: Tensor  # (C,)
    alpha: float


def norms_to_affine(model: CompactCare) -> None:
    """Freeze every BatchNorm that is left into the multiply-add it is in eval mode."""
    for block in blocks(model):
        for half in block.inter_layer.bottlenecks():
            if isinstance(half.norm, nn.BatchNorm2d):
                affine = ChannelAffine(*norm_as_affine(half.norm))
                setattr(block.inter_layer, f"{half.name}_norm", affine)
    for stage in stages(model):
        if stage.downsample is not None and isinstance(stage.downsample[0], nn.BatchNorm2d):
            stage.downsample[0] = ChannelAffine(*norm_as_affine(stage.downsample[0]))
    model.requires_grad_(False)


@torch.no_grad()
def rotate(model: CompactCare, plan: Plan) -> None:
    """Hadamard-rotate the inputs of 1x1 convs that will have fewer than 8 bits.

    Hadamard-then-smooth (QuantVGGT): x' = H x spreads outliers within a block of channels, then
    the rescaling above evens out what is left. W' = W H^T, exactly, block by block.
    """
    for decision in plan.decisions:
        if decision.site.role != "pointwise" or decision.input.width >= 8:
            continue
        parent, leaf = decision.site.name.rsplit(".", 1)
        interaction, layer = model.get_submodule(parent), model.get_submodule(decision.site.name)
        assert isinstance(layer, nn.Conv2d)
        size = min(LARGEST_ROTATION, layer.in_channels & -layer.in_channels)
        rotation = Rotation(layer.in_channels, size).to(layer.weight.device)
        matrix = rotation.weight[:size, :, 0, 0]
        blocked = layer.weight.flatten(1).reshape(layer.out_channels, -1, size)
        turned = blocked.double() @ matrix.double().T
        layer.weight.copy_(turned.reshape(layer.weight.shape))
        place = leaf.replace("fc1", "norm").replace("fc2", "rotation")
        affine = getattr(interaction, place)
        if isinstance(affine, ChannelAffine):
            # H (a x + b) = (H a) x + H b, so the scale site costs nothing beside a rotation.
            scales, shifts = (
                values.reshape(-1, size).repeat_interleave(size, dim=0)
                for values in (affine.scale, affine.shift)
            )
            rotation.bias.copy_((rotation.weight[:, :, 0, 0] * shifts).sum(dim=1))
            rotation.weight.mul_(scales[:, :, None, None])
        setattr(interaction, place, rotation)


def equalized_layers(plan: Plan, prescale: Alpha, equalize: Alpha) -> dict[str, Alpha]:
    """The layers whose integer input can be rescaled exactly, with the alpha asked for."""
    chosen: dict[str, Alpha] = {}
    for decision in plan.decisions:
        site = decision.site
        if not decision.input.is_integer:
            continue
        if site.prescaled and decision.input.granularity == "channel":
            chosen[site.name] = 1.0  # one scale per channel: the weight takes the scales
        elif site.prescaled and prescale != "trained":
            chosen[site.name] = prescale
        if site.name.endswith("_fc2") and equalize != "off":
            chosen[site.name] = equalize
    return chosen


def give_biases(model: CompactCare, names: Iterable[str]) -> None:
    """A bias of zeros for every depthwise conv whose output may be shifted later.

    So the structure of a quantized model follows from its recipe, whatever a search finds.
    """
    for name in names:
        producer = producer_of(model, name)
        if isinstance(producer, nn.Conv2d) and producer.bias is None:
            zeros = torch.zeros(producer.out_channels, device=producer.weight.device)
            producer.bias = nn.Parameter(zeros, requires_grad=False)


@torch.no_grad()
def rescale(
    model: CompactCare, plan: Plan, name: str, alpha: Alpha, seen: InputStatistics
) -> Rescaling | None:
    """Rescale one layer's input exactly; None if it stays as it was."""
    layer = model.get_submodule(name)
    producer = producer_of(model, name)
    assert isinstance(layer, nn.Conv2d)
    if producer is None:
        return None
    chosen: Rescaling | None = None
    if alpha == "search":
        decision = plan.of(name)
        assert decision.weight is not None
        rows, matrix = seen.sample(), layer.weight.flatten(1)
        positions = matrix.shape[1] // layer.in_channels
        least = product_error(rows, matrix, decision.input, decision.weight)
        for tried, centred in itertools.product(ALPHAS, (False, True)):
            candidate = _rescaling(layer, seen, tried, centred)
            scale, shift = (
                v.repeat_interleave(positions) for v in (candidate.scale, candidate.shift)
            )
            scaled_rows, scaled_matrix = (rows - shift) / scale, matrix * scale
            error = product_error(scaled_rows, scaled_matrix, decision.input, decision.weight)
            if error < least:
                chosen, least = candidate, error
    else:
        assert isinstance(alpha, float)
        chosen = _rescaling(layer, seen, alpha, centred=True)
    if chosen is not None:
        apply(producer, layer, chosen)
    return chosen


def producer_of(model: CompactCare, name: str) -> nn.Module | None:
    """What acts per channel and linearly in front of a layer; None if it was folded away."""
    parent_name, leaf = name.rsplit(".", 1)
    parent = model.get_submodule(parent_name)
    if not isinstance(parent, Interaction):  # the 2x2 conv of a downsampling pair
        before: nn.Module | None = getattr(parent, "0", None) if leaf == "1" else None
    elif leaf.endswith("fc1"):
        before = getattr(parent, leaf.replace("fc1", "norm"))
    else:
        rotation = getattr(parent, leaf.replace("fc2", "rotation"))
        turned = isinstance(rotation, Rotation)
        before = rotation if turned else getattr(parent, leaf.replace("fc2", "conv"))
    return before if isinstance(before, ChannelAffine | Rotation | nn.Conv2d) else None


@torch.no_grad()
def apply(producer: nn.Module, layer: nn.Conv2d, rescaling: Rescaling) -> None:
    """Divide where the channels are made, multiply where they are read."""
    scale, shift = rescaling.scale.double(), rescaling.shift.double()
    weight = layer.weight.double()
    assert layer.bias is not None
    bias = layer.bias.double() + (weight * shift.view(1, -1, 1, 1)).sum(dim=(1, 2, 3))
    assign(layer, weight * scale.view(1, -1, 1, 1), bias)
    if isinstance(producer, ChannelAffine):
        new_shift = (producer.shift.double() - shift.view(-1, 1, 1)) / scale.view(-1, 1, 1)
        producer.scale.copy_(producer.scale.double() / scale.view(-1, 1, 1))
        producer.shift.copy_(new_shift)
        return
    assert isinstance(producer, nn.Conv2d | Rotation)
    old = torch.zeros_like(shift) if producer.bias is None else producer.bias.double()
    producer.weight.copy_(producer.weight.double() / scale.view(-1, 1, 1, 1))
    producer.bias = nn.Parameter(((old - shift) / scale).float(), requires_grad=False)


def _rescaling(layer: nn.Conv2d, seen: InputStatistics, alpha: float, centred: bool) -> Rescaling:
    assert seen.low is not None and seen.high is not None
    shift = (seen.low + seen.high) / 2 if centred else torch.zeros_like(seen.low)
    reach = torch.maximum(seen.high - shift, shift - seen.low).clamp(min=TINY)
    columns = layer.weight.abs().amax(dim=(0, 2, 3)).clamp(min=TINY)
    scale = reach**alpha / columns ** (1 - alpha)
    scale = scale / scale.log().mean().exp()  # a common factor means nothing
    # A channel that is nearly dead would be blown up to fill the range, by 1e6 and more: float16,
    # in which TensorRT runs the depthwise convs, ends at 65504.
    return Rescaling(scale.clamp(1 / LARGEST_SCALING, LARGEST_SCALING), shift, alpha)


def product_error(rows: Tensor, matrix: Tensor, input_: TensorSpec, weight: TensorSpec) -> float:
    """Variance of the quantized product's error, at the best of a few input ranges.

    Its mean does not count: bias correction takes that away.
    """
    rounded = matrix
    if weight.is_integer:
        groups = matrix if weight.group is None else matrix.reshape(-1, weight.group)
        scale = groups.abs().amax(dim=1).clamp(min=TINY) / weight.quant_max
        zero = torch.zeros_like(scale, dtype=torch.int32)
        limits = weight.quant_min, weight.quant_max
        rounded = round_to_integers(groups, scale, zero, limits, axis=0).reshape(matrix.shape)
    wanted = rows @ matrix.T
    low, high = float(rows.min().clamp(max=0)), float(rows.max().clamp(min=0))
    errors = []
    for clip in CLIPS if input_.range == "mse" else CLIPS[:1]:
        error = _quantize_rows(rows, low * clip, high * clip, input_) @ rounded.T - wanted
        errors.append(float((error - error.mean(dim=0)).square().sum()))
    return min(errors)


def _quantize_rows(rows: Tensor, low: float, high: float, spec: TensorSpec) -> Tensor:
    levels = spec.quant_max - spec.quant_min
    if spec.symmetric:
        scale = max(max(-low, high) / (levels / 2), TINY)
        zero_point = 0
    else:
        scale = max((high - low) / levels, TINY)
        zero_point = min(max(spec.quant_min - round(low / scale), spec.quant_min), spec.quant_max)
    step = torch.tensor([scale], device=rows.device)
    zero = torch.tensor([zero_point], dtype=torch.int32, device=rows.device)
    return round_to_integers(rows, step, zero, (spec.quant_min, spec.quant_max))
