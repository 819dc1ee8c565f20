"""GELU written in the form that a processor computes fastest.

By erf it takes an exponential and a division for every value: with AVX2 a quarter of the INT8 time
of OpenVINO, a sixth of ONNX Runtime's. OpenVINO looks both up in registers of AVX512; without them
it gets `products`, which it fuses into one loop. ONNX Runtime would run those one by one and always
gets `tanh`, an attribute of the same operation. The formulas stand in
`care_compress.quantize.gelu`, which simulates them.

Only images: the head's GELU is one vector, and its rounding would be that of the logits.
"""

import numpy as np
import onnx_ir as ir

from care_compress.export.to_onnx import add_constant, add_node, is_image
from care_compress.quantize.gelu import CURVE, REACH, SLOPE, SQUARES


def write_gelu(model: ir.Model, form: str) -> None:
    """Put a form in the place of every GELU of an image, in place; ``erf`` leaves them."""
    gelus = [node for node in model.graph if node.op_type == "Gelu" and is_image(node.inputs[0])]
    if form == "tanh":
        for gelu in gelus:
            gelu.attributes["approximate"] = ir.AttrString("approximate", "tanh")
    if form == "products" and gelus:
        reach, slope, curve = (
            add_constant(model.graph, f"gelu_{name}", np.array(number, np.float32))
            for name, number in (("reach", REACH), ("slope", SLOPE), ("curve", CURVE))
        )
        for gelu in gelus:
            given = _products(gelu, reach, slope, curve)
            ir.convenience.replace_all_uses_with(gelu.outputs[0], given)
            model.graph.remove(gelu, safe=True)


def _products(gelu: ir.Node, reach: ir.Value, slope: ir.Value, curve: ir.Value) -> ir.Value:
    """What a GELU gives out, by a few products and sums in front of it."""
    x, out = gelu.inputs[0], gelu.outputs[0]

    def made(kind: str, name: str, *inputs: ir.Value | None) -> ir.Value:
        names = f"{gelu.name}/{name}", f"{out.name}_{name}"
        return add_node(gelu, kind, inputs, names[0], names[1:], like=out).outputs[0]

    size = made("Abs", "size", x)
    near = made("Relu", "near", made("Sub", "left", reach, size))
    line = made("Add", "line", made("Mul", "bent", near, curve), slope)
    tail = made("Mul", "root", made("Mul", "near2", near, near), line)
    for number in range(SQUARES):
        tail = made("Mul", f"power{2 << number}", tail, tail)
    return made("Sub", "given", made("Relu", "above", x), made("Mul", "below", tail, size))
