"""GELU in the forms that targets compute it in, nearer to it than 8 bits can tell.

Two stand in for erf where an exponential and a division are dear; `care_compress.export.gelu`
writes them and says why. Each is within 5e-4 of x Phi(x) everywhere; a step of 8 bits is ten times
that.

`products`: with t = |x| and s = max(T - t, 0),

    x Phi(x) = max(x, 0) - t (1 - Phi(t)),    1 - Phi(t) ~ (s^2 (b + c s))^8,

because the eighth root of the normal tail is nearly a polynomial, and three squares are cheaper
than the degree it would take itself. T, b and c have the smallest largest error (3.5e-4).

`tanh`: x (1 + tanh(u)) / 2 with u = sqrt(2/pi) (x + 0.044715 x^3) (arXiv 1606.08415; 4.8e-4).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from care_compress.quantize.placement import QuantizedCare
from care_compress.recipe.target import Gelu

REACH, SLOPE, CURVE = 6.50111819, 5.12145735e-2, -4.53909250e-3  # T, b and c
SQUARES = 3  # of the eighth power


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
