"""Which layer runs in which precision: the table a user compares with the plan.

`parse_inspector` tells what the built engine executes (the engine has to be loadable for that, so
there is a GPU). `network_layers` tells what the graph asks for, anywhere.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# As they stand in sentences like "Row major linear FP16 format", "Half" or "kINT8", longest first.
_TYPE_WORDS = {
    "BF16": "BF16",
    "BFLOAT16": "BF16",
    "FP16": "FP16",
    "HALF": "FP16",
    "FP32": "FP32",
    "FLOAT": "FP32",
    "FP8": "FP8",
    "FP4": "FP4",
    "INT8": "INT8",
    "INT4": "INT4",
    "INT32": "INT32",
    "INT64": "INT64",
    "BOOL": "BOOL",
    "UINT8": "UINT8",
}
_TYPE_PATTERN = re.compile(rf"\bk?({'|'.join(_TYPE_WORDS)})\b", re.IGNORECASE)
NODES = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
MULTIPLYING = ("CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY")
# Between a DequantizeLinear and the MatMul that uses it there may stand a Transpose.
_MOVING = ("SHUFFLE",)


@dataclass(frozen=True)
class LayerRow:
    """One layer: what it multiplies in (`precision`), what it gives out, which nodes are in it."""

    name: str
    type: str
    precision: str
    output: str
    origin: tuple[str, ...]


def parse_inspector(text: str) -> tuple[LayerRow, ...]:
    """Rows of the engine inspector's JSON, of TensorRT 10 or 11.

    10 writes one `Format/Datatype` for each tensor, 11 writes `Format` and `Datatype`. An engine
    built without DETAILED verbosity has names only. An engine of several profiles repeats its
    layers with ``[profile 1]``; the first profile stands for all.
    """
    rows = []
    for layer in json.loads(text).get("Layers", []):
        fields = {"Name": layer} if isinstance(layer, str) else layer
        name = str(fields.get("Name", ""))
        if re.search(r"\[profile [1-9]\d*\]", name):
            continue
        inputs, outputs = (_data_types(fields.get(key, [])) for key in ("Inputs", "Outputs"))
        nodes = NODES.findall(str(fields.get("Metadata", "")))
        rows.append(
            LayerRow(
                name=name,
                type=str(fields.get("LayerType", "unknown")),
                # Activations and weights meet in the first input's type; constants have no input.
                precision=(inputs or outputs or ["unknown"])[0],
                output=(outputs or ["unknown"])[0],
                # Fused layers without metadata are called ``a + b``.
                origin=tuple(dict.fromkeys(nodes)) or tuple(map(str.strip, name.split(" + "))),
            )
        )
    return tuple(rows)


def _data_types(tensors: Any) -> list[str]:
    found = []
    for tensor in tensors if isinstance(tensors, list) else []:
        fields = tensor if isinstance(tensor, dict) else {}
        for key in ("Datatype", "DataType", "Format/Datatype"):
            if key in fields:
                found.append(type_in(str(fields[key])))
                break
    return found


def type_in(text: str) -> str:
    """The type that a text of TensorRT's names."""
    match = _TYPE_PATTERN.search(text)
    return _TYPE_WORDS[match[1].upper()] if match else "unknown"


def network_layers(network: Any) -> tuple[LayerRow, ...]:
    """The layers of a parsed network, constants left out.

    A convolution or matrix product whose two inputs are both dequantized is one TensorRT runs on
    what they were, so its precision is INT8 or FP8 although its tensors are wider floats.
    """
    makers: dict[str, Any] = {}
    rows = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for output in range(layer.num_outputs):
            makers[layer.get_output(output).name] = layer
        if layer.type.name == "CONSTANT":
            continue
        output_type = type_in(layer.get_output(0).dtype.name)
        stored = {
            _dequantized_from(layer.get_input(which), makers) if which < layer.num_inputs else None
            for which in (0, 1)
        }
        both = stored.pop() if layer.type.name in MULTIPLYING and len(stored) == 1 else None
        nodes = NODES.findall(str(getattr(layer, "metadata", "") or ""))
        rows.append(
            LayerRow(
                name=layer.name,
                type=layer.type.name,
                precision=both or output_type,
                output=output_type,
                origin=tuple(nodes) or (layer.name,),
            )
        )
    return tuple(rows)


def _dequantized_from(tensor: Any, makers: Mapping[str, Any]) -> str | None:
    """The type that a tensor was dequantized from; None if it was not."""
    while tensor is not None and tensor.name in makers:
        maker = makers[tensor.name]
        if maker.type.name == "DEQUANTIZE":
            return type_in(maker.get_input(0).dtype.name)
        if maker.type.name not in _MOVING:
            return None
        tensor = maker.get_input(0)
    return None
