"""The scale of a residual branch, moved into the weights that end the branch.

A block adds gamma (everything + fc2(x)) to its input. Between two additions of integer products
OpenVINO rearranges the multiplication: it keeps the sum twice, once scaled back, and reads both.
With gamma in fc2 one multiplication by a constant is left on the float side, and one sum (up to
1.03 times as fast for CARE-S0). The integers stay what they are; their scales take gamma, and a
negative gamma the sign of the weights. Over the reals it is the same network.

What fc2 gives out is then no longer what the simulation calls so: the two nodes get a suffix, and
whoever compares layer by layer leaves them out.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from care_compress.export.float_graph import add_constant, constant, drop_unread, product_nodes

SCALED = "/scaled"
_WEIGHT, _BIAS = 1, 2


def scale_branches(model: ir.Model) -> None:
    """Move gamma into the second 1x1 of every block, in place."""
    nodes = product_nodes(model.graph)
    gammas = {node.name: node for node in model.graph if node.op_type == "Mul"}
    for name, add in nodes.items():
        block = name.removesuffix(".inter_layer.inter2_add")
        fc2, scaling = nodes.get(f"{block}.inter_layer.inter2_fc2"), gammas.get(f"{block}/Mul")
        if block == name or fc2 is None or scaling is None or not _follows(add, fc2, scaling):
            continue
        gamma = constant(scaling.inputs[1]).reshape(-1)
        _scale_weight(model.graph, fc2, gamma)
        bias = constant(fc2.inputs[_BIAS]) * gamma
        fc2.replace_input_with(_BIAS, add_constant(model.graph, f"{fc2.name}.bias{SCALED}", bias))
        _scale_the_rest(model.graph, add, fc2, scaling)
        for node in (fc2, add):
            node.name = f"{node.name}{SCALED}"
    drop_unread(model.graph)


def _follows(add: ir.Node, fc2: ir.Node, scaling: ir.Node) -> bool:
    """Whether nothing, such as a quantizer, stands between the three, and no one else looks."""
    sums, ends = add.outputs[0], fc2.outputs[0]
    weight = fc2.inputs[_WEIGHT]
    stored = None if weight is None else weight.producer()
    return (
        ends in add.inputs
        and sums is scaling.inputs[0]
        and len(ends.uses()) == len(sums.uses()) == 1
        and (stored is None or "block_size" not in stored.attributes)
    )


def _scale_weight(graph: ir.Graph, fc2: ir.Node, gamma: NDArray[Any]) -> None:
    """gamma_o times each output channel: of floats, or of the scales of integers."""
    value = fc2.inputs[_WEIGHT]
    assert value is not None
    stored = value.producer()
    if stored is None:
        weight = constant(value) * gamma[:, None, None, None]
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


def _scale_the_rest(graph: ir.Graph, add: ir.Node, fc2: ir.Node, scaling: ir.Node) -> None:
    """The multiplication goes from the sum to the other one of its parts."""
    place = 1 - list(add.inputs).index(fc2.outputs[0])
    node = ir.node("Mul", [add.inputs[place], scaling.inputs[1]], name=f"{scaling.name}{SCALED}")
    rest, out = node.outputs[0], scaling.outputs[0]
    rest.name, rest.shape, rest.type = f"{out.name}_{SCALED[1:]}", out.shape, out.type
    graph.insert_before(add, node)
    add.replace_input_with(place, rest)
    ir.convenience.replace_all_uses_with(out, add.outputs[0])
    graph.remove(scaling, safe=True)
