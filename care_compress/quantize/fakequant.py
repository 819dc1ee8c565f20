"""Simulated quantization of one tensor: the module that stands on every quantized edge.

x_q = clamp(round(x / s) + z, q_min, q_max), x^ = s (x_q - z). The same module is calibrated (an
observer is attached to it), simulated, learned (LSQ+, arXiv 2004.09576) and at last read by the
export, so that what was trained is what is exported.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import FakeQuantizeBase, ObserverBase

from care_compress.quantize.spec import TensorSpec

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
SMALLEST_GAIN = 1e-2  # a learned scale shrinks at most this far, and never through zero


def round_to_integers(
    x: Tensor, scale: Tensor, zero_point: Tensor, limits: tuple[int, int], axis: int | None = None
) -> Tensor:
    """Round to integers and back: x^ = s (clamp(round(x / s) + z, q_min, q_max) - z).

    With an axis, each index has a scale of its own. Gradients pass where nothing was cut off.

    PyTorch's own operation goes through 64-bit integers one number at a time on a CPU. The same
    steps on whole tensors give the same bits in a sixth of the time (LOG.md); without them over
    half of a simulated forward pass would be rounding. Only NaN differs: it stays one here, where
    PyTorch makes it the low end of the range.
    """
    differentiated = torch.is_grad_enabled() and x.requires_grad
    if differentiated or x.device.type != "cpu" or x.dtype != torch.float32:
        if axis is None:
            return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *limits)
        return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, *limits)
    if axis is not None:
        shape = [1] * x.dim()
        shape[axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    steps = (x * scale.reciprocal()).round_().add_(zero_point).clamp_(*limits)
    return steps.sub_(zero_point).mul_(scale)


class TensorQuantizer(FakeQuantizeBase):
    """Base: which tensor of which site, and whether it acts."""

    def __init__(self, spec: TensorSpec, site: str, operand: str) -> None:
        super().__init__()
        self.spec = spec
        self.site = site
        self.operand = operand
        self.enabled = True

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point; only integers have them."""
        raise NotImplementedError


class HalfRounding(TensorQuantizer):
    """Rounds to a 16-bit float and back: a site computed in bf16 or fp16 reads this."""

    def __init__(self, spec: TensorSpec, site: str, operand: str, **_: Any) -> None:
        super().__init__(spec, site, operand)
        self.half = HALF[str(spec.bits)]

    def forward(self, x: Tensor) -> Tensor:
        """X as the half type holds it."""
        return x.to(self.half).to(x.dtype) if self.enabled else x


