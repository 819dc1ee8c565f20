"""A small classifier as typed ONNX graphs (INT8 convolution, the rest FP16), and a bundle of it."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from care_compress.device.images import normalize_pixels
from care_compress.export.bundle import BundleContent, Model
from care_compress.files import sha256_file

SIDE = 16
CLASSES = 5
_HALF = np.float16
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.2, 0.3)
IMAGES = 40


def write_classifier(
    path: Path,
    *,
    int8: bool,
    batch: int | str = 1,
    zero_point: int = 0,
    half: bool = True,
    core: bool = False,
) -> Path:
    """Cast, (Q, DQ,) convolution, ReLU, mean, matrix product, cast, (and one layer in float32)."""
    random = np.random.default_rng(0)
    float_type = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    dtype = _HALF if half else np.float32
    values = {
        "x_scale": np.array(0.02, dtype),
        "x_zero": np.array(zero_point, np.int8),
        "w_scale": np.full(8, 0.01, dtype),
        "w_zero": np.zeros(8, np.int8),
        "bias": np.zeros(8, dtype),
        "axes": np.array([2, 3], np.int64),
        "head": random.normal(size=(8, CLASSES)).astype(dtype),
    }
    codes = random.integers(-127, 128, (8, 3, 3, 3)).astype(np.int8)
    values["w"] = codes if int8 else (codes * 0.01).astype(dtype)
    node = helper.make_node
    nodes = [node("Cast", ["image"], ["x"], name="cast_in", to=float_type)]
    if int8:
        scales = ["x_scale", "x_zero"]
        nodes += [
            node("QuantizeLinear", ["x", *scales], ["x_q"], name="q"),
            node("DequantizeLinear", ["x_q", *scales], ["x_dq"], name="dq"),
            node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_dq"], name="w_dq", axis=0),
        ]
    inputs = ["x_dq", "w_dq", "bias"] if int8 else ["x", "w", "bias"]
    nodes += [
        node("Conv", inputs, ["c"], name="stem", strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"], name="relu"),
        node("ReduceMean", ["r", "axes"], ["m"], name="mean", keepdims=0),
        node("MatMul", ["m", "head"], ["l"], name="head"),
        node("Cast", ["l"], ["cast" if core else "logits"], name="cast_out", to=TensorProto.FLOAT),
    ]
    if core:
        nodes.append(node("Relu", ["cast"], ["logits"], name="core"))
    used = {name for item in nodes for name in item.input}
    shape = [batch, 3, SIDE, SIDE]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in values.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def make_content(folder: Path, half: bool = True) -> BundleContent:
    """A small bundle's content, whose expected logits are ONNX Runtime's; for it without halves."""
    models = {
        name: write_classifier(folder / f"{name}.onnx", int8=name == "int8", half=half)
        for name in ("int8", "fp16" if half else "fp32")
    }
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (IMAGES, 3, SIDE, SIDE), dtype=np.uint8)
    floats = normalize_pixels(pixels, MEAN, STD)
    logits = {}
    for name, path in models.items():
        session = onnxruntime.InferenceSession(str(path))
        logits[name] = np.concatenate(
            [session.run(None, {"image": floats[i : i + 1]})[0] for i in range(IMAGES)]
        )
    return BundleContent(
        run="mine",
        recipe="int8",
        target="tensorrt-orin" if half else "onnxruntime-cpu",
        device="jetson-orin" if half else "cpu",
        fingerprint="f" * 64,
        classes=tuple(f"class {k}" for k in range(CLASSES)),
        resolution=SIDE,
        crop_pct=0.9,
        mean=MEAN,
        std=STD,
        input_name="image",
        input_shape=(1, 3, SIDE, SIDE),
        output_name="logits",
        output_shape=(1, CLASSES),
        requirement="tensorrt>=10.3,<12" if half else "onnxruntime>=1.20",
        models={
            name: Model((path,), sha256_file(path), 20.0, least_agreement=98.0)
            for name, path in models.items()
        },
        pixels=pixels,
        labels=logits["int8"].argmax(axis=1),
        logits=logits,
    )
