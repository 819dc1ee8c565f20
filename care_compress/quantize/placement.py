"""Putting the plan into the graph: torchao PT2E with a `Quantizer` of our own.

`simulate` exports a `CompactCare` and lets torchao insert our quantizers where the plan says.
The result computes with simulated integers and can be trained; `care_compress.export` writes the
real ones.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    Quantizer,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from care_compress.errors import DataError
from care_compress.libraries import quiet
from care_compress.model.care import Widths
from care_compress.model.compact import CompactCare
from care_compress.model.structure import Latest, structure_of
from care_compress.quantize.fakequant import IntQuantizer, TensorQuantizer, make_quantizer
from care_compress.quantize.spec import FLOAT, Decision, Plan, TensorSpec

ROOT = "network"  # the CompactCare inside the exported wrapper
PRODUCTS = (
    torch.ops.aten.conv2d.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.matmul.default,
    torch.ops.aten.add.Tensor,
)
_VIEWS = (torch.ops.aten.transpose.int,)
_ATTENTION = re.compile(r"\.token_mixer\.(qk|core)\b")
# Tracing takes seconds, so a late graph serves every network of the same structure.
_traces: Latest[GraphModule] = Latest(16)


class QuantizedCare(nn.Module):
    """A CARE whose planned tensors are quantized in simulation.

    In training mode it returns (logits, stage outputs), in eval mode the logits.
    """

    def __init__(
        self, graph: GraphModule, plan: Plan, made_from: "CompactCare | QuantizedCare"
    ) -> None:
        super().__init__()
        self.graph = graph
        self.plan = plan
        self.task: str = made_from.task
        self.arch: str = made_from.arch
        self.num_classes: int = made_from.num_classes
        self.widths: Widths = made_from.widths

    def forward(self, x_BCHW: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        """What the network answers."""
        size = self.plan.resolution
        if x_BCHW.shape[2:] != (size, size):
            raise DataError(
                f"this model was quantized at {size}x{size}, the images are "
                f"{x_BCHW.shape[2]}x{x_BCHW.shape[3]}.",
                f"set data.resolution to {size}, or quantize it again at the other size",
            )
        logits: Tensor
        logits, *features = self.graph(x_BCHW)
        return (logits, features) if self.training else logits

    def train(self, mode: bool = True) -> "QuantizedCare":
        """Only this module has modes: an exported graph is the same in both."""
        self.training = mode
        return self

    def quantizers(self) -> Iterator[TensorQuantizer]:
        """All quantizers, in the order of the graph."""
        return (module for module in self.graph.children() if isinstance(module, TensorQuantizer))

    def integers(self, operand: str | None = None) -> Iterator[IntQuantizer]:
        """The quantizers that have a scale; of weights only with ``operand="weight"``."""
        for quantizer in self.quantizers():
            if isinstance(quantizer, IntQuantizer) and operand in (None, quantizer.operand):
                yield quantizer

    def enable(self, on: bool) -> None:
        """Switch the whole simulation on or off; off, it is the float model."""
        for quantizer in self.quantizers():
            quantizer.enabled = on

    def guard_attention(self, on: bool) -> None:
        """Compute attention in float32 under autocast too, as the float model does.

        The exporter resolved that guard when there was no autocast, so it is not in the graph.
        """
        for node in self.graph.graph.nodes:
            if node.op != "call_function" or not _ATTENTION.search(site_of(node)):
                continue
            guarded = node.target is in_float32
            if on and not guarded:
                node.args, node.target = (node.target, *node.args), in_float32
            elif guarded and not on:
                node.target, *arguments = node.args
                node.args = tuple(arguments)
        self.graph.recompile()

    def weight(self, site: str) -> nn.Parameter:
        """The float weight of a site."""
        return self.graph.get_parameter(f"{ROOT}.{site}.weight")


def in_float32(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """The operation outside autocast, its floating point tensors widened."""
    devices = []

    def widened(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        devices.append(value.device.type)
        return value.float() if value.is_floating_point() else value

    args, kwargs = map_aggregate(args, widened), map_aggregate(kwargs, widened)
    with torch.autocast(devices[0], enabled=False):
        return operation(*args, **kwargs)


class _WithFeatures(nn.Module):
    """Returns the stage outputs beside the logits, for distillation."""

    def __init__(self, network: CompactCare) -> None:
        super().__init__()
        self.network = network

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, ...]:
        features = self.network.stage_outputs(x_BCHW)
        return (self.network.answer(features), *features)


class PlanQuantizer(Quantizer):
    """Annotates the exported graph with the plan's decisions, found by module name."""

    def __init__(self, plan: Plan) -> None:
        self.decisions = {decision.site.name: decision for decision in plan.decisions}
        self.placed: set[str] = set()

    def annotate(self, model: GraphModule) -> GraphModule:
        """Write each decision on the node that computes its site."""
        for node in list(model.graph.nodes):
            decision = self.decisions.get(site_of(node)) if node.target in PRODUCTS else None
            if decision is None:
                continue
            self.placed.add(decision.site.name)
            if node.target is torch.ops.aten.matmul.default:
                self._annotate_product(node, decision)
            else:
                self._annotate_inputs(node, decision)
        return model

    def validate(self, model: GraphModule) -> None:
        """Every site must have been found; a lost one would silently stay in float."""
        lost = set(self.decisions) - self.placed
        assert not lost, f"sites without a node: {sorted(lost)}"

    def _annotate_inputs(self, node: Node, decision: Decision) -> None:
        """Quantizers on the node's own input edges."""
        weighted = decision.weight is not None
        operands = ("input", "weight") if weighted else ("left", "right")
        specs = (decision.input, decision.weight if weighted else decision.input)
        qspecs = {}
        for argument, operand, spec in zip(node.args, operands, specs, strict=False):
            assert isinstance(argument, Node) and spec is not None
            if decision.site.prescaled and operand == "input":
                # The scale site has taken the scale of each channel already: one remains.
                spec = replace(spec, granularity="tensor")
            if spec != FLOAT:
                qspecs[argument] = _qspec(spec, decision.site.name, operand, argument)
        _annotate(node, QuantizationAnnotation(input_qspec_map=qspecs))

    def _annotate_product(self, node: Node, decision: Decision) -> None:
        """Quantizers where the factors are made, so that every reader sees the same integers."""
        if decision.input == FLOAT:
            return
        for argument, operand in zip(node.args, ("left", "right"), strict=True):
            assert isinstance(argument, Node)
            made = argument
            while made.target in _VIEWS:
                assert isinstance(made.args[0], Node)
                made = made.args[0]
            qspec = _qspec(decision.input, decision.site.name, operand, made)
            _annotate(made, QuantizationAnnotation(output_qspec=qspec))


