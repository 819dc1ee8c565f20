"""Which precision every layer really runs in, read from what a runtime compiled.

A plan says what should be multiplied as integers. Whether it is, only the compiled model tells: a
runtime falls back to float silently wherever it has no kernel or did not recognise a pattern.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_compress.quantize.openvino_library import openvino_core

INTEGERS = frozenset({"u8", "i8", "u4", "i4"})
_PRODUCTS = frozenset({"Convolution", "FullyConnected", "MatMul"})
_MOVING = frozenset(
    {"Convert", "Subtract", "Multiply", "Reshape", "Transpose", "Slice", "StridedSlice", "Concat"}
    | {"VariadicSplit", "Split", "Unsqueeze", "Squeeze"}
)


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
    """Every product of a compiled OpenVINO model, in order."""
    return [
        _layer(operation)
        for operation in compiled.get_runtime_model().get_ordered_ops()
        if about(operation, "layerType") in _PRODUCTS
    ]


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


def _layer(operation: Any) -> ExecutedLayer:
    kind = about(operation, "layerType")
    macs = _macs(operation, kind != "Convolution")
    precision = about(operation, "runtimePrecision")
    if kind == "FullyConnected" and precision in INTEGERS:
        # Here the runtime precision is that of the weights, which may be expanded to float.
        precision = str(operation.input(0).get_element_type().to_string())
    return ExecutedLayer(
        name=operation.get_friendly_name(),
        origin=tuple(about(operation, "originalLayersNames").split(",")),
        precision=precision,
        kernel=about(operation, "primitiveType"),
        macs=macs,
    )


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
