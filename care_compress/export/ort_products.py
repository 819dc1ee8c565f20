"""Quantized convolutions as integer matrix products, the only ones that ONNX Runtime has.

It multiplies the integers of a convolution only if the result is quantized at once. Here a GELU or
a residual stands between, so it would fall back to float (13 ms, its FP32 takes 11: see
docs/PERFORMANCE.md). Its own product of integers gives out floats, and takes an image as it lies:

    Transpose -> QuantizeLinear -> MatMulIntegerToFloat -> Transpose

with the bias in whole steps of the integer sums. A downsampling is such a product, too, once every
2x2 patch is a row. ONNX Runtime moves the transposes through the network until most of them meet
and cancel. A Gemm between Q/DQ pairs is as fast by itself, and costs two reshapes and a step
through the graph for each.
"""

from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from care_compress.export.float_graph import (
    add_constant,
    constant,
    drop_unread,
    maker_of,
    product_nodes,
)

DOMAIN = "com.microsoft"  # where ONNX Runtime keeps the operations of its own
CHANNELS_LAST, CHANNELS_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
_DATA, _WEIGHT, _BIAS = 0, 1, 2
_LARGEST = 2**31 - 1
# Numbers that lie together in a patch; fewer are moved more slowly than they are convolved.
_LEAST_RUN = 64


def use_integer_products(model: ir.Model) -> None:
    """Replace every 1x1 or patch convolution of two quantized operands in place."""
    names = (f"m{number}" for number in count())
    for name, node in product_nodes(model.graph).items():
        if node.op_type == "Conv" and _is_quantized(node) and _is_product(node):
            _Product(model.graph, node, name, names).replace()
    model.opset_imports[DOMAIN] = 1
    drop_unread(model.graph)


def _is_quantized(node: ir.Node) -> bool:
    """8 bits, one scale of the data, and a bias that fits into int32."""
    data, weight = _maker(node, _DATA), _maker(node, _WEIGHT)
    if any(maker is None or maker.op_type != "DequantizeLinear" for maker in (data, weight)):
        return False
    return (
        _input(weight, 0).dtype == ir.DataType.INT8
        and constant(_input(data, 1)).size == 1
        and float(np.abs(_bias_steps(node)).max()) <= _LARGEST
    )


def _is_product(node: ir.Node) -> bool:
    """One group, and patches that lie side by side and fill the image; the smallest is a pixel."""
    _, inputs, *kernel = constant(_input(_maker(node, _WEIGHT), 0)).shape
    if node.attributes.get_int("group", 1) != 1:
        return False
    if kernel == [1, 1]:
        return True
    size = _sides(_image(node))
    return (
        list(node.attributes.get_ints("strides", [1, 1])) == kernel
        and not any(node.attributes.get_ints("pads", [0]))
        and not any(side % step for side, step in zip(size, kernel, strict=True))
        and inputs * kernel[1] >= _LEAST_RUN
    )


def _image(node: ir.Node) -> ir.Value:
    """What is quantized for a convolution."""
    return _input(_input(_maker(node, _DATA), 0).producer(), 0)


def _sides(image: ir.Value) -> tuple[int, int]:
    """Rows and columns."""
    assert image.shape is not None
    _, _, rows, columns = image.shape
    assert isinstance(rows, int) and isinstance(columns, int)
    return rows, columns


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
        operands = self._operands()
        quantize = _maker(self.data, 0)
        assert quantize is not None and quantize.op_type == "QuantizeLinear"
        last = self._made("Transpose", quantize.inputs[:1], "/last", quantize, perm=CHANNELS_LAST)
        quantize.replace_input_with(0, last)
        quantize.outputs[0].shape = None
        product = self._made("MatMulIntegerToFloat", operands, "/product")
        # The site's own name goes to the node that gives out what the convolution gave.
        image = self._made("Transpose", [product], "", perm=CHANNELS_FIRST)
        image.shape, image.type = out.shape, out.type
        ir.convenience.replace_all_uses_with(out, image)
        self.graph.remove([self.node, self.data, self.weight], safe=True)

    def _operands(self) -> list[ir.Value | None]:
        """Integers, scales and zero points of both factors, and the bias."""
        stored = _input(self.weight, 0)
        kernels = constant(stored).transpose(2, 3, 1, 0)  # rows, columns, inputs, outputs
        rows = np.ascontiguousarray(kernels.reshape(-1, kernels.shape[-1]))
        pixels = _input(self.data, 0)
        if kernels.shape[:2] != (1, 1):
            pixels = self._patches(pixels, *kernels.shape[:3])
        operands = [pixels, add_constant(self.graph, f"{stored.name}_t", rows)]
        for place in (1, 2):
            operands += [self.data.inputs[place], self.weight.inputs[place]]
        return [*operands, self._bias()]

    def _patches(self, pixels: ir.Value, high: int, wide: int, channels: int) -> ir.Value:
        """The numbers of every patch, side by side: (B, H/h, W/w, h w C)."""
        sides = _sides(_image(self.node))
        rows, columns = (size // step for size, step in zip(sides, (high, wide), strict=True))
        split = self._reshaped(pixels, "/split", [rows, high, columns, wide * channels])
        patches = self._made("Transpose", [split], "/patches", perm=[0, 1, 3, 2, 4])
        return self._reshaped(patches, "/joined", [rows, columns, high * wide * channels])

    def _reshaped(self, value: ir.Value, name: str, lengths: list[int]) -> ir.Value:
        shape = np.array([0, *lengths], np.int64)  # 0: as many images as there are
        stored = add_constant(self.graph, f"{self.name}{name}", shape)
        return self._made("Reshape", [value, stored], name)

    def _bias(self) -> ir.Value:
        """The bias in whole steps of the sums; simulated so, by `retarget`."""
        whole = _bias_steps(self.node) * _step(self.node)
        return add_constant(self.graph, f"{self.name}.bias", whole.astype(np.float32))

    def _made(
        self,
        kind: str,
        inputs: Sequence[ir.Value | None],
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
    return maker_of(node.inputs[place])


def _input(node: ir.Node | None, place: int) -> ir.Value:
    assert node is not None
    value = node.inputs[place]
    assert value is not None
    return value


def _step(node: ir.Node) -> NDArray[np.float32]:
    """What one step of each output channel's integer sum is worth."""
    makers = _maker(node, _DATA), _maker(node, _WEIGHT)
    data, weight = (constant(_input(maker, 1)).astype(np.float32) for maker in makers)
    outputs = len(constant(_input(makers[1], 0)))
    step: NDArray[np.float32] = np.broadcast_to(data * weight, outputs)
    return step


def _bias_steps(node: ir.Node) -> NDArray[np.float64]:
    step = _step(node).astype(np.float64)
    if len(node.inputs) <= _BIAS:
        return np.zeros_like(step)
    steps: NDArray[np.float64] = np.round(constant(_input(node, _BIAS)) / step)
    return steps
