"""Other forms of GELU: those that targets compute, and a cheaper function to train with.

Those of targets are nearer to it than 8 bits can tell: within 5e-4 of x Phi(x) everywhere, where a
step of 8 bits is ten times that. They stand in for erf where an exponential and a division are
dear; `care_compress.export.gelu` writes them and says why.

`products`: with t = |x| and s = max(T - t, 0),

    x Phi(x) = max(x, 0) - t (1 - Phi(t)),    1 - Phi(t) ~ (s^2 (b + c s))^8,

because the eighth root of the normal tail is nearly a polynomial, and three squares are cheaper
than the degree it would take itself. T, b and c have the smallest largest error (3.5e-4).

`tanh`: x (1 + tanh(u)) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3) (arXiv 1606.08415; 4.8e-4).

Hard swish is another function, to be healed by training:

    GELU(x) ~ hard_swish(s x) / s,    hard_swish(t) = t min(max(t + 3, 0), 6) / 6

with s = 1.84, the best for normal inputs of deviation 1 to 2 (27 to 33 dB; at most 0.08 off). The
scaling costs nothing: s goes into the 1x1 before the activation, 1 / s into the depthwise after it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from care_compress.model.compact import CompactCare, CompactInteraction, PooledDepthwise, blocks
from care_compress.quantize.placement import QuantizedCare
from care_compress.recipe.target import Gelu

REACH, SLOPE, CURVE = 6.50111819, 5.12145735e-2, -4.53909250e-3  # T, b and c
SQUARES = 3  # of the eighth power
HARD_SWISH_SLOPE = 1.84  # s


def use_gelu(model: QuantizedCare, form: Gelu) -> None:
    """Simulate every GELU of an image in this form; the head's, of one vector, stays."""
    forms = {"products": gelu_by_products, "tanh": gelu_by_tanh}
    for node in model.graph.graph.nodes:
        if node.target is torch.ops.aten.gelu.default and node.meta["val"].dim() == 4:
            node.target = forms.get(form, node.target)
    model.graph.recompile()


def gelu_by_products(x: Tensor) -> Tensor:
    """GELU without a function of a table."""
    size = x.abs()
    near = F.relu(REACH - size)
    tail = near * near * (near * CURVE + SLOPE)
    for _ in range(SQUARES):
        tail = tail * tail
    return F.relu(x) - tail * size


def gelu_by_tanh(x: Tensor) -> Tensor:
    """GELU as an attribute of ONNX's operation names it."""
    return F.gelu(x, approximate="tanh")


@torch.no_grad()
def use_hard_swish(network: CompactCare) -> None:
    """Replace every GELU between a 1x1 and a depthwise convolution; the head keeps its own."""
    for block in blocks(network):
        inter = block.inter_layer
        assert isinstance(inter, CompactInteraction)
        inter.activation = nn.Hardswish()
        for half in inter.bottlenecks():
            assert half.fc1.bias is not None
            half.fc1.weight.mul_(HARD_SWISH_SLOPE)
            half.fc1.bias.mul_(HARD_SWISH_SLOPE)
            # The network's last depthwise may have become part of the pool.
            reader = half.conv if isinstance(half.conv, nn.Conv2d) else network.pool
            assert isinstance(reader, nn.Conv2d | PooledDepthwise)
            reader.weight.div_(HARD_SWISH_SLOPE)
