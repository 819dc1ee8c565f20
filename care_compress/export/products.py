"""Quantized 1x1 convolutions as integer matrix products, the only ones that ONNX Runtime has.

It multiplies the integers of a convolution only if the result is quantized at once. Here a GELU or
a residual stands between, so it would fall back to float (13 ms, its FP32 takes 11: see
docs/PERFORMANCE.md). Its own product of integers gives out floats, and takes an image as it lies:

    Transpose -> QuantizeLinear -> MatMulIntegerToFloat -> Transpose

with the bias in whole steps of the integer sums. ONNX Runtime moves the transposes through the
network until most of them meet and cancel. A Gemm between Q/DQ pairs is as fast by itself, and
costs two reshapes and a step through the graph for each.
"""

from collections.abc import Iterator
from itertools import count

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from care_compress.export.float_graph import add_constant, constant, drop_unread, product_nodes

DOMAIN = "com.microsoft"  # where ONNX Runtime keeps the operations of its own
_DATA, _WEIGHT, _BIAS = 0, 1, 2
_LARGEST = 2**31 - 1


def use_integer_products(model: ir.Model) -> None:
    """Replace every 1x1 convolution of two quantized operands in place."""
    names = (f"m{number}" for number in count())
    for name, node in product_nodes(model.graph).items():
        if node.op_type == "Conv" and _is_pointwise(node):
            _Product(model.graph, node, name, names).replace()
    model.opset_imports[DOMAIN] = 1
    drop_unread(model.graph)


def _is_pointwise(node: ir.Node) -> bool:
    """One group, a 1x1 kernel, 8 bits, one scale of the data, and a bias that fits into int32."""
    data, weight = _maker(node, _DATA), _maker(node, _WEIGHT)
    if any(maker is None or maker.op_type != "DequantizeLinear" for maker in (data, weight)):
        return False
    stored, groups = _input(weight, 0), node.attributes.get("group")
    return (
        stored.dtype == ir.DataType.INT8
        and constant(stored).shape[2:] == (1, 1)
        and (groups is None or groups.as_int() == 1)
        and constant(_input(data, 1)).size == 1
        and float(np.abs(_bias_steps(node)).max()) <= _LARGEST
    )


class _Product:
    """One convolution and the nodes that take its place."""

    def __init__(self, graph: ir.Graph, node: ir.Node, name: str, names: Iterator[str]) -> None:
        self.graph, self.node, self.name, self.names = graph, node, name, names
        data, weight = _maker(node, _DATA), _maker(node, _WEIGHT)
        assert data is not None and weight is not None
        self.data, self.weight = data, weight

    def replace(self) -> None:
        """Put the product where the convolution was."""
        out = self.node.outputs[0]
        quantize = _maker(self.data, 0)
        assert quantize is not None and quantize.op_type == "QuantizeLinear"
        last = self._made("Transpose", [quantize.inputs[0]], "/last", quantize, perm=[0, 2, 3, 1])
        quantize.replace_input_with(0, last)
        quantize.outputs[0].shape = None
        product = self._made("MatMulIntegerToFloat", self._operands(), "/product")
        # The site's own name goes to the node that gives out what the convolution gave.
        image = self._made("Transpose", [product], "", perm=[0, 3, 1, 2])
        image.shape, image.type = out.shape, out.type
        for use in list(out.uses()):
            use.node.replace_input_with(use.idx, image)
        self.graph.remove([self.node, self.data, self.weight], safe=True)

    def _operands(self) -> list[ir.Value | None]:
        """Integers, scales and zero points of both factors, and the bias."""
        stored = _input(self.weight, 0)
        rows = np.ascontiguousarray(constant(stored)[:, :, 0, 0].T)
        operands = [self.data.inputs[0], add_constant(self.graph, f"{stored.name}_t", rows)]
        for place in (1, 2):
            operands += [self.data.inputs[place], self.weight.inputs[place]]
        return [*operands, self._bias()]

    def _bias(self) -> ir.Value:
        """The bias in whole steps of the sums; simulated so, by `retarget`."""
        whole = _bias_steps(self.node) * _step(self.node)
        return add_constant(self.graph, f"{self.name}.bias", whole.astype(np.float32))

    def _made(
        self,
        kind: str,
        inputs: list[ir.Value | None],
        name: str,
        before: ir.Node | None = None,
        **attributes: int | list[int],
    ) -> ir.Value:
        domain = DOMAIN if kind == "MatMulIntegerToFloat" else ""
        node = ir.node(kind, inputs, attributes or None, domain=domain, name=f"{self.name}{name}")
        node.outputs[0].name = next(self.names)
        self.graph.insert_before(before or self.node, node)
        return node.outputs[0]


def _maker(node: ir.Node, place: int) -> ir.Node | None:
    value = node.inputs[place]
    return None if value is None else value.producer()


def _input(node: ir.Node | None, place: int) -> ir.Value:
    assert node is not None
    value = node.inputs[place]
    assert value is not None
    return value


def _step(node: ir.Node) -> NDArray[np.float32]:
    """What one step of each output channel's integer sum is worth."""
    data, weight = (
        constant(_input(_maker(node, place), 1)).astype(np.float32) for place in (_DATA, _WEIGHT)
    )
    step: NDArray[np.float32] = np.broadcast_to(data * weight, constant(_input(node, _BIAS)).shape)
    return step


def _bias_steps(node: ir.Node) -> NDArray[np.float64]:
    bias = constant(_input(node, _BIAS)).astype(np.float64)
    steps: NDArray[np.float64] = np.round(bias / _step(node).astype(np.float64))
    return steps