class IntQuantizer(TensorQuantizer):
    """Integer fake quantization with a scale per tensor or per index of one axis.

    Learned are a gain on the scale and a shift of the zero point as a part of the range, so that a
    step of one learning rate means the same for a weight of 1e-3 and an activation of 10, and for
    any number of bits. Gradients are scaled by 1 / sqrt(elements * q_max), as LSQ does.
    """

    scale: Tensor
    zero_point: Tensor
    last_step = 1  # between the two largest numbers that can be stored

    def __init__(self, spec: TensorSpec, site: str, operand: str, scales: int, **_: Any) -> None:
        super().__init__(spec, site, operand)
        per_channel = spec.granularity != "tensor"
        self.qscheme = {
            (False, True): torch.per_tensor_symmetric,
            (False, False): torch.per_tensor_affine,
            (True, True): torch.per_channel_symmetric,
            (True, False): torch.per_channel_affine,
        }[per_channel, spec.symmetric]
        self.per_channel = per_channel
        self.dtype = spec.dtype
        self.ch_axis = spec.axis
        self.quant_min, self.quant_max = spec.quant_min, spec.quant_max
        self.observer: ObserverBase | None = None
        self.learning = False
        self.register_buffer("scale", torch.ones(scales))
        self.register_buffer("zero_point", torch.zeros(scales, dtype=torch.int32))
        self.gain = nn.Parameter(torch.ones(scales), requires_grad=False)
        self.shift = nn.Parameter(torch.zeros(scales), requires_grad=False)

    def set_qparams(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take these ranges; what was learned on top of others is gone."""
        with torch.no_grad():
            self.scale.copy_(scale.reshape(-1))
            self.zero_point.copy_(zero_point.reshape(-1).clamp(self.quant_min, self.quant_max))
            self.gain.fill_(1.0)
            self.shift.zero_()

    def learn(self, on: bool) -> None:
        """Start or stop learning gain and shift."""
        self.learning = on
        self.gain.requires_grad_(on)
        self.shift.requires_grad_(on and not self.spec.symmetric)

    @torch.no_grad()
    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """The scale and integer zero point that hold now."""
        zero_point = self._shifted().round().clamp(self.quant_min, self.quant_max)
        return self.scale * self.gain.clamp(min=SMALLEST_GAIN), zero_point.int()

    def _shifted(self) -> Tensor:
        return self.zero_point + self.shift * (self.quant_max - self.quant_min)

    def settle(self) -> None:
        """Fold what was learned into scale and zero point."""
        self.set_qparams(*self.calculate_qparams())

    def bounds(self, dims: int) -> tuple[Tensor, Tensor, Tensor]:
        """Smallest and largest value that the integers stand for, and half a step.

        They broadcast along the axis of a tensor with so many dimensions. A value up to half a step
        outside rounds to the end of the range; it is not cut off.
        """
        scale, zero_point = self.calculate_qparams()
        if self.per_channel:
            along = [1] * dims
            along[self.ch_axis] = -1
            scale, zero_point = scale.reshape(along), zero_point.reshape(along)
        low, high = (scale * (end - zero_point) for end in (self.quant_min, self.quant_max))
        return low, high, scale * self.last_step / 2

    def cut(self, x: Tensor) -> int:
        """How many of these values the range cuts off."""
        low, high, half = self.bounds(x.dim())
        return int(((x < low - half) | (x > high + half)).sum())

    def forward(self, x: Tensor) -> Tensor:
        """Observe, or simulate, or let pass."""
        if self.observer is not None:
            self.observer(x.detach())
            return x
        if not self.enabled:
            return x
        if self.learning and torch.is_grad_enabled():
            return self._learnable(x.float())
        return self._simulate(x, *self.calculate_qparams())

    def _simulate(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        limits = self.quant_min, self.quant_max
        axis = self.ch_axis if self.per_channel else None
        return round_to_integers(x, scale, zero_point, limits, axis)

    def _learnable(self, x: Tensor) -> Tensor:
        scale = self.scale * self.gain.clamp(min=SMALLEST_GAIN)
        zero_point = self._shifted()
        factor = (x.numel() * max(abs(self.quant_min), self.quant_max)) ** -0.5
        low, high = self.quant_min, self.quant_max
        if self.per_channel:
            return torch._fake_quantize_learnable_per_channel_affine(
                x, scale, zero_point, self.ch_axis, low, high, factor
            )
        return torch._fake_quantize_learnable_per_tensor_affine(
            x, scale, zero_point, low, high, factor
        )


class GroupQuantizer(IntQuantizer):
    """A weight whose input channels share a scale in groups: (O, C, ...) as (O * C / g, g)."""

    def _simulate(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        rows = x.reshape(len(scale), -1)
        return super()._simulate(rows, scale, zero_point).reshape(x.shape)

    def _learnable(self, x: Tensor) -> Tensor:
        return super()._learnable(x.reshape(len(self.scale), -1)).reshape(x.shape)


class Float8Quantizer(IntQuantizer):
    """8-bit floats in the place of integers: x^ = s float8(clamp(x / s, -448, 448)).

    E4M3 (arXiv 2209.05433) has three bits of mantissa and no infinity; s = max |x| / 448, and there
    is no zero point. Only simulated: no recipe trains it, so it learns nothing.
    """

    last_step = 32  # from 416 to 448

    def _simulate(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if self.per_channel:
            shape = [1] * x.dim()
            shape[self.ch_axis] = -1
            scale = scale.reshape(shape)
        # Not every version of the cast saturates.
        stored = (x / scale).clamp(self.quant_min, self.quant_max).to(self.dtype)
        return stored.to(x.dtype) * scale


def make_quantizer(spec: TensorSpec, site: str, operand: str, shape: torch.Size) -> Any:
    """A constructor, in the form torchao wants, for the quantizer of a tensor of this shape."""
    if not spec.has_scale:
        return HalfRounding.with_args(spec=spec, site=site, operand=operand)
    if spec.granularity == "group":
        assert spec.group is not None
        scales = shape[0] * (shape[1] // spec.group)
        return GroupQuantizer.with_args(spec=spec, site=site, operand=operand, scales=scales)
    scales = 1 if spec.granularity == "tensor" else shape[spec.axis]
    kind = IntQuantizer if spec.is_integer else Float8Quantizer
    return kind.with_args(spec=spec, site=site, operand=operand, scales=scales)
