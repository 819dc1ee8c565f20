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

from care_compress.export.to_onnx import (
    BIAS,
    add_constant,
    add_node,
    constant,
    drop_unread,
    maker_of,
    product_nodes,
)

DOMAIN = "com.microsoft"  # where ONNX Runtime keeps the operations of its own
CHANNELS_LAST, CHANNELS_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
_DATA, _WEIGHT = 0, 1
_LARGEST = 2**31 - 1
# Numbers that lie together in a patch; fewer are moved more slowly than they are convolved.
_LEAST_RUN = 64


def use_integer_products(model: ir.Model) -> None:
    """Replace every 1x1 or patch convolution of two quantized operands in place."""
    names = (f"m{number}" for number in count())
    for node in product_nodes(model.graph).values():
        if node.op_type == "Conv" and _is_quantized(node) and _is_product(node):
            _replace(model.graph, node, names)
    model.opset_imports[DOMAIN] = 1
    drop_unread(model.graph)


def _is_quantized(node: ir.Node) -> bool:
    """Whether both operands have 8 bits, the data one scale, and the bias fits into int32."""
    data, weight = (maker_of(node.inputs[place]) for place in (_DATA, _WEIGHT))
    if any(maker is None or maker.op_type != "DequantizeLinear" for maker in (data, weight)):
        return False
    return (
        _input(weight, 0).dtype == ir.DataType.INT8
        and constant(_input(data, 1)).size == 1
        and float(np.abs(_bias_steps(node)).max()) <= _LARGEST
    )


def _is_product(node: ir.Node) -> bool:
    """Whether patches, of a pixel or more, lie side by side and fill the image, in one group."""
    _, inputs, *kernel = constant(_input(maker_of(node.inputs[_WEIGHT]), 0)).shape
    if node.attributes.get_int("group", 1) != 1:
        return False
    if kernel == [1, 1]:
        return True
    return (
        list(node.attributes.get_ints("strides", [1, 1])) == kernel
        and not any(node.attributes.get_ints("pads", [0]))
        and not any(side % step for side, step in zip(_sides(node), kernel, strict=True))
        and inputs * kernel[1] >= _LEAST_RUN
    )


def _sides(node: ir.Node) -> tuple[int, int]:
    """Rows and columns of what is quantized for a convolution."""
    integers = _input(maker_of(node.inputs[_DATA]), 0)
    image = _input(integers.producer(), 0)
    assert image.shape is not None
    _, _, rows, columns = image.shape
    assert isinstance(rows, int) and isinstance(columns, int)
    return rows, columns


def _replace(graph: ir.Graph, conv: ir.Node, names: Iterator[str]) -> None:
    """Put a product in the place of one convolution."""
    data, weight = (maker_of(conv.inputs[place]) for place in (_DATA, _WEIGHT))
    assert data is not None and weight is not None

    def made(
        kind: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        before: ir.Node = conv,
        perm: Sequence[int] | None = None,
    ) -> ir.Value:
        domain = DOMAIN if kind == "MatMulIntegerToFloat" else ""
        attributes = None if perm is None else {"perm": perm}
        name = f"{conv.name}{name}"
        return add_node(before, kind, inputs, name, [next(names)], attributes, domain).outputs[0]

    def reshaped(value: ir.Value, name: str, lengths: list[int]) -> ir.Value:
        shape = np.array([0, *lengths], np.int64)  # 0: as many images as there are
        stored = add_constant(graph, f"{conv.name}{name}", shape)
        return made("Reshape", [value, stored], name)

    pixels, stored = _input(data, 0), _input(weight, 0)
    kernels = constant(stored).transpose(2, 3, 1, 0)  # rows, columns, inputs, outputs
    high, wide, channels, outputs = kernels.shape
    if (high, wide) != (1, 1):
        # The numbers of every patch, side by side: (B, H/h, W/w, h w C).
        height, width = _sides(conv)
        rows, columns = height // high, width // wide
        split = reshaped(pixels, "/split", [rows, high, columns, wide * channels])
        patches = made("Transpose", [split], "/patches", perm=[0, 1, 3, 2, 4])
        pixels = reshaped(patches, "/joined", [rows, columns, high * wide * channels])
    factor = np.ascontiguousarray(kernels.reshape(-1, outputs))
    # The bias in whole steps of the sums; simulated so, by `retarget`.
    bias = (_bias_steps(conv) * _step(conv)).astype(np.float32)
    operands: list[ir.Value | None] = [pixels, add_constant(graph, f"{stored.name}_t", factor)]
    for place in (1, 2):  # scales and zero points of both factors
        operands += [data.inputs[place], weight.inputs[place]]
    operands.append(add_constant(graph, f"{conv.name}.bias", bias))
    quantize = maker_of(data.inputs[0])
    assert quantize is not None and quantize.op_type == "QuantizeLinear"
    last = made("Transpose", quantize.inputs[:1], "/last", quantize, CHANNELS_LAST)
    quantize.replace_input_with(0, last)
    quantize.outputs[0].shape = None
    product = made("MatMulIntegerToFloat", operands, "/product")
    # The site's own name goes to the node that gives out what the convolution gave.
    image, out = made("Transpose", [product], "", perm=CHANNELS_FIRST), conv.outputs[0]
    image.shape, image.type = out.shape, out.type
    if out.is_graph_output():  # predictions of masks: whoever reads the file knows them by name
        image.name, out.name = out.name, image.name
    ir.convenience.replace_all_uses_with(out, image, replace_graph_outputs=True)
    graph.remove([conv, data, weight], safe=True)


def _input(node: ir.Node | None, place: int) -> ir.Value:
    assert node is not None
    value = node.inputs[place]
    assert value is not None
    return value


def _step(node: ir.Node) -> NDArray[np.float32]:
    """What one step of each output channel's integer sum is worth."""
    data, weight = (maker_of(node.inputs[place]) for place in (_DATA, _WEIGHT))
    scales = [constant(_input(maker, 1)).astype(np.float32) for maker in (data, weight)]
    outputs = len(constant(_input(weight, 0)))
    step: NDArray[np.float32] = np.broadcast_to(scales[0] * scales[1], outputs)
    return step


def _bias_steps(node: ir.Node) -> NDArray[np.float64]:
    step = _step(node).astype(np.float64)
    if len(node.inputs) <= BIAS:
        return np.zeros_like(step)
    steps: NDArray[np.float64] = np.round(constant(_input(node, BIAS)) / step)
    return steps
