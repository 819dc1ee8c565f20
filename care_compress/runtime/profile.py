"""Where a file spends its time, layer by layer: ``care-compress layers FILE``.

A runtime fuses, reorders and converts; what it runs are not the operations of the file. Settings
are those that ``compare`` times with, so that a layer's time is part of the latency beside it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from care_compress.device.enginefile import origin_path
from care_compress.errors import TargetError
from care_compress.files import read_json
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
from care_compress.runtime.profile_onnxruntime import profile_onnxruntime
from care_compress.runtime.profile_openvino import profile_openvino

SECONDS = 0.5  # of runs that are timed

# As TensorRT's inspector, its network and its listing of kernels name them.
_PRODUCTS = ("CONV", "GEMM", "MATRIX_MULTIPLY", "MATMUL", "CORRELATION", "RUNTIME_FUSION")
_CONVERT = ("REFORMAT", "QUANTIZE", "CAST", "SHUFFLE", "REORDER")
_ELEMENTWISE = ("ELEMENTWISE", "POINTWISE", "ACTIVATION", "UNARY", "NORMALIZATION", "SCALE", "KGEN")


def profile_layers(
    path: Path,
    images_BCHW: Tensor,
    threads: int = 1,
    precision: str = "f32",
    device: str = "CPU",
    seconds: float = SECONDS,
) -> Profile:
    """Every layer of any ``.onnx`` or ``.xml`` file with one image input, as it is executed.

    `precision` is what OpenVINO may round floats to; ONNX Runtime has no such choice.
    """
    try:
        if path.suffix == ".xml":
            return profile_openvino(path, images_BCHW, threads, precision, device, seconds)
        return profile_onnxruntime(path, images_BCHW, threads, seconds)
    except TargetError:
        raise
    except Exception as error:  # each runtime has classes of its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise TargetError(
            f"{path.name} cannot be profiled on images of {list(images_BCHW.shape)}: "
            f"{(lines or [repr(error)])[-1][:200]}.",
            "give the resolution it was exported for (--res), or export it again",
        ) from error


def read_engine_profile(path: Path) -> Profile:
    """An engine's layers in their precisions, from the description beside it; no times.

    Nothing of an engine is timed by layer without its GPU. Arithmetic on shapes is left out.
    """
    about = origin_path(path)
    try:
        told = read_json(about)
        return replace(profile_of_rows(told["layers"]), traffic=told.get("traffic"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(
            f"{about}, which tells the layers of {path.name}, cannot be read: {error!r}.",
            "keep the files of an export together, or build the engine again",
        ) from error


def profile_of_rows(rows: Iterable[Mapping[str, Any]]) -> Profile:
    """Group the layers of an engine; with times where a device's profiler took them."""
    layers = []
    for layer in rows:
        precision = str(layer["precision"])
        if precision in ("INT32", "INT64", "BOOL"):
            continue
        kind, words, group = str(layer["type"]), str(layer["type"]).upper(), OTHER
        if any(word in words for word in _PRODUCTS):
            group = INTEGER if precision in ("INT8", "INT4") else FLOAT
        elif any(word in words for word in _CONVERT):
            group = CONVERT
        elif any(word in words for word in _ELEMENTWISE):
            group = ELEMENTWISE
        name, sites = str(layer["name"]), modules_of(layer["origin"])
        layers.append(LayerTime(name, kind, sites, precision, group, layer.get("ms")))
    return Profile(tuple(layers), None)
