"""Corrections that cost nothing at inference: what quantization shifts on average is put back.

Both walk the graph once with the quantizers on, and repair each layer before the next one reads
it, so that later corrections see earlier ones:

- bias correction: b += E[y - y^] per output channel, y the float and y^ the quantized output;
- norm re-estimation: the pre-norm's output gets back its float mean and deviation per channel,
  a' = a sd / sd^, b' = (b - mean^) sd / sd^ + mean. Relative to the float model on the same
  images, so without quantization error nothing moves.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from care_compress.quantize.placement import ROOT, QuantizedCare, site_of

TINY = 1e-12
DEAD = 1e-3  # of the mean deviation; below it there is nothing to restore
LARGEST_RATIO = 2.0  # that quantization error can explain

_conv2d, _linear, _add = (
    torch.ops.aten.conv2d.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.add.Tensor,
)


@torch.no_grad()
def correct(
    quantized: QuantizedCare,
    reference: QuantizedCare,
    images_BCHW: Tensor,
    *,
    biases: bool,
    norms: bool,
) -> None:
    """Repair biases and pre-norms against the float `reference`, the same graph switched off."""
    if not (biases or norms):
        return
    float_pass = _Walk(reference, biases, norms)
    float_pass.run(images_BCHW)
    _Walk(quantized, biases, norms, repair_to=float_pass.moments).run(images_BCHW)


class _Walk(Interpreter):
    """Measures outputs per channel; with `repair_to`, corrects them on the way."""

    def __init__(
        self,
        quantized: QuantizedCare,
        biases: bool,
        norms: bool,
        repair_to: dict[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        super().__init__(quantized.graph)
        self.parameter = quantized.graph.get_parameter
        self.biases = biases
        self.norms = norms
        self.repair_to = repair_to
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}  # mean and deviation, by node

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        bias = n.args[2] if n.target in (_conv2d, _linear) and len(n.args) > 2 else None
        shift = n.args[1] if n.target is _add else None
        has_bias = isinstance(bias, Node) and bias.op == "get_attr"
        is_norm = isinstance(shift, Node) and str(shift.target).endswith(".shift")
        if not (self.biases and has_bias or self.norms and is_norm):
            return out
        channels = out.transpose(0, 1).flatten(1) if out.dim() > 2 else out.T
        mean, deviation = channels.mean(dim=1), channels.std(dim=1, correction=0)
        self.moments[n.name] = mean, deviation
        if self.repair_to is None:
            return out
        wanted_mean, wanted_deviation = self.repair_to[n.name]
        if isinstance(bias, Node):
            missing = wanted_mean - mean
            self.parameter(str(bias.target)).add_(missing)
            return out + missing.view(-1, *[1] * (out.dim() - 2))
        # A channel that is as good as constant, on so few images or always, keeps its deviation.
        least = DEAD * wanted_deviation.mean()
        alive = (wanted_deviation > least) & (deviation > least)
        ratio = torch.where(alive, wanted_deviation / deviation.clamp(min=TINY), 1.0)
        ratio = ratio.clamp(1 / LARGEST_RATIO, LARGEST_RATIO).view(-1, 1, 1)
        mean_is, mean_was = mean.view(-1, 1, 1), wanted_mean.view(-1, 1, 1)
        path = f"{ROOT}.{site_of(n)}"  # a `ChannelAffine`
        shift_of = self.parameter(f"{path}.shift")
        self.parameter(f"{path}.scale").mul_(ratio)
        shift_of.copy_((shift_of - mean_is) * ratio + mean_was)
        return (out - mean_is) * ratio + mean_was
