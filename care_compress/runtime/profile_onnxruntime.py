"""Layers and times of an ONNX file in ONNX Runtime, from its own profiler."""

import json
import re
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import onnx
from torch import Tensor

from care_compress.runtime.layer_times import (
    CONVERT,
    ELEMENTWISE,
    FLOAT,
    INTEGER,
    OTHER,
    LayerTime,
    Profile,
    modules_of,
)
from care_compress.runtime.on_onnxruntime import feed_of, open_session
from care_compress.runtime.runners import batched_onnx

WARM_UP = 3
LEAST_RUNS, MOST_RUNS = 10, 100
FUSED_BEHIND = 3  # operations that may be fused behind a product
_KERNEL = "_kernel_time"
_FUSED = re.compile(r"_(token|nhwc)(_\d+)?$|_nchwc$")  # what a fusion puts behind a node's name
# A bare product, also inside the names of fused ones: FusedConv, QLinearMatMul, BiasGemm.
_PRODUCT = re.compile(r"Conv|Gemm|MatMul|QAttention")
_INTEGER_PRODUCT = re.compile(r"QLinear|Integer|QGemm|DynamicQuantize|QAttention")
_CONVERT = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ReorderInput"}
    | {"ReorderOutput", "Transpose", "Cast"}
)
_ELEMENTWISE = re.compile(
    r"Gelu|Relu|Add$|Mul$|Sub$|Div$|Min$|Max$|Exp$|Log$|Sqrt$|Erf$|Pow$|Abs$|Neg$|Tanh$|Sigmoid$"
    r"|Softmax$|Clip$|Where$|Reciprocal$|LayerNormalization$|BatchNormalization$|HardSwish$|Swish$"
)
_TYPES = {"float": "f32", "float16": "f16", "bfloat16": "bf16", "uint8": "u8", "int8": "i8"}


def profile_onnxruntime(path: Path, images: Tensor, threads: int, seconds: float) -> Profile:
    """Times are medians over runs after a warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "profile")
        content = batched_onnx(path, len(images))
        session = open_session(path, content, threads, profile=prefix)
        feed = {session.get_inputs()[0].name: feed_of(session, path)(images)}
        for _ in range(WARM_UP):
            began = time.perf_counter()
            session.run(None, feed)
            once = time.perf_counter() - began
        runs = max(LEAST_RUNS, min(MOST_RUNS, int(seconds / max(once, 1e-6))))
        for _ in range(runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    whole = [event["dur"] / 1000 for event in events if event["name"] == "model_run"]
    makers = _makers(onnx.load_model_from_string(content).graph)
    return Profile(_layers(events, makers), median(whole[WARM_UP:]))


def _makers(graph: Any) -> dict[str, str]:
    """The node behind each value, by name; of a value that a product ends in, the product.

    ONNX Runtime calls a product in its own layout after the value it makes, with what was fused.
    """
    nodes = {value: node for node in graph.node for value in node.output}
    makers = {}
    for value, node in nodes.items():
        source = node
        for _ in range(FUSED_BEHIND):
            if _PRODUCT.search(source.op_type):
                break
            source = next((nodes[name] for name in source.input if name in nodes), source)
        makers[value] = source.name if _PRODUCT.search(source.op_type) else node.name
    return makers


def _layers(events: list[dict[str, Any]], makers: dict[str, str]) -> tuple[LayerTime, ...]:
    """One layer for each node, in the order it first runs."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            runs.setdefault(str(event["args"]["node_index"]), []).append(event)
    layers = []
    for found in runs.values():
        first = found[0]
        kind = str(first["args"]["op_name"])
        name = _FUSED.sub("", str(first["name"]).removesuffix(_KERNEL))
        name = makers.get(name, name)
        # What a fusion adds itself, such as a Transpose, has a name of its own.
        sites = () if name == kind else modules_of([name])
        types = [next(iter(one)) for one in first["args"].get("input_type_shape", []) if one]
        entering = types[0] if types else "unknown"
        if _PRODUCT.search(kind):
            group = INTEGER if _INTEGER_PRODUCT.search(kind) else FLOAT
        elif kind in _CONVERT:
            group = CONVERT
        else:
            group = ELEMENTWISE if _ELEMENTWISE.search(kind) else OTHER
        ms = median(event["dur"] / 1000 for event in found[WARM_UP:])
        precision = _TYPES.get(entering, entering)
        layers.append(LayerTime(name, kind, sites, precision, group, ms))
    return tuple(layers)
