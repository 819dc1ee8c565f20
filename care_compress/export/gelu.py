"""GELU written in the form that a processor computes fastest.

By erf it takes an exponential and a division for every value. AVX512 looks both up in registers;
with AVX2 that was a quarter of the INT8 time of OpenVINO, a sixth of ONNX Runtime's. There OpenVINO
gets `products`, which it fuses into one loop, and ONNX Runtime, which would run them one by one,
`tanh`, an attribute of the same operation. The formulas stand in `care_compress.quantize.gelu`,
which simulates them.

Only images: the head's GELU is one vector, and its rounding would be that of the logits.
"""

import numpy as np
import onnx_ir as ir

from care_compress.export.float_graph import add_constant
from care_compress.quantize.gelu import CURVE, REACH, SLOPE, SQUARES


def write_gelu(model: ir.Model, form: str) -> None:
    """Put a form in the place of every GELU of an image, in place; ``erf`` leaves them."""
    nodes = [node for node in model.graph if node.op_type == "Gelu" and _is_of_images(node)]
    if form == "tanh":
        for node in nodes:
            node.attributes["approximate"] = ir.AttrString("approximate", "tanh")
    if form == "products" and nodes:
        products = _Products(model.graph)
        for node in nodes:
            products.replace(node)


def _is_of_images(node: ir.Node) -> bool:
    value = node.inputs[0]
    return value is not None and value.shape is not None and len(value.shape) == 4


class _Products:
    """The three constants, which all GELUs share, and the nodes that take the place of one."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.reach, self.slope, self.curve = (
            add_constant(graph, f"gelu_{name}", np.array(number, np.float32))
            for name, number in (("reach", REACH), ("slope", SLOPE), ("curve", CURVE))
        )

    def replace(self, gelu: ir.Node) -> None:
        """Put a few products and sums where a GELU was."""
        x, out = gelu.inputs[0], gelu.outputs[0]

        def made(kind: str, name: str, *inputs: ir.Value | None) -> ir.Value:
            node = ir.node(kind, inputs, name=f"{gelu.name}/{name}")
            value = node.outputs[0]
            value.name, value.shape, value.type = f"{out.name}_{name}", out.shape, out.type
            self.graph.insert_before(gelu, node)
            return value

        size = made("Abs", "size", x)
        near = made("Relu", "near", made("Sub", "left", self.reach, size))
        line = made("Add", "line", made("Mul", "bent", near, self.curve), self.slope)
        tail = made("Mul", "root", made("Mul", "near2", near, near), line)
        for number in range(SQUARES):
            tail = made("Mul", f"power{2 << number}", tail, tail)
        given = made("Sub", "given", made("Relu", "above", x), made("Mul", "below", tail, size))
        ir.convenience.replace_all_uses_with(out, given)
        self.graph.remove(gelu, safe=True)
