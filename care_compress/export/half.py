"""Writing float16 into a graph: TensorRT runs every operation in exactly the type the graph says.

Two parts stay in float32. The attention core: exp(t) of the very negative t that CARE learns is
nothing in float16, and neither is the 1e-6 that guards its division. The pool and the head: a sum
over all positions may exceed 65504, and LayerNorm squares. They are under 1 % of the work.
"""

import re

import numpy as np
import onnx_ir as ir

from care_compress.errors import ExportError
from care_compress.export.float_graph import OUTPUT, drop_unread, module_of

_FLOAT32 = re.compile(r"(stages\.\d+\.blocks\.\d+\.token_mixer\.core|pool|heads)\b")
_KINDS = {ir.DataType.FLOAT, ir.DataType.FLOAT16}


def write_half(model: ir.Model) -> None:
    """Type every operation in place: float16, or float32 where that is needed.

    The images and logits stay float32, so that whoever runs the file need not know.
    """
    graph = model.graph
    typed = _Typed(graph)
    for node in list(graph):
        kind = ir.DataType.FLOAT if _FLOAT32.match(module_of(node)) else ir.DataType.FLOAT16
        for place, value in enumerate(node.inputs):
            if value is not None and value.dtype in _KINDS:
                node.replace_input_with(place, typed.value(value, kind, node))
        for value in node.outputs:
            if value.dtype in _KINDS:
                value.dtype = kind
    (logits,) = graph.outputs
    assert logits.name == OUTPUT and logits.dtype == ir.DataType.FLOAT, "the head is float32"
    drop_unread(graph)


class _Typed:
    """Values of a graph in the type that a reader wants; each is cast once."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.made: dict[tuple[str, ir.DataType], ir.Value] = {}

    def value(self, value: ir.Value, kind: ir.DataType, reader: ir.Node) -> ir.Value:
        """`value` as `kind`, cast just before its first reader."""
        if value.dtype == kind:
            return value
        key = (str(value.name), kind)
        if key not in self.made:
            constant = value.const_value is not None
            self.made[key] = self._constant(value) if constant else self._cast(value, kind, reader)
        return self.made[key]

    def _cast(self, value: ir.Value, kind: ir.DataType, reader: ir.Node) -> ir.Value:
        node = ir.node("Cast", [value], {"to": kind.value}, name=f"{reader.name}/Cast_{value.name}")
        node.outputs[0].name = f"{value.name}_{kind.name.lower()}"
        node.outputs[0].dtype = kind
        self.graph.insert_before(reader, node)
        return node.outputs[0]

    def _constant(self, value: ir.Value) -> ir.Value:
        assert value.const_value is not None and value.dtype == ir.DataType.FLOAT
        name = f"{value.name}_half"
        wide = value.const_value.numpy()
        with np.errstate(over="ignore"):
            narrow = wide.astype(np.float16)
        if not np.isfinite(narrow).all():
            raise ExportError(
                f"{value.name} reaches {np.abs(wide).max():.3g}, float16 ends at 65504.",
                "export to a float32 target; no float16 engine can hold this checkpoint",
            )
        tensor = ir.tensor(narrow, name=name)
        made = ir.Value(
            name=name,
            const_value=tensor,
            type=ir.TensorType(ir.DataType.FLOAT16),
            shape=tensor.shape,
        )
        self.graph.initializers[name] = made
        return made
