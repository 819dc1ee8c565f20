"""Whether integer products are exact here, asked of the runtime itself.

A processor without integer dot products adds two products of u8 and s8 in 16 bits that saturate:
2 * 255 * 127 = 64,770 comes out as 32,767. Weights in -64..63 never reach that, so our files are
right everywhere; one with weights of all 8 bits (``quantize.full_range``) says so in its metadata,
and whatever would run it here asks first.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from care_compress.errors import TargetError
from care_compress.libraries import load_openvino, openvino_core
from care_compress.recipe.target import DOT_PRODUCTS, Runtime

# The largest factors, as many as make every kernel use its whole registers.
_DEPTH, _OUTPUTS, _SIDE = 64, 32, 8
_SUM = _DEPTH * 255 * 127


def check_needs(path: Path, needs: str | None, runtime: Runtime) -> None:
    """Raise TargetError for a file that needs what the runtime does not have here."""
    if needs != DOT_PRODUCTS:
        return
    if not (openvino_is_exact() if runtime == "openvino" else onnxruntime_is_exact()):
        raise TargetError(
            f"{path} has weights of all 8 bits and needs a processor with integer dot products "
            "(VNNI, AMX, or Arm's SDOT); here its sums would overflow and its answers be wrong.",
            "run it where care-compress doctor names dot products, or make it again with "
            "quantize.full_range: false, which is right on every processor",
        )


@functools.cache
def onnxruntime_is_exact() -> bool:
    """Whether ONNX Runtime adds the largest products without saturating."""
    weight = numpy_helper.from_array(np.full((_DEPTH, _OUTPUTS), 127, np.int8), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["input", "weight"], ["sum"])],
        "largest_products",
        [helper.make_tensor_value_info("input", TensorProto.UINT8, [_SIDE, _DEPTH])],
        [helper.make_tensor_value_info("sum", TensorProto.INT32, [_SIDE, _OUTPUTS])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"input": np.full((_SIDE, _DEPTH), 255, np.uint8)})
    return bool((found == _SUM).all())


@functools.cache
def openvino_is_exact() -> bool:
    """Whether OpenVINO does on the CPU; ONEDNN_MAX_CPU_ISA may hide what the processor has."""
    openvino = load_openvino()
    ops: Any = openvino.opset13
    one, low, high = (np.float32(value) for value in (1, 0, 255))
    images = ops.parameter([1, _DEPTH, _SIDE, _SIDE], np.float32)
    integers = ops.fake_quantize(images, low, high, low, high, 256)
    stored = ops.constant(np.full((_OUTPUTS, _DEPTH, 1, 1), 127, np.int8))
    weight = ops.multiply(ops.convert(stored, "f32"), np.full((_OUTPUTS, 1, 1, 1), one))
    product = ops.convolution(integers, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    model = openvino.Model([product], [images])
    # In float32: bfloat16 would round a sum that is right.
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino_core().compile_model(model, "CPU", settings)
    (found,) = compiled([np.full((1, _DEPTH, _SIDE, _SIDE), high)]).values()
    return bool((found == _SUM).all())
