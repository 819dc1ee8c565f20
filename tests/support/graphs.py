"""Classifiers of one product, written by hand in milliseconds."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 32


def onnx_file(path: Path, classes: int = 4, size: int | None = SIZE, batch: int = 1) -> Path:
    """Flatten and one matrix; with `size` None, the mean of each colour and one small matrix."""
    values = 3 if size is None else 3 * size * size
    weights = np.random.default_rng(0).normal(size=(values, classes)).astype(np.float32)
    pooled = [helper.make_node("GlobalAveragePool", ["image"], ["means"])] if size is None else []
    graph = helper.make_graph(
        [
            *pooled,
            helper.make_node("Flatten", ["means" if pooled else "image"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "classifier",
        [_tensor("image", [batch, 3, size or "H", size or "W"])],
        [_tensor("logits", [batch, classes])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def _tensor(name: str, shape: list[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