def simulate(network: CompactCare, plan: Plan) -> QuantizedCare:
    """The network with the plan's quantizers in place, not calibrated yet; on the same device."""
    size = plan.resolution

    def trace() -> GraphModule:
        # On the CPU, so that no device is written into the graph.
        exported = _WithFeatures(copy.deepcopy(network).cpu())
        example = torch.zeros(2, 3, size, size)
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(exported, (example,), dynamic_shapes=({0: batch},))
        assert not program.constants, "a tensor that is no parameter would not change with them"
        graph: GraphModule = program.module(check_guards=False)
        return graph

    with quiet():
        graph = copy.deepcopy(_traces.of((size, *structure_of(network)), trace))
    graph.get_submodule(ROOT).load_state_dict(network.state_dict(), strict=True)
    device = next(network.parameters()).device
    return _with_quantizers(graph, plan, network).to(device)


def replanned(model: QuantizedCare, plan: Plan) -> QuantizedCare:
    """The same network and weights with the quantizers of another plan, not calibrated yet."""
    with quiet():
        graph = copy.deepcopy(model.graph)
    for node in list(graph.graph.nodes):
        node.meta.pop(Q_ANNOTATION_KEY, None)
        if node.op == "call_module":  # nothing but quantizers is one in an exported graph
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return _with_quantizers(graph, plan, model)


def _with_quantizers(
    graph: GraphModule, plan: Plan, made_from: CompactCare | QuantizedCare
) -> QuantizedCare:
    with quiet():
        placed = prepare_qat_pt2e(graph, PlanQuantizer(plan))
    return QuantizedCare(placed, plan, made_from).eval()


def site_of(node: Node) -> str:
    """The module a node was exported from, as the plan names it."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return str(path).removeprefix(f"{ROOT}.")


def _qspec(spec: TensorSpec, site: str, operand: str, source: Node) -> QuantizationSpec:
    shape = source.meta["val"].shape
    return QuantizationSpec(
        dtype=spec.dtype,
        observer_or_fake_quant_ctr=make_quantizer(spec, site, operand, shape),
    )


def _annotate(node: Node, annotation: QuantizationAnnotation) -> None:
    annotation._annotated = True
    # torchao would share one quantizer among all readers of a tensor, whatever their bits.
    annotation.allow_implicit_sharing = False
    node.meta[Q_ANNOTATION_KEY] = annotation
