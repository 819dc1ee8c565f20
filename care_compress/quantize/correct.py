"""Corrections that cost nothing at inference: what quantization shifts on average is put back.

Both walk the graph once with the quantizers on, and repair each layer before the next one reads
it, so that later corrections see earlier ones:

- bias correction: b += E[y - y^] per output channel, y the float and y^ the quantized output;
- norm re-estimation: the pre-norm's output gets back its float mean and deviation per channel,
  a' = a sd / sd^, b' = (b - mean^) sd / sd^ + mean. Relative to the float model on the same
  images, so without quantization error nothing moves.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter, Node

from care_compress.quantize.placement import ROOT, QuantizedCare, site_of

PIXELS = 2_500_000  # images times pixels held at once: 256 images at 96, 50 at 224
LEAST_IMAGES = 16
TINY = 1e-12
DEAD = 1e-3  # of the mean deviation; below it there is nothing to restore
LARGEST_RATIO = 2.0  # that quantization error can explain

_conv2d, _linear, _add = (
    torch.ops.aten.conv2d.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.add.Tensor,
)


def images_to_hold(resolution: int) -> int:
    """How many images a correction works on at once."""
    return max(LEAST_IMAGES, PIXELS // resolution**2)


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


@dataclass(frozen=True)
class _Moments:
    mean: Tensor
    deviation: Tensor


class _Walk(Interpreter):
    """Measures outputs per channel; with `repair_to`, corrects them on the way."""

    def __init__(
        self,
        quantized: QuantizedCare,
        biases: bool,
        norms: bool,
        repair_to: dict[str, _Moments] | None = None,
    ) -> None:
        super().__init__(quantized.graph)
        self.quantized = quantized
        self.biases = biases
        self.norms = norms
        self.repair_to = repair_to
        self.moments: dict[str, _Moments] = {}

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if self.biases and n.target in (_conv2d, _linear) and _bias(n) is not None:
            return self._bias(n, out)
        if self.norms and n.target is _add and _is_norm(n):
            return self._norm(n, out)
        return out

    def _bias(self, node: Node, out: Tensor) -> Tensor:
        found = _moments(out)
        self.moments[node.name] = found
        if self.repair_to is None:
            return out
        missing = self.repair_to[node.name].mean - found.mean
        bias = _bias(node)
        assert bias is not None
        self.quantized.graph.get_parameter(str(bias.target)).add_(missing)
        return out + missing.view(-1, *[1] * (out.dim() - 2))

    def _norm(self, node: Node, out: Tensor) -> Tensor:
        found = _moments(out)
        self.moments[node.name] = found
        if self.repair_to is None:
            return out
        wanted = self.repair_to[node.name]
        ratio = _bounded_ratio(wanted.deviation, found.deviation).view(-1, 1, 1)
        mean_is, mean_was = found.mean.view(-1, 1, 1), wanted.mean.view(-1, 1, 1)
        path = f"{ROOT}.{site_of(node)}"
        scale = self.quantized.graph.get_parameter(f"{path}.scale")
        shift = self.quantized.graph.get_parameter(f"{path}.shift")
        scale.mul_(ratio)
        shift.copy_((shift - mean_is) * ratio + mean_was)
        return (out - mean_is) * ratio + mean_was


def _bounded_ratio(wanted: Tensor, found: Tensor) -> Tensor:
    """Wanted / found; 1 for a channel that is as good as constant, on so few images or always."""
    least = DEAD * wanted.mean()
    alive = (wanted > least) & (found > least)
    ratio = torch.where(alive, wanted / found.clamp(min=TINY), torch.ones_like(wanted))
    return ratio.clamp(1 / LARGEST_RATIO, LARGEST_RATIO)


def _bias(node: Node) -> Node | None:
    bias = node.args[2] if len(node.args) > 2 else None
    return bias if isinstance(bias, Node) and bias.op == "get_attr" else None


def _is_norm(node: Node) -> bool:
    """The addition of a `ChannelAffine`."""
    shift = node.args[1]
    return isinstance(shift, Node) and str(shift.target).endswith(".shift")


def _moments(out: Tensor) -> _Moments:
    channels = out.transpose(0, 1).flatten(1) if out.dim() > 2 else out.T
    return _Moments(channels.mean(dim=1), channels.std(dim=1, correction=0))
