"""Writing float16 into a graph: TensorRT runs every operation in exactly the type the graph says.

Two parts stay in float32. The attention core: exp(t) of the very negative t that CARE learns is
nothing in float16, and neither is the 1e-6 that guards its division. The pool, and the GELU and
LayerNorm behind it: a sum over all positions may exceed 65504, and LayerNorm squares. They are
under 1 % of the work. The head's product, whose input is normalised, is float16: its weights are
most of what an engine reads for one image. The convolutions of a dense head are float16, where its
boxes are is not: of the side of an image float16 knows a two thousandth.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from care_compress.errors import ExportError
from care_compress.evaluate.readback import Peak
from care_compress.export.to_onnx import (
    OUTPUT,
    add_constant,
    add_node,
    constant,
    drop_unread,
    module_of,
)
from care_compress.runtime.on_onnxruntime import feed_of, open_session

_FLOAT32 = re.compile(
    r"(images|stages\.\d+\.blocks\.\d+\.token_mixer\.(core|tokens_first)|pool|heads(?!\.(pyramid|towers|adds|predict|levels)\b|(\.\w+)*\.fc\b))\b"
)
_KINDS = {ir.DataType.FLOAT, ir.DataType.FLOAT16}
# What these give is no larger than what they are given, which is looked at, or than 1.
_NOT_LARGER = {
    "Concat", "DequantizeLinear", "Erf", "Identity", "Reshape", "Sigmoid", "Slice", "Split",
    "Tanh", "Transpose",
}  # fmt: skip


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
            if node.op_type == "Resize" and place > 0:  # by how much: float32 whatever is resized
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
    _widen_output(graph)
    drop_unread(graph)


def _widen_output(graph: ir.Graph) -> None:
    """Cast the logits back to float32, under the name that they had."""
    (logits,) = graph.outputs
    maker = logits.producer()
    if logits.dtype == ir.DataType.FLOAT or maker is None:
        return
    logits.name = f"{OUTPUT}_half"
    to = ir.DataType.FLOAT
    cast = ir.node("Cast", [logits], {"to": to.value}, name=f"{maker.name}/Cast_{OUTPUT}")
    wide = cast.outputs[0]
    wide.name, wide.dtype, wide.shape = OUTPUT, to, logits.shape
    graph.append(cast)
    graph.outputs[0] = wide


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


def highest_half(path: Path, batches: Iterable[Tensor]) -> Peak | None:
    """Find the largest float16 value that a graph computes for these images; None without any.

    ONNX Runtime computes float16 nodes on a CPU in float32, so an overflow that an engine would
    have shows in no answer: each tensor's own maximum is read, in float32.
    """
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    typed = {
        value.name
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT16
    }
    made = {
        name: node.name
        for node in model.graph.node
        if node.op_type not in _NOT_LARGER
        for name in node.output
        if name in typed
    }
    if not made:
        return None
    for name in made:
        model.graph.node.extend(
            [
                helper.make_node("Cast", [name], [f"{name}/wide"], to=TensorProto.FLOAT),
                helper.make_node("Abs", [f"{name}/wide"], [f"{name}/abs"]),
                helper.make_node("ReduceMax", [f"{name}/abs"], [f"{name}/peak"], keepdims=0),
            ]
        )
    del model.graph.output[:]
    model.graph.output.extend(
        helper.make_tensor_value_info(f"{name}/peak", TensorProto.FLOAT, []) for name in made
    )
    session = open_session(path, model.SerializeToString())
    images, feed = session.get_inputs()[0], feed_of(session, path)
    size = images.shape[0] if isinstance(images.shape[0], int) else 0
    highest = np.zeros(len(made))
    for batch in batches:
        for part in torch.split(batch, size or len(batch)):
            whole = part.repeat(-(-size // len(part)), 1, 1, 1)[:size] if size else part
            found = session.run(None, {images.name: feed(whole)})
            highest = np.maximum(highest, np.nan_to_num(np.array(found), nan=np.inf, posinf=np.inf))
    worst = int(highest.argmax())
    return Peak(float(highest[worst]), list(made.values())[worst])
