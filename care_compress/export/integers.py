"""Putting the plan into an ONNX graph: integers and scales for weights, Q/DQ pairs for activations.

Every planned tensor gets a pair of its own, with scale and zero point of the simulation's
quantizer, and every DequantizeLinear has one reader: a runtime fuses a pair into the operation
behind it only where nobody else looks at it.
"""

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from care_compress.export.float_graph import add_constant, drop_unread, product_nodes
from care_compress.quantize.fakequant import IntQuantizer
from care_compress.quantize.placement import ROOT, QuantizedCare

OPERANDS = {"input": 0, "weight": 1, "left": 0, "right": 1}
BIAS = 2
FOUR_BIT_OPSET = 21


def put_integers(model: ir.Model, quantized: QuantizedCare) -> None:
    """Quantize the graph of the same network in place."""
    nodes = product_nodes(model.graph)
    for quantizer in quantized.integers():
        node = nodes[quantizer.site]
        if quantizer.operand == "weight":
            _store_weight(model, node, quantizer, quantized)
            _store_bias(model.graph, node, quantizer.site, quantized)
        elif node.op_type == "MatMul":
            _quantize_factor(model.graph, node, quantizer)
        else:
            _quantize_edge(model.graph, node, quantizer)
    drop_unread(model.graph)


def _store_weight(
    model: ir.Model, node: ir.Node, quantizer: IntQuantizer, quantized: QuantizedCare
) -> None:
    """Replace a float weight by its integers and a DequantizeLinear."""
    spec, place = quantizer.spec, OPERANDS["weight"]
    before = node.inputs[place]
    assert before is not None and before.name is not None
    weight = quantized.weight(quantizer.site).detach()
    scale, _ = quantizer.calculate_qparams()
    attributes: dict[str, int] = {"axis": spec.axis}
    if spec.granularity == "group":
        assert spec.group is not None
        # Groups follow one another along the input channels, the axis of blocks.
        scale = scale.reshape(weight.shape[0], -1, *weight.shape[2:])
        per_weight = scale.repeat_interleave(spec.group, dim=1)
        attributes = {"axis": 1, "block_size": spec.group}
    elif spec.granularity == "channel":
        per_weight = scale.reshape(-1, *[1] * (weight.dim() - 1))
    else:
        per_weight = scale
    integers = (quantizer(weight) / per_weight).round().to(torch.int8).numpy()
    kind = ir.DataType.INT8
    if spec.bits == 4:
        kind = ir.DataType.INT4
        model.opset_imports[""] = max(model.opset_imports[""], FOUR_BIT_OPSET)
    stored = add_constant(model.graph, before.name, _narrowed(integers, kind))
    pair = _Pair(model.graph, quantizer, scale, attributes, kind)
    node.replace_input_with(place, pair.dequantized(stored, node))


def _store_bias(graph: ir.Graph, node: ir.Node, site: str, quantized: QuantizedCare) -> None:
    """The bias of this target's model: it is rounded to the steps of the integer sums."""
    value = node.inputs[BIAS] if len(node.inputs) > BIAS else None
    if value is not None:
        bias = quantized.graph.get_parameter(f"{ROOT}.{site}.bias").detach().numpy()
        node.replace_input_with(BIAS, add_constant(graph, _new_name(graph, "b"), bias))


def _quantize_edge(graph: ir.Graph, node: ir.Node, quantizer: IntQuantizer) -> None:
    """A pair on one input of one node."""
    place = OPERANDS[quantizer.operand]
    value = node.inputs[place]
    assert value is not None
    pair = _Pair.of_activation(graph, quantizer)
    integers = pair.quantized(value, node)
    node.replace_input_with(place, pair.dequantized(integers, node))


def _quantize_factor(graph: ir.Graph, node: ir.Node, quantizer: IntQuantizer) -> None:
    """A pair where a factor is made, so that every reader sees the same integers."""
    value = node.inputs[OPERANDS[quantizer.operand]]
    assert value is not None
    while (maker := value.producer()) is not None and maker.op_type == "Transpose":
        value = maker.inputs[0]
        assert value is not None
    readers = sorted(value.uses(), key=lambda use: (use.node.name or "", use.idx))
    first = next(n for n in graph if any(use.node is n for use in readers))
    pair = _Pair.of_activation(graph, quantizer)
    integers = pair.quantized(value, first)
    for use in readers:
        use.node.replace_input_with(use.idx, pair.dequantized(integers, use.node))


class _Pair:
    """The scale and zero point of one quantizer, and the nodes that use them."""

    def __init__(
        self,
        graph: ir.Graph,
        quantizer: IntQuantizer,
        scale: torch.Tensor,
        attributes: dict[str, int],
        kind: ir.DataType,
    ) -> None:
        self.graph = graph
        self.name = f"{quantizer.site}/{quantizer.operand}"
        self.attributes = attributes
        whole = quantizer.spec.granularity == "tensor"
        _, zero_point = quantizer.calculate_qparams()
        zeros = zero_point.numpy().astype(np.uint8 if kind == ir.DataType.UINT8 else np.int8)
        scales = scale.numpy()
        if quantizer.spec.granularity == "group":
            zeros = zeros.reshape(scales.shape)
        if whole:
            scales, zeros = scales.reshape(()), zeros.reshape(())
            self.attributes = {}
        self.scale = add_constant(graph, _new_name(graph, "s"), scales)
        # Most zero points are arrays of zeros: one of each length serves all.
        shape = "x".join(str(size) for size in zeros.shape)
        name = _new_name(graph, "z") if zeros.any() else f"zero_{kind.name}_{shape}"
        found = graph.initializers.get(name)
        self.zero_point = found or add_constant(graph, name, _narrowed(zeros, kind))

    @classmethod
    def of_activation(cls, graph: ir.Graph, quantizer: IntQuantizer) -> "_Pair":
        """For an activation: 8 bits, per tensor or per index of one axis."""
        scale, _ = quantizer.calculate_qparams()
        kind = ir.DataType.INT8 if quantizer.spec.symmetric else ir.DataType.UINT8
        return cls(graph, quantizer, scale, {"axis": quantizer.spec.axis}, kind)

    def quantized(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """Integers of a float value, made just before a node."""
        return self._node("QuantizeLinear", value, before, f"{self.name}_q")

    def dequantized(self, value: ir.Value, before: ir.Node) -> ir.Value:
        """Floats of integers, for one reader."""
        readers = len(value.uses())
        again = f"{readers + 1}" if readers else ""
        return self._node("DequantizeLinear", value, before, f"{self.name}_dq{again}")

    def _node(self, kind: str, value: ir.Value, before: ir.Node, name: str) -> ir.Value:
        node = ir.node(
            kind,
            inputs=[value, self.scale, self.zero_point],
            attributes=self.attributes or None,
            name=name,
        )
        node.outputs[0].name = f"q{len(self.graph)}"  # grows with every node
        self.graph.insert_before(before, node)
        return node.outputs[0]


def _new_name(graph: ir.Graph, kind: str) -> str:
    """Short, because a file repeats names often."""
    return f"{kind}{len(graph.initializers)}"


def _narrowed(integers: NDArray[np.generic], kind: ir.DataType) -> NDArray[np.generic]:
    return integers.astype(ml_dtypes.int4) if kind == ir.DataType.INT4 else integers
