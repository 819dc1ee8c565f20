"""The forms of one model that targets execute: each a graph to write and a module to compare.

What targets have in common is made once: the float graph, a simulation for each kind of integers,
its answers on the images that files are compared on.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from care_compress.evaluate.agreement import (
    HALF_BITS,
    REQUANTIZED_BITS,
    HeldImages,
    Rounded,
)
from care_compress.export.byte_input import take_bytes
from care_compress.export.form import EVERYWHERE, Form, form_for, in_form
from care_compress.export.gelu import write_gelu
from care_compress.export.half import write_half
from care_compress.export.ort_channels_last import put_channels_last
from care_compress.export.ort_head import split_head_input
from care_compress.export.ort_products import use_integer_products
from care_compress.export.result import About
from care_compress.export.to_onnx import float_graph, put_integers, write_onnx
from care_compress.export.to_openvino import scale_branches, write_ir
from care_compress.files import fingerprint, temporary_folder
from care_compress.model.care import Care
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.quantize.artifact import Saved, load_saved
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.retarget import export_rules, retarget
from care_compress.recipe.sections import DataSection, ExportSection, RewriteSection
from care_compress.recipe.target import Target
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.tasks.distance import sqnr_db
from care_compress.tasks.known import task_called
from care_compress.tasks.task import Task

CPU = torch.device("cpu")
EXACT_IMAGES = 64  # that two exact implementations are compared on
# What two targets must have in common to share a variant.
SHARED = {"activations", "weights", "rules", "gelu", "float_type", "opset"}


@dataclass(frozen=True)
class Reference:
    """What a file has to compute."""

    module: nn.Module  # a simulation, or the float model
    logits: Tensor  # on the check images
    exact_db: float  # how near two exact implementations of it come


@dataclass(frozen=True)
class Variant(Reference):
    """A model in the form that targets of one kind execute."""

    graph: ir.Model

    def write(self, path: Path, about: About, half: bool = False) -> None:
        """Write an ``.onnx`` file, or an ``.xml`` of OpenVINO's with its ``.bin``.

        `half` stores what an ``.xml`` does not quantize as float16.
        """
        quantized = self.module if isinstance(self.module, QuantizedCare) else None
        if path.suffix == ".onnx":
            write_onnx(self.graph, about, path, quantized)
            return
        with temporary_folder(path) as folder:
            source = folder / "model.onnx"
            write_onnx(self.graph, about, source, quantized)
            write_ir(source, about, path, half)


@dataclass
class Variants:
    """All forms of one run's model."""

    model: Care
    compact: CompactCare
    kept: Path | None  # the quantized model; none for a float recipe
    hold: Callable[[], HeldImages]  # the images that files are compared on
    data: DataSection
    section: ExportSection
    made: dict[str, Variant] = field(default_factory=dict)
    graphs: dict[Form, ir.Model] = field(default_factory=dict)  # in float

    @property
    def task(self) -> Task:
        """What the model was made for."""
        return task_called(self.model.task)

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

    @property
    def nncf(self) -> Path | None:
        """NNCF's quantized model, which is OpenVINO's; none where it is ours."""
        return self.kept if self.saved is None else None

    @cached_property
    def float_logits(self) -> Tensor:
        """What the rewritten float model of the recipe answers."""
        return self._logits(self.compact)

    @cached_property
    def baseline(self) -> Variant:
        """The float model as a GPU runs it fastest, every exact rewrite applied, in float16."""
        network = rewrite(self.model, RewriteSection())
        graph = self._graph(in_form(network, EVERYWHERE))
        self._take_bytes(graph)
        write_half(graph)
        return Variant(network, self._logits(network), math.inf, graph)

    def of(self, target: Target) -> Variant:
        """What `target` executes; `RecipeError` if it cannot. Targets of the same limits share."""
        limits = target.model_dump(include=SHARED)
        kind = target.device == "cpu", target.runtime == "onnxruntime"
        alike = (target.is_typed, *kind, bool(target.float8))  # which of them does not matter
        key = fingerprint({**limits, "alike": alike})
        if key in self.made:
            return self.made[key]
        network, quantized = self.compact, None
        if self.saved is not None:
            network = self.saved.network
            rules = export_rules(self.section, self.saved.section, target)
            quantized = retarget(self.saved.model, network, rules, target)
        form = form_for(target, None if quantized is None else quantized.plan)
        if form not in self.graphs:
            self.graphs[form] = self._graph(in_form(network, form))
        graph = ir.from_proto(ir.to_proto(self.graphs[form]))  # a copy, to be edited
        graph.opset_imports[""] = target.opset
        if quantized is not None:
            # A float file computes what was published, exactly: with its own GELU, in float32.
            write_gelu(graph, target.gelu)
            put_integers(graph, quantized)
            if target.runtime == "onnxruntime":
                use_integer_products(graph)
                put_channels_last(graph)
                split_head_input(graph)
        self._take_bytes(graph)
        if quantized is not None and target.is_typed:
            write_half(graph)
        if target.runtime == "openvino" and target.device == "cpu":
            scale_branches(graph)
        logits = self.float_logits if quantized is None else self._logits(quantized)
        if quantized is None:
            self.made[key] = Variant(network, logits, math.inf, graph)
        else:
            exact_db = self._exact_db(quantized, logits, target.float_type == "fp16")
            self.made[key] = Variant(quantized, logits, exact_db, graph)
        return self.made[key]

    def _exact_db(self, quantized: QuantizedCare, logits_NK: Tensor, half: bool) -> float:
        """How near an exact implementation that rounds elsewhere comes, on some of the images."""
        few = self.images.only(range(min(EXACT_IMAGES, len(self.images.labels))))
        other = Rounded(quantized, HALF_BITS if half else REQUANTIZED_BITS)
        return sqnr_db(logits_NK[:EXACT_IMAGES], few.logits(other))

    def _graph(self, network: CompactCare) -> ir.Model:
        return float_graph(copy.deepcopy(network), self.data.resolution, self.section.batch)

    def _take_bytes(self, graph: ir.Model) -> None:
        if self.section.input == "uint8":
            take_bytes(graph, self.data)

    def _logits(self, module: nn.Module) -> Tensor:
        return self.images.logits(TorchPredictor(module, self.model.num_classes, CPU))
