"""The integers that an exported file multiplies activations with."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from care_compress.libraries import openvino_core


def stored_weights(path: Path) -> dict[str, NDArray[np.int8]]:
    """Every 8-bit weight of an .onnx or .xml file, by the name of what reads it."""
    return _of_openvino(path) if path.suffix == ".xml" else _of_onnx(path)


def _of_onnx(path: Path) -> dict[str, NDArray[np.int8]]:
    graph = onnx.load(path).graph
    stored = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8
    }
    places = {"DequantizeLinear": 0, "MatMulIntegerToFloat": 1}
    found = {}
    for node in graph.node:
        name = node.input[places[node.op_type]] if node.op_type in places else None
        if name in stored:
            found[node.name] = stored[name]
    return found


def _of_openvino(path: Path) -> dict[str, NDArray[np.int8]]:
    operations: Any = openvino_core().read_model(path).get_ordered_ops()
    found = {}
    for operation in operations:
        if (
            operation.get_type_name() != "Constant"
            or operation.get_element_type().get_type_name() != "i8"
        ):
            continue
        # A zero point is a constant of the same type, and of one number for each channel at most.
        if operation.data.size > max(operation.data.shape, default=1):
            found[operation.get_friendly_name()] = operation.data.copy()
    return found
