"""Which quantizers of a graph a runtime can fuse, and what its products move.

TensorRT fuses a QuantizeLinear into the convolution or product in front of it only where that one
is quantized itself, GELU in between or not ("quantized types" of its developer guide). Every other
quantizer is a pass over the tensor of its own, or joins whatever float operation is there.
"""

from dataclasses import dataclass
from math import prod

import onnx
from onnx import NodeProto, TensorProto

_PRODUCTS = ("Conv", "Gemm", "MatMul")
_ON_THE_WAY = ("Cast", "Gelu")
_FLOAT_BYTES = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2}


@dataclass(frozen=True)
class Edges:
    """The quantizers of one graph, for one image."""

    integer: int  # from a quantized product to a quantized product
    alone: int  # behind something that is not quantized
    product_bytes: int  # read and written by convolutions and products, weights left out


def count_edges(model: onnx.ModelProto) -> Edges:
    """Count the quantizers of activations, and bytes if all fuse that can."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    makers = {name: node for node in graph.node for name in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    values = {one.name: one for one in (*graph.value_info, *graph.input, *graph.output)}
    constants = {one.name for one in graph.initializer}

    def in_integers(node: NodeProto) -> bool:
        maker = makers.get(node.input[0])
        return maker is not None and maker.op_type == "DequantizeLinear"

    def elements(name: str) -> int:
        shape = values[name].type.tensor_type.shape.dim
        return prod(one.dim_value or 1 for one in shape)

    def float_bytes(name: str) -> int:
        return _FLOAT_BYTES.get(values[name].type.tensor_type.elem_type, 1)

    def fused(node: NodeProto) -> bool:
        """Whether a quantizer takes over what this product gives out, and nobody else sees it."""
        after = readers.get(node.output[0], [])
        while len(after) == 1 and after[0].op_type in _ON_THE_WAY:
            after = readers.get(after[0].output[0], [])
        return len(after) == 1 and after[0].op_type == "QuantizeLinear"

    integer = alone = moved = 0
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            maker = makers.get(node.input[0])
            while maker is not None and maker.op_type in _ON_THE_WAY:
                maker = makers.get(maker.input[0])
            if maker is not None and maker.op_type in _PRODUCTS and in_integers(maker):
                integer += 1
            else:
                alone += 1
        if node.op_type in _PRODUCTS:
            quantized = in_integers(node)
            for name in node.input:
                if name in values and name not in constants and name not in _weights(node, makers):
                    moved += elements(name) * (1 if quantized else float_bytes(name))
            narrow = quantized and fused(node)
            moved += elements(node.output[0]) * (1 if narrow else float_bytes(node.output[0]))
    return Edges(integer, alone, moved)


def _weights(node: NodeProto, makers: dict[str, NodeProto]) -> set[str]:
    """The operands of a product that are dequantized constants."""
    found = set()
    for name in node.input[1:]:
        maker = makers.get(name)
        if maker is not None and maker.op_type == "DequantizeLinear":
            before = makers.get(maker.input[0])
            if before is None or before.op_type != "QuantizeLinear":
                found.add(name)
    return found
