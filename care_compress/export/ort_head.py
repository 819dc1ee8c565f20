"""The classifier's product in integers for ONNX Runtime, of weights that alone are quantized.

The head's input stays in float: its rounding would be half of the noise of the logits. ONNX Runtime
would then expand a million weights for every image. Two integers of 8 bits hold the input as well
as a float does, the second one what the first one leaves over,

    x = s1 (q1 - z1) + s2 (q2 - z2),    x W^T = s1 (q1 - z1) W^T + s2 (q2 - z2) W^T,

with s2 < s1 / 250, so the weights are read as they are stored (88 dB, CARE-S0). The scales come
from the numbers at hand, those of all images of a batch, which a LayerNorm has just made alike: the
other images of a batch change an image's logits by no more than that rounding. Should one of them
be NaN, all are.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from care_compress.export.float_graph import add_constant, constant, drop_unread, maker_of
from care_compress.export.ort_products import DOMAIN

_EXPANDED = "DequantizeLinear"


def split_head_input(model: ir.Model) -> None:
    """Replace every Gemm of floats and 8-bit weights, in place."""
    for node in list(model.graph):
        if node.op_type == "Gemm" and _has_integer_weight_only(node):
            _Split(model.graph, node).replace()
    drop_unread(model.graph)


def _has_integer_weight_only(node: ir.Node) -> bool:
    data, weight = (maker_of(value) for value in node.inputs[:2])
    if weight is None or weight.op_type != _EXPANDED or "block_size" in weight.attributes:
        return False
    stored = weight.inputs[0]
    assert stored is not None
    return (
        stored.dtype == ir.DataType.INT8
        and node.attributes.get_int("transB", 0) == 1
        and (data is None or data.op_type != _EXPANDED)
    )


class _Split:
    """One Gemm and the nodes that take its place."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self.graph, self.node = graph, node

    def replace(self) -> None:
        """Put two products and their sum where the Gemm was."""
        data, _, *bias = self.node.inputs  # a bias of zeros is left out
        out = self.node.outputs[0]
        weight = maker_of(self.node.inputs[1])
        assert weight is not None
        stored, *scale_and_zero = weight.inputs
        columns = np.ascontiguousarray(constant(stored).T)
        factor = [add_constant(self.graph, f"{self.node.name}.weight_t", columns), *scale_and_zero]
        high = self._made("DynamicQuantizeLinear", [data], "/high", 3)
        rounded = self._made(_EXPANDED, high, "/rounded")
        rest = self._made("Sub", [data, *rounded], "/rest")
        low = self._made("DynamicQuantizeLinear", rest, "/low", 3)
        products = [
            *self._product(high, factor, "/high_product", *bias),
            *self._product(low, factor, "/low_product"),
        ]
        total = ir.node("Add", products, name=self.node.name)
        self.graph.insert_before(self.node, total)
        made = total.outputs[0]
        made.name, made.shape, made.type = out.name, out.shape, out.type
        # The logits, or, of two heads, one of those that are averaged.
        ir.convenience.replace_all_uses_with(out, made, replace_graph_outputs=True)
        self.graph.remove([self.node, weight], safe=True)

    def _product(
        self,
        half: Sequence[ir.Value | None],
        factor: Sequence[ir.Value | None],
        name: str,
        *bias: ir.Value | None,
    ) -> list[ir.Value]:
        ordered = [part for pair in zip(half, factor, strict=True) for part in pair]
        return self._made("MatMulIntegerToFloat", [*ordered, *bias], name, domain=DOMAIN)

    def _made(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        outputs: int = 1,
        domain: str = "",
    ) -> list[ir.Value]:
        name = f"{self.node.name}{name}"
        node = ir.node(kind, inputs, domain=domain, num_outputs=outputs, name=name)
        for place, value in enumerate(node.outputs):
            value.name = f"{name}_{place}"
        self.graph.insert_before(self.node, node)
        return list(node.outputs)
