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

from care_compress.export.ort_products import DOMAIN
from care_compress.export.to_onnx import add_constant, add_node, constant, drop_unread, maker_of

_EXPANDED = "DequantizeLinear"


def split_head_input(model: ir.Model) -> None:
    """Replace every Gemm of floats and 8-bit weights, in place."""
    for node in list(model.graph):
        if node.op_type == "Gemm" and _has_integer_weight_only(node):
            _split(model.graph, node)
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


def _split(graph: ir.Graph, gemm: ir.Node) -> None:
    """Put two products and their sum where a Gemm was."""
    data, _, *bias = gemm.inputs  # a bias of zeros is left out
    weight = maker_of(gemm.inputs[1])
    assert weight is not None
    stored, *scale_and_zero = weight.inputs
    columns = np.ascontiguousarray(constant(stored).T)
    factor = [add_constant(graph, f"{gemm.name}.weight_t", columns), *scale_and_zero]

    def made(kind: str, inputs: Sequence[ir.Value | None], name: str) -> list[ir.Value]:
        name, count = f"{gemm.name}/{name}", 3 if kind == "DynamicQuantizeLinear" else 1
        outputs = [f"{name}_{place}" for place in range(count)]
        domain = DOMAIN if kind == "MatMulIntegerToFloat" else ""
        node = add_node(gemm, kind, inputs, name, outputs, domain=domain)
        return list(node.outputs)

    def product(half: Sequence[ir.Value], name: str, *bias: ir.Value | None) -> ir.Value:
        ordered = [part for pair in zip(half, factor, strict=True) for part in pair]
        return made("MatMulIntegerToFloat", [*ordered, *bias], name)[0]

    high = made("DynamicQuantizeLinear", [data], "high")
    rounded = made(_EXPANDED, high, "rounded")
    rest = made("Sub", [data, *rounded], "rest")
    low = made("DynamicQuantizeLinear", rest, "low")
    parts = [product(high, "high_product", *bias), product(low, "low_product")]
    out = gemm.outputs[0]
    total = add_node(gemm, "Add", parts, str(gemm.name), [str(out.name)], like=out)
    # The logits, or, of two heads, one of those that are averaged.
    ir.convenience.replace_all_uses_with(out, total.outputs[0], replace_graph_outputs=True)
    graph.remove([gemm, weight], safe=True)
