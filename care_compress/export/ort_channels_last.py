"""Wide stages with channels last, as ONNX Runtime's integer products want them.

Between two products stand additions, joins and slices. ONNX Runtime leaves them channels first and
transposes around every product, on one thread. With channels last only the window convolutions
transpose, and those do so while they reorder for their own kernels anyway.

What it costs: shift and scale of a channel are then read anew for every position, which in a narrow
stage takes longer than the transposes did (docs/PERFORMANCE.md).

A site that gives out channels last only has a suffix to its name, and whoever compares layer by
layer turns it. A transpose that nobody reads would be run all the same.
"""

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from care_compress.evaluate.site_outputs import TURNED
from care_compress.export.ort_products import CHANNELS_FIRST, CHANNELS_LAST
from care_compress.export.to_onnx import (
    add_constant,
    add_node,
    constant,
    drop_unread,
    is_image,
    maker_of,
    module_of,
)

NARROW = 64  # channels of a stage whose transposes stay
_PER_CHANNEL = frozenset({"Add", "Mul"})
_CHANNELS = 1  # their axis, where they come first
_AXES = 3  # of a Slice: the input that says along what


def put_channels_last(model: ir.Model) -> None:
    """Turn every wide stage with integer products whose additions and attention are in float."""
    turned = _Turned(model.graph)
    between: dict[str, list[ir.Node]] = defaultdict(list)  # the products of each stage
    with_products: set[str] = set()
    for node in model.graph:
        scope, _, rest = module_of(node).partition(".")
        if scope != "stages":
            continue
        stage = rest.partition(".")[0]
        if node.op_type == "MatMulIntegerToFloat":
            with_products.add(stage)
        if is_image(node.outputs[0]) and _can_turn(node):
            between[stage].append(node)
    for stage, nodes in between.items():
        makers = [maker_of(value) for node in nodes for value in node.inputs]
        in_float = not any(m is not None and m.op_type == "DequantizeLinear" for m in makers)
        if stage in with_products and in_float and max(map(_channels, nodes)) > NARROW:
            for node in nodes:
                turned.turn(node)
    turned.tidy()
    drop_unread(model.graph)


def _can_turn(node: ir.Node) -> bool:
    if node.op_type == "Concat":
        return bool(node.attributes["axis"].as_int() == _CHANNELS)
    if node.op_type == "Slice":
        return list(constant(node.inputs[_AXES])) == [_CHANNELS]
    return node.op_type in _PER_CHANNEL


def _channels(node: ir.Node) -> int:
    shape = node.outputs[0].shape
    assert shape is not None
    channels = shape[_CHANNELS]
    assert isinstance(channels, int)
    return channels


class _Turned:
    """Values that are there with channels last, and the nodes that turn them."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.known: dict[ir.Value, ir.Value] = {}
        self.last_axis = add_constant(graph, "last_axis", np.array([3], np.int64))

    def turn(self, node: ir.Node) -> None:
        """Let a node compute with channels last; whoever wants them first gets them so."""
        for place, value in enumerate(node.inputs):
            if value is not None and is_image(value):
                node.replace_input_with(place, self._last(value, node))
            elif value is not None and node.op_type in _PER_CHANNEL and constant(value).ndim:
                flat = constant(value).reshape(-1)
                name = f"{value.name}_last"
                made = self.graph.initializers.get(name) or add_constant(self.graph, name, flat)
                node.replace_input_with(place, made)
        if node.op_type == "Concat":
            node.attributes["axis"] = ir.AttrInt64("axis", 3)
        if node.op_type == "Slice":
            node.replace_input_with(_AXES, self.last_axis)
        # The name goes to a node that gives out what this one gave.
        last = node.outputs[0]
        first = ir.node("Transpose", [last], {"perm": CHANNELS_FIRST}, name=node.name)
        node.name = f"{node.name}{TURNED}"
        given = first.outputs[0]
        given.name, given.shape, given.type = f"{last.name}_first", last.shape, last.type
        last.shape = None
        ir.convenience.replace_all_uses_with(last, given)
        first.replace_input_with(0, last)
        self.graph.insert_after(node, first)

    def _last(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """A value with channels last, made before its first reader if it is not there."""
        there = _before_turn(value) or self.known.get(value)
        if there is None:
            name, output = f"{value.name}{TURNED}", f"{value.name}_last"
            node = add_node(reader, "Transpose", [value], name, [output], {"perm": CHANNELS_LAST})
            there = self.known[value] = node.outputs[0]
            there.type = value.type
        return there

    def tidy(self) -> None:
        """Drop the transposes that meet another, and those that nobody reads any more."""
        for node in list(self.graph):
            last = _before_turn(node.inputs[0]) if _turns(node, CHANNELS_LAST) else None
            if last is not None:
                ir.convenience.replace_all_uses_with(node.outputs[0], last)
                self.graph.remove(node, safe=True)
        for node in list(self.graph):
            image = node.outputs[0]
            unread = not image.uses() and not image.is_graph_output()
            if _turns(node, CHANNELS_FIRST) and unread:
                maker = maker_of(node.inputs[0])
                assert maker is not None
                maker.name = f"{node.name}{TURNED}"
                self.graph.remove(node, safe=True)


def _turns(node: ir.Node, order: list[int]) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == order


def _before_turn(value: ir.Value | None) -> ir.Value | None:
    """A value with channels last, if that is what it was made from."""
    maker = maker_of(value)
    return maker.inputs[0] if maker is not None and _turns(maker, CHANNELS_FIRST) else None
