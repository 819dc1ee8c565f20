"""Content of a bundle whose answers have a place: one convolution as a typed ONNX graph."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from qdq import CLASSES, MEAN, SIDE, STD, make_content

from care_compress.device.images import normalize_pixels
from care_compress.export.bundle import BundleContent, Model
from care_compress.files import sha256_file

STRIDE = 4
PLACES = SIDE // STRIDE
SHAPES = {
    "segmentation": (CLASSES, PLACES, PLACES),
    "detection": (4 + CLASSES, PLACES * PLACES),
}


def write_dense(path: Path, task: str, *, int8: bool, half: bool) -> Path:
    """Class logits of every place; of a detector, after a box of about half the image's side."""
    rng, channels = np.random.default_rng(3), SHAPES[task][0]
    dtype, kind = (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
    weights, bias = rng.normal(0, 0.4, (channels, 3, STRIDE, STRIDE)), np.zeros(channels, dtype)
    if task == "detection":
        weights[:4] *= 0.05
        bias[:4], bias[4:] = (0.25, 0.25, 0.75, 0.75), -6
    codes = (weights / 0.02).round().astype(np.int8)
    values = {
        "w": codes if int8 else (codes * 0.02).astype(dtype),
        "b": bias,
        "x_scale": np.array(0.02, dtype),
        "x_zero": np.array(0, np.int8),
        "w_scale": np.full(channels, 0.02, dtype),
        "w_zero": np.zeros(channels, np.int8),
        "shape": np.array([1, *SHAPES[task]], np.int64),
    }
    node = helper.make_node
    nodes = [node("Cast", ["image"], ["x"], name="cast_in", to=kind)]
    if int8:
        nodes += [
            node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"], name="q"),
            node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"], name="dq"),
            node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_dq"], name="w_dq", axis=0),
        ]
    given = ["x_dq", "w_dq", "b"] if int8 else ["x", "w", "b"]
    nodes += [
        node("Conv", given, ["y"], name="stem", strides=[STRIDE] * 2),
        node("Cast", ["y"], ["z"], name="cast_out", to=TensorProto.FLOAT),
        node("Reshape", ["z", "shape"], ["logits"], name="out"),
    ]
    used = {name for one in nodes for name in one.input}
    graph = helper.make_graph(
        nodes,
        task,
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, *SHAPES[task]])],
        [numpy_helper.from_array(value, name) for name, value in values.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def answers_to(path: Path, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What ONNX Runtime makes of pixels."""
    session = onnxruntime.InferenceSession(str(path))
    floats = normalize_pixels(pixels, MEAN, STD)
    return np.concatenate(
        [session.run(None, {"image": floats[i : i + 1]})[0] for i in range(len(pixels))]
    )


def dense_content(folder: Path, task: str, half: bool = False) -> BundleContent:
    """For TensorRT, or for a CPU; with INT8 and the float model."""
    folder.mkdir(exist_ok=True)
    content = make_content(folder, half=half)
    models, logits = {}, {}
    for name in content.models:
        path = write_dense(folder / f"{name}.onnx", task, int8=name == "int8", half=half)
        models[name] = Model((path,), sha256_file(path), 20.0)
        logits[name] = answers_to(path, content.pixels)
    return dataclasses.replace(
        content, models=models, task=task, letterbox=True, output_shape=(1, *SHAPES[task]),
        logits=logits,
    )  # fmt: skip
