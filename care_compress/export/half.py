"""Writing float16 into a graph: TensorRT runs every operation in exactly the type the graph says.

Two parts stay in float32. The attention core: exp(t) of the very negative t that CARE learns is
nothing in float16, and neither is the 1e-6 that guards its division. The pool and the head: a sum
over all positions may exceed 65504, and LayerNorm squares. They are under 1 % of the work.
"""

import re

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from care_compress.errors import ExportError
from care_compress.export.to_onnx import (
    OUTPUT,
    add_constant,
    add_node,
    constant,
    drop_unread,
    module_of,
)

_FLOAT32 = re.compile(r"(stages\.\d+\.blocks\.\d+\.token_mixer\.core|pool|heads)\b")
_KINDS = {ir.DataType.FLOAT, ir.DataType.FLOAT16}


def write_half(model: ir.Model) -> None:
    """Type every operation in place: float16, or float32 where that is needed.

    The images and logits stay float32, so that whoever runs the file need not know.
    """
    graph = model.graph
    made: dict[tuple[str, ir.DataType], ir.Value] = {}  # each value is cast once
    for node in list(graph):
        kind = ir.DataType.FLOAT if _FLOAT32.match(module_of(node)) else ir.DataType.FLOAT16
        for place, value in enumerate(node.inputs):
            if value is None or value.dtype not in _KINDS or value.dtype == kind:
                continue
            key = (str(value.name), kind)
            if key not in made and value.const_value is not None:
                made[key] = add_constant(graph, f"{value.name}_half", _half(value))
            elif key not in made:  # just before its first reader
                name, output = f"{node.name}/Cast_{value.name}", f"{value.name}_{kind.name.lower()}"
                cast = add_node(node, "Cast", [value], name, [output], {"to": kind.value})
                made[key] = cast.outputs[0]
                made[key].dtype = kind
            node.replace_input_with(place, made[key])
        for value in node.outputs:
            if value.dtype in _KINDS:
                value.dtype = kind
    (logits,) = graph.outputs
    assert logits.name == OUTPUT and logits.dtype == ir.DataType.FLOAT, "the head is float32"
    drop_unread(graph)


def _half(value: ir.Value) -> NDArray[np.float16]:
    """A constant in float16; raises ExportError where that cannot hold it."""
    assert value.dtype == ir.DataType.FLOAT
    wide = constant(value)
    with np.errstate(over="ignore"):
        narrow = wide.astype(np.float16)
    if not np.isfinite(narrow).all():
        raise ExportError(
            f"{value.name} reaches {np.abs(wide).max():.3g}, float16 ends at 65504.",
            "export to a float32 target; no float16 engine can hold this checkpoint",
        )
    return narrow
