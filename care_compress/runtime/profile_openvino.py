"""Layers and times of an OpenVINO model, from its performance counters."""

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from care_compress.libraries import openvino_core
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
from care_compress.runtime.runners import openvino_request

INTEGERS = frozenset({"u8", "i8", "u4", "i4"})
_PRODUCTS = frozenset({"Convolution", "FullyConnected", "MatMul"})
_MOVING = frozenset(
    {"Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Slice", "StridedSlice", "Concat"}
    | {"VariadicSplit", "Split", "Unsqueeze", "Squeeze"}
)

WARM_UP = 3
GROWTH = (1, 3, 9)  # of the blocks of runs
HALF_TICK_MS = 0.0005  # counters are whole microseconds, cut off
_CONVERT = frozenset({"Reorder", "Convert", "Transpose", "FakeQuantize"})
_ELEMENTWISE = frozenset({"Subgraph", "Eltwise", "Math", "Softmax", "SoftMax", "MVN"})
# What OpenVINO calls the operations that it made itself.
_MADE = re.compile(r"[A-Z][A-Za-z]*_\d+(/.*)?$")


@dataclass(frozen=True)
class ExecutedLayer:
    """One product of a compiled OpenVINO model."""

    name: str
    origin: tuple[str, ...]  # the operations of the file that were fused into it
    precision: str  # u8, i8, f32, bf16, f16
    kernel: str  # brgconv_avx512_I8
    macs: int  # of one image

    @property
    def in_integers(self) -> bool:
        """Both factors are integers; weights alone that are expanded first do not count."""
        return self.precision in INTEGERS


def executed_layers(compiled: Any) -> list[ExecutedLayer]:
    """Every product of a compiled OpenVINO model, in order, with the precision that it runs in.

    A plan says what should be multiplied as integers. Whether it is, only the compiled model tells:
    a runtime falls back to float silently wherever it has no kernel or did not recognise a pattern.
    """
    layers = []
    for operation in compiled.get_runtime_model().get_ordered_ops():
        kind = about(operation, "layerType")
        if kind not in _PRODUCTS:
            continue
        precision = about(operation, "runtimePrecision")
        if kind == "FullyConnected" and precision in INTEGERS:
            # Here the runtime precision is that of the weights, which may be expanded to float.
            precision = str(operation.input(0).get_element_type().to_string())
        layers.append(
            ExecutedLayer(
                name=operation.get_friendly_name(),
                origin=tuple(about(operation, "originalLayersNames").split(",")),
                precision=precision,
                kernel=about(operation, "primitiveType"),
                macs=_macs(operation, kind != "Convolution"),
            )
        )
    return layers


def integer_macs(layers: list[ExecutedLayer]) -> int:
    """MACs that run in integers."""
    return sum(layer.macs for layer in layers if layer.in_integers)


def quantized_macs(model: Path) -> int:
    """MACs that an IR file asks to run in integers: products whose factors are both quantized."""
    operations = openvino_core().read_model(model).get_ordered_ops()
    return sum(
        _macs(operation, operation.get_type_name() == "MatMul")
        for operation in operations
        if operation.get_type_name() in ("Convolution", "GroupConvolution", "MatMul")
        and all(_is_quantized(operation.input_value(place)) for place in (0, 1))
    )


def _is_quantized(output: Any) -> bool:
    """Whether a FakeQuantize or stored integers lie behind operations that only move values."""
    operation = output.get_node()
    kind = operation.get_type_name()
    if kind == "FakeQuantize":
        return True
    if kind == "Constant":
        return str(operation.get_element_type().to_string()) in INTEGERS
    moves = kind in _MOVING and operation.get_input_size() > 0
    return moves and _is_quantized(operation.input_value(0))


def _macs(operation: Any, matrices: bool) -> int:
    """Multiplications for one image."""
    left, right = (_shape(operation.input(place)) for place in (0, 1))
    out = _shape(operation.output(0))
    if matrices:
        return math.prod(out[1:]) * left[-1]
    # (O, I/g, k, k), or (g, O/g, I/g, k, k): each output value takes what one channel holds.
    return math.prod(out[1:]) * math.prod(right) // out[1]


def about(operation: Any, key: str) -> str:
    """What a compiled operation says of itself; empty where it does not."""
    info = operation.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def _shape(port: Any) -> list[int]:
    """Sizes; a free one, the batch, counts as one image."""
    return [1 if size.is_dynamic else int(size.get_length()) for size in port.get_partial_shape()]


def profile_openvino(
    path: Path, images: Tensor, threads: int, precision: str, device: str, seconds: float
) -> Profile:
    """Times are medians of three blocks of runs after a warm-up.

    A counter is the mean of all runs so far, in whole microseconds: the mean of a block is a
    difference of two, and blocks grow so that cutting off costs no more in the last than the first.
    """
    request = openvino_request(path, images, threads, precision, device, profiled=True)
    for _ in range(WARM_UP):
        began = time.perf_counter()
        request()
        once = time.perf_counter() - began
    unit = max(2, min(20, int(seconds / max(once, 1e-6) / sum(GROWTH))))
    counted, runs, walls = _counters(request.request), WARM_UP, []
    blocks: dict[str, list[float]] = {name: [] for name in counted}
    for growth in GROWTH:
        # Of the same runs in the same way as the layers, which a busy machine stretches alike.
        began = time.perf_counter()
        for _ in range(unit * growth):
            request()
        walls.append(1000 * (time.perf_counter() - began) / (unit * growth))
        later, after = _counters(request.request), runs + unit * growth
        for name, before_ms in counted.items():
            mean = (later.get(name, 0.0) * after - before_ms * runs) / (after - runs)
            blocks[name].append(max(0.0, mean + HALF_TICK_MS))
        counted = {name: later.get(name, 0.0) for name in counted}
        runs = after
    return Profile(_layers(request, blocks), median(walls))


def _counters(request: Any) -> dict[str, float]:
    """Milliseconds of every layer that is executed; a mean under a microsecond is left out."""
    return {
        one.node_name: 1000 * one.real_time.total_seconds()
        for one in request.get_profiling_info()
        if one.status == type(one).EXECUTED
    }


def _layers(request: Any, blocks: dict[str, list[float]]) -> tuple[LayerTime, ...]:
    compiled = request.request.get_compiled_model()
    products = {layer.name: layer for layer in executed_layers(compiled)}
    operations = {
        operation.get_friendly_name(): operation
        for operation in compiled.get_runtime_model().get_ordered_ops()
    }
    layers = []
    for name, times in blocks.items():
        operation = operations.get(name)
        kind, origin, entering, leaving = (
            "" if operation is None else about(operation, key)
            for key in ("layerType", "originalLayersNames", "runtimePrecision", "outputPrecisions")
        )
        if name in products:
            entering = products[name].precision
        quantizes = leaving in INTEGERS and entering not in INTEGERS
        if kind in _PRODUCTS:
            group = INTEGER if entering in INTEGERS else FLOAT
        elif kind in _CONVERT or (kind in _ELEMENTWISE and quantizes):
            group = CONVERT
        else:
            group = ELEMENTWISE if kind in _ELEMENTWISE else OTHER
        sites = modules_of(one for one in origin.split(",") if not _MADE.match(one))
        layers.append(LayerTime(name, kind, sites, entering, group, median(times)))
    return tuple(layers)
