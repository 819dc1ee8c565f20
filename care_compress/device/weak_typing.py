"""What binds TensorRT to the graph's types where a network cannot be strongly typed.

There the FP16 flag permits half precision for every layer, those that the graph types as float32
included: exp of the attention core would flush to zero and its sums overflow. So each of these is
told its precision and the type of its outputs, and the builder to obey.
"""

from typing import Any

from care_compress.device.library import Library

WARNING = (
    "TensorRT {version} takes the graph's types as permission, not as an order. {held} layers are"
    " held in float32 by constraints; see the layer table for what it chose."
)
# What has no arithmetic of its own, or says its type itself.
_TYPED_BY_THEMSELVES = ("CONSTANT", "CAST", "QUANTIZE", "DEQUANTIZE", "SHAPE")


def hold_float32(library: Library, network: Any) -> int:
    """Constrain every layer whose outputs the graph types as float32; how many there are."""
    float32, held = library.module.float32, 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        outputs = [layer.get_output(which) for which in range(layer.num_outputs)]
        if layer.type.name in _TYPED_BY_THEMSELVES:
            continue
        if not all(output.dtype.name == "FLOAT" for output in outputs):
            continue
        layer.precision = float32
        for which in range(layer.num_outputs):
            layer.set_output_type(which, float32)
        held += 1
    return held
