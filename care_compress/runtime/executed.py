"""Which precision every layer really runs in, read from what a runtime compiled.

A plan says what should be multiplied as integers. Whether it is, only the compiled model tells: a
runtime falls back to float silently wherever it has no kernel or did not recognise a pattern.
"""

import math
from dataclasses import dataclass
from typing import Any

INTEGERS = frozenset({"u8", "i8", "u4", "i4"})
_PRODUCTS = frozenset({"Convolution", "FullyConnected", "MatMul"})


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
        if _about(operation, "layerType") in _PRODUCTS
    ]


def integer_macs(layers: list[ExecutedLayer]) -> int:
    """MACs that run in integers."""
    return sum(layer.macs for layer in layers if layer.in_integers)


def _layer(operation: Any) -> ExecutedLayer:
    left, right = (_shape(operation.input(place)) for place in (0, 1))
    out = _shape(operation.output(0))
    kind = _about(operation, "layerType")
    if kind == "Convolution":
        # (O, I/g, k, k), or (g, O/g, I/g, k, k): each output value takes what one channel holds.
        channels = out[1]
        macs = math.prod(out[1:]) * math.prod(right) // channels
    else:
        macs = math.prod(out[1:]) * left[-1]
    precision = _about(operation, "runtimePrecision")
    if kind == "FullyConnected" and precision in INTEGERS:
        # Here the runtime precision is that of the weights, which may be expanded to float.
        precision = str(operation.input(0).get_element_type().to_string())
    return ExecutedLayer(
        name=operation.get_friendly_name(),
        origin=tuple(_about(operation, "originalLayersNames").split(",")),
        precision=precision,
        kernel=_about(operation, "primitiveType"),
        macs=macs,
    )


def _about(operation: Any, key: str) -> str:
    info = operation.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def _shape(port: Any) -> list[int]:
    """Sizes; a free one, the batch, counts as one image."""
    return [1 if size.is_dynamic else int(size.get_length()) for size in port.get_partial_shape()]
