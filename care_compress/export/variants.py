"""The forms of one model that targets execute: each a graph to write and a simulation to compare.

What targets have in common is made once: the float graph, a simulation for each kind of integers,
its answers on the images that files are compared on.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from care_compress.evaluate.agreement import HeldImages
from care_compress.export.cpu_form import Form, form_for, in_form
from care_compress.export.float_graph import float_graph
from care_compress.export.gelu import write_gelu
from care_compress.export.half import write_half
from care_compress.export.integers import put_integers
from care_compress.export.openvino_residual import scale_branches
from care_compress.export.ort_channels_last import put_channels_last
from care_compress.export.ort_head import split_head_input
from care_compress.export.ort_products import use_integer_products
from care_compress.files import fingerprint
from care_compress.model.care import Care
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.quantize.artifact import Saved, load_saved
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.retarget import export_rules, retarget
from care_compress.quantize.spec import Plan
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import RewriteSection
from care_compress.recipe.target import Target
from care_compress.runtime.on_torch import TorchPredictor

CPU = torch.device("cpu")
# What two targets must have in common to share a variant.
SHARED = {"activations", "weights", "rules", "gelu", "float_type", "opset"}


@dataclass(frozen=True)
class Reference:
    """What a file has to compute."""

    module: nn.Module
    logits: Tensor  # on the check images

    @property
    def quantized(self) -> QuantizedCare | None:
        """The simulation; none for a float model."""
        return self.module if isinstance(self.module, QuantizedCare) else None

    @property
    def integer_macs(self) -> int:
        """MACs of one image that are planned in integers."""
        decisions = self.quantized.plan.decisions if self.quantized else ()
        return sum(decision.site.macs for decision in decisions if decision.in_integers)

    @property
    def sites(self) -> list[str]:
        """Names of the layers, in the order of the network."""
        if self.quantized is None:
            return [name for name, _ in self.module.named_modules()]
        return [decision.site.name for decision in self.quantized.plan.decisions]


@dataclass(frozen=True)
class Variant(Reference):
    """A model in the form that targets of one kind execute."""

    graph: ir.Model


@dataclass
class Variants:
    """All forms of one run's model."""

    recipe: Recipe
    model: Care
    compact: CompactCare
    kept: Path | None  # the quantized model; none for a float recipe
    hold: Callable[[], HeldImages]  # the images that files are compared on
    made: dict[str, Variant] = field(default_factory=dict)
    graphs: dict[Form, ir.Model] = field(default_factory=dict)  # in float

    @cached_property
    def images(self) -> HeldImages:
        """Decoded when the first file is compared; a run that has them all needs none."""
        return self.hold()

    @cached_property
    def saved(self) -> Saved | None:
        """Our quantized model; none for a float recipe, or NNCF's."""
        if self.kept is None or self.kept.suffix != ".safetensors":
            return None
        return load_saved(self.kept)

    @cached_property
    def plain(self) -> Reference:
        """The rewritten float model of the recipe."""
        return Reference(self.compact, self._logits(self.compact))

    @cached_property
    def baseline(self) -> Variant:
        """The float model at its fastest, every exact rewrite applied, in float16."""
        network = rewrite(self.model, RewriteSection())
        graph = self._graph(network)
        write_half(graph)
        return Variant(network, self._logits(network), graph)

    def of(self, target: Target) -> Variant:
        """What `target` executes; `RecipeError` if it cannot. Targets of the same limits share."""
        limits = target.model_dump(include=SHARED)
        alike = (target.is_typed, target.device == "cpu", target.runtime == "onnxruntime")
        key = fingerprint({**limits, "alike": alike})
        if key not in self.made:
            self.made[key] = self._make(target)
        return self.made[key]

    def _make(self, target: Target) -> Variant:
        if self.saved is None:
            graph = self._inner(target, None)
            if _is_openvino_cpu(target):
                scale_branches(graph)
            return Variant(self.compact, self.plain.logits, graph)
        rules = export_rules(self.recipe, self.saved.section, target)
        model = retarget(self.saved.model, self.saved.network, rules, target)
        graph = self._inner(target, model.plan)
        put_integers(graph, model)
        if target.runtime == "onnxruntime":
            use_integer_products(graph)
            put_channels_last(graph)
            split_head_input(graph)
        if _is_openvino_cpu(target):
            scale_branches(graph)
        if target.is_typed:
            write_half(graph)
        return Variant(model, self._logits(model), graph)

    def _inner(self, target: Target, plan: Plan | None) -> ir.Model:
        """The float network inside the quantized model, or the float model itself, to be edited."""
        form = form_for(target, plan)
        if form not in self.graphs:
            network = self.compact if self.saved is None else self.saved.network
            self.graphs[form] = self._graph(in_form(network, form))
        graph = ir.from_proto(ir.to_proto(self.graphs[form]))
        graph.opset_imports[""] = target.opset
        if plan is not None:  # a float file computes what was published, exactly
            write_gelu(graph, target.gelu)
        return graph

    def _graph(self, network: CompactCare) -> ir.Model:
        recipe = self.recipe
        return float_graph(copy.deepcopy(network), recipe.data.resolution, recipe.export.batch)

    def _logits(self, module: nn.Module) -> Tensor:
        return self.images.logits(TorchPredictor(module, self.model.num_classes, CPU))


def _is_openvino_cpu(target: Target) -> bool:
    return target.runtime == "openvino" and target.device == "cpu"
