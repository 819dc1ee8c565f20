"""Layers and times of an OpenVINO model, from its performance counters."""

import re
import time
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from care_compress.runtime.executed import INTEGERS, about, executed_layers
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

WARM_UP = 3
GROWTH = (1, 3, 9)  # of the blocks of runs
HALF_TICK_MS = 0.0005  # counters are whole microseconds, cut off
_PRODUCTS = frozenset({"Convolution", "FullyConnected", "MatMul"})
_CONVERT = frozenset({"Reorder", "Convert", "Transpose", "FakeQuantize"})
_ELEMENTWISE = frozenset({"Subgraph", "Eltwise", "Math", "Softmax", "SoftMax", "MVN"})
# What OpenVINO calls the operations that it made itself.
_MADE = re.compile(r"[A-Z][A-Za-z]*_\d+(/.*)?$")


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
        for _ in range(unit * growth):
            began = time.perf_counter()
            request()
            walls.append(1000 * (time.perf_counter() - began))
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
        kind = "" if operation is None else about(operation, "layerType")
        origin = "" if operation is None else about(operation, "originalLayersNames")
        entering = "" if operation is None else about(operation, "runtimePrecision")
        leaving = "" if operation is None else about(operation, "outputPrecisions")
        if name in products:
            entering = products[name].precision
        own = [one for one in origin.split(",") if not _MADE.match(one)]
        group = _group(kind, entering, leaving)
        layers.append(LayerTime(name, kind, modules_of(own), entering, group, median(times)))
    return tuple(layers)


def _group(kind: str, entering: str, leaving: str) -> str:
    """Which sum a layer belongs to; an element-wise one that ends in integers is a quantize."""
    if kind in _PRODUCTS:
        return INTEGER if entering in INTEGERS else FLOAT
    quantizes = leaving in INTEGERS and entering not in INTEGERS
    if kind in _CONVERT or (kind in _ELEMENTWISE and quantizes):
        return CONVERT
    return ELEMENTWISE if kind in _ELEMENTWISE else OTHER
