"""Graphs that take camera bytes: (B, H, W, 3) uint8, a quarter of what floats take.

A pixel p enters the network as (p / 255 - mean) / std = p scale + shift. A stem in float takes that
into its own weights: exactly, because no padding enters it, and in float16 no worse than before
(68.8 dB from the included model, 68.1 with floats). Where the stem's input is quantized, its
integers were trained for normalised values: the two numbers stand in front, in float32, and the
file computes what its simulation does.

The conversion comes first, because TensorRT knows nothing else of bytes; the two numbers come
behind the change of layout, because ONNX Runtime is slow where a channel is the last axis (2.0 ms
instead of 0.4 with the stem at 224).
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from care_compress.export.to_onnx import BIAS, INPUT, add_constant, add_node, constant, drop_unread
from care_compress.recipe.sections import DataSection

_WEIGHT = 1
_CHANNELS_FIRST = [0, 3, 1, 2]


def take_bytes(model: ir.Model, data: DataSection) -> None:
    """Let a graph that takes floats take bytes, in place; before its types become float16.

    The nodes are named after the input: `care_compress.export.half` leaves them in float32.
    """
    graph = model.graph
    (images,) = graph.inputs
    assert images.shape is not None
    batch, channels, height, width = images.shape
    std = np.array(data.std, np.float64)
    scale, shift = 1 / (255 * std), -np.array(data.mean, np.float64) / std
    readers = [(use.node, use.idx) for use in images.uses()]
    first = next(node for node in graph if any(reader is node for reader, _ in readers))
    folds = [node.op_type for node, _ in readers] == ["Conv"]
    if folds:
        _fold(first, scale, shift)
    value = images
    steps: list[tuple[str, dict[str, int | Sequence[int]], list[ir.Value]]] = [
        ("Cast", {"to": ir.DataType.FLOAT.value}, []),
        ("Transpose", {"perm": _CHANNELS_FIRST}, []),
    ]
    if not folds:
        for kind, what, numbers in (("Mul", "scale", scale), ("Add", "shift", shift)):
            shaped = numbers.astype(np.float32).reshape(-1, 1, 1)
            steps.append((kind, {}, [add_constant(graph, f"{INPUT}_{what}", shaped)]))
    for kind, attributes, operands in steps:
        name, output = f"{INPUT}/{kind}", f"{INPUT}_{kind.lower()}"
        made = add_node(first, kind, [value, *operands], name, [output], attributes)
        value = made.outputs[0]
        value.dtype = ir.DataType.FLOAT
        if kind != "Cast":
            value.shape = ir.Shape([batch, channels, height, width])
    for node, place in readers:
        node.replace_input_with(place, value)
    images.shape = ir.Shape([batch, height, width, channels])
    images.dtype = ir.DataType.UINT8
    drop_unread(graph)


def _fold(stem: ir.Node, scale: NDArray[np.float64], shift: NDArray[np.float64]) -> None:
    """Put scale and shift of the input's channels into a convolution without padding."""
    pads = stem.attributes.get("pads")
    assert pads is None or not any(pads.as_ints()), "padding is not normalised"
    graph = stem.graph
    assert graph is not None
    stored, given = stem.inputs[_WEIGHT], stem.inputs[BIAS] if len(stem.inputs) > BIAS else None
    assert stored is not None
    weight = constant(stored).astype(np.float64)
    bias = np.zeros(len(weight)) if given is None else constant(given).astype(np.float64)
    bias += (weight * shift[:, None, None]).sum(axis=(1, 2, 3))
    folded = [weight * scale[:, None, None], bias]
    values = [
        add_constant(graph, name, numbers.astype(np.float32))
        for name, numbers in zip((f"{INPUT}_weight", f"{INPUT}_bias"), folded, strict=True)
    ]
    stem.resize_inputs(BIAS + 1)
    for place, value in zip((_WEIGHT, BIAS), values, strict=True):
        stem.replace_input_with(place, value)
