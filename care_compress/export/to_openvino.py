"""What OpenVINO gets beside the graph of every runtime: one rearrangement, and its own format."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from care_compress.export.result import About
from care_compress.export.to_onnx import (
    BIAS,
    add_constant,
    add_node,
    constant,
    drop_unread,
    maker_of,
    product_nodes,
)
from care_compress.libraries import load_openvino, openvino_core, silent
from care_compress.quantize.nncf_ptq import save_openvino

SCALED = "/scaled"
_WEIGHT = 1


def scale_branches(model: ir.Model) -> None:
    """Move gamma into the second 1x1 of every block, in place.

    A block adds gamma (everything + fc2(x)) to its input. Between two additions of integer
    products OpenVINO rearranges the multiplication: it keeps the sum twice, once scaled back, and
    reads both. With gamma in fc2 one multiplication by a constant is left on the float side, and
    one sum (up to 1.03 times as fast for CARE-S0). The integers stay what they are; their scales
    take gamma, and a negative gamma the sign of the weights. Over the reals it is the same
    network.

    What fc2 gives out is then no longer what the simulation calls so: the two nodes get a suffix,
    and whoever compares layer by layer leaves them out.
    """
    graph = model.graph
    nodes = product_nodes(graph)
    gammas = {node.name: node for node in graph if node.op_type == "Mul"}
    for name, add in nodes.items():
        block = name.removesuffix(".inter_layer.inter2_add")
        fc2, scaling = nodes.get(f"{block}.inter_layer.inter2_fc2"), gammas.get(f"{block}/Mul")
        if block == name or fc2 is None or scaling is None or not _follows(add, fc2, scaling):
            continue
        gamma = constant(scaling.inputs[1]).reshape(-1)
        _scale_weight(graph, fc2, gamma)
        bias = constant(fc2.inputs[BIAS]) * gamma
        fc2.replace_input_with(BIAS, add_constant(graph, f"{fc2.name}.bias{SCALED}", bias))
        # The multiplication goes from the sum to the other one of its parts.
        place, out = 1 - list(add.inputs).index(fc2.outputs[0]), scaling.outputs[0]
        rest = add_node(
            add,
            "Mul",
            [add.inputs[place], scaling.inputs[1]],
            f"{scaling.name}{SCALED}",
            [f"{out.name}_{SCALED[1:]}"],
            like=out,
        )
        add.replace_input_with(place, rest.outputs[0])
        ir.convenience.replace_all_uses_with(out, add.outputs[0])
        graph.remove(scaling, safe=True)
        for node in (fc2, add):
            node.name = f"{node.name}{SCALED}"
    drop_unread(graph)


def _follows(add: ir.Node, fc2: ir.Node, scaling: ir.Node) -> bool:
    """Whether nothing, such as a quantizer, stands between the three, and no one else looks."""
    sums, ends = add.outputs[0], fc2.outputs[0]
    stored = maker_of(fc2.inputs[_WEIGHT])
    return (
        ends in add.inputs
        and sums is scaling.inputs[0]
        and len(ends.uses()) == len(sums.uses()) == 1
        and (stored is None or "block_size" not in stored.attributes)
    )


def _scale_weight(graph: ir.Graph, fc2: ir.Node, gamma: NDArray[Any]) -> None:
    """Multiply each output channel by its gamma: of floats, or of the scales of integers."""
    value = fc2.inputs[_WEIGHT]
    stored = maker_of(value)
    if stored is None:
        weight = constant(value) * gamma[:, None, None, None]
        assert value is not None
        fc2.replace_input_with(_WEIGHT, add_constant(graph, f"{value.name}{SCALED}", weight))
        return
    integers, scale, zero = (constant(operand) for operand in stored.inputs)
    signs = np.where(gamma < 0, -1, 1).astype(integers.dtype)
    scales = (np.abs(gamma) * scale).astype(scale.dtype)
    zeros = np.zeros(gamma.shape, zero.dtype)
    for place, number in enumerate((integers * signs[:, None, None, None], scales, zeros)):
        made = add_constant(graph, f"{fc2.name}.weight_{place}{SCALED}", number)
        stored.replace_input_with(place, made)
    stored.attributes["axis"] = ir.AttrInt64("axis", 0)


def write_ir(source: Path, about: About, path: Path, half: bool, bytes_in: bool = False) -> None:
    """Write an ``.onnx`` or ``.xml`` file as `path` and a ``.bin`` beside it.

    `half` stores what is not quantized as float16, for devices that compute in it. `bytes_in` puts
    a normalization of bytes in front of a model that takes floats.
    """
    openvino = load_openvino()
    with silent():
        convert = openvino_core().read_model if source.suffix == ".xml" else openvino.convert_model
        model = convert(source)
    if bytes_in:
        prepare = openvino.preprocess.PrePostProcessor(model)
        given = prepare.input()
        given.tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NHWC"))
        given.model().set_layout(openvino.Layout("NCHW"))
        mean, std = about.preprocessing.mean, about.preprocessing.std
        steps = given.preprocess().convert_element_type(openvino.Type.f32)
        steps.mean([255 * one for one in mean]).scale([255 * one for one in std])
        model = prepare.build()
    model.set_friendly_name("care")
    # OpenVINO counts the names it makes up through the whole process, and a model converted twice
    # would be two files: they are numbered in the order of this model.
    for place, operation in enumerate(model.get_ordered_ops()):
        if made_up := re.fullmatch(r"([A-Z][A-Za-z]*)_\d+", operation.get_friendly_name()):
            operation.set_friendly_name(f"{made_up[1]}_{place}")
    for key, value in about.as_texts().items():
        model.set_rt_info(value, key.split("."))
    # Where a CPU has dot products, OpenVINO would round a float input of 8-bit weights to 8 bits
    # itself: other answers than elsewhere, and than were simulated.
    model.set_rt_info("0", ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    save_openvino(model, path, half)
