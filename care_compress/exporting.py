"""The export stage: one quantized model to the files of every target, each read back and compared.

Files go to ``exports/<target>/``, with an ``export.json`` that says what they are; the images they
were compared on to ``exports/samples/``, for the bundles that go to devices.
"""

import copy
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from care_compress.data.loader import evaluation_batches
from care_compress.data.samples import Samples
from care_compress.data.transforms import EvalTransform
from care_compress.errors import ExportError, RecipeError, TargetError
from care_compress.evaluate.accuracy import spread_indices
from care_compress.evaluate.agreement import Agreement, CheckImages, compare_logits
from care_compress.evaluate.divergence import first_divergence
from care_compress.evaluate.tables import export_table
from care_compress.export.about import About, Preprocessing
from care_compress.export.float_graph import float_graph
from care_compress.export.half import write_half
from care_compress.export.integers import put_integers
from care_compress.export.to_onnx import write_onnx
from care_compress.export.to_openvino import write_ir
from care_compress.model.care import Care
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.progress import step_line
from care_compress.quantize.artifact import Saved, load_saved
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.retarget import retarget
from care_compress.recipe import Recipe
from care_compress.run import atomic_file, fingerprint, sha256_file
from care_compress.runtime.executed import executed_layers, integer_macs
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.runtime.on_openvino import OpenVinoPredictor
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.sections import RewriteSection
from care_compress.target import Target, all_targets, load_target
from care_compress.workshop import Workshop

SAMPLES = 64  # images that travel to a device
WIDTH = 96
BASELINE = "fp16"  # what INT8 has to beat on a GPU


@dataclass(frozen=True)
class File:
    """One exported model: what it is, and how near it came to the model it was made from."""

    path: Path
    agreement: Agreement
    diverges: str  # the first layer that does not agree; nothing where all do

    def as_json(self) -> dict[str, Any]:
        """As ``export.json`` holds it."""
        return {
            "file": self.path.name,
            "sha256": sha256_file(self.path),
            "size_bytes": size_of(self.path),
            **self.agreement.as_json(),
        }


@dataclass
class Exported:
    """What one target got; only a reason where it cannot execute the model."""

    target: Target
    files: dict[str, File] = field(default_factory=dict)  # by precision
    skipped: str = ""
    planned_macs: int = 0  # in integers
    executed_macs: int | None = None  # as the compiled model says; None: it cannot be asked here
    answers_as_float: float | None = None  # percent

    def as_json(self) -> dict[str, Any]:
        """As ``export.json`` and ``results.json`` hold it."""
        if self.skipped:
            return {"target": self.target.name, "skipped": self.skipped}
        share = None
        if self.executed_macs is not None and self.planned_macs:
            share = self.executed_macs / self.planned_macs
        return {
            "target": self.target.name,
            "runtime": self.target.runtime,
            "models": {name: file.as_json() for name, file in self.files.items()},
            "integer_macs": {
                "planned": self.planned_macs,
                "executed": self.executed_macs,
                "share": share,
            },
            "answers_as_float": self.answers_as_float,
        }

    def rows(self) -> list[tuple[str, ...]]:
        """One table row for each file."""
        share = ""
        if self.executed_macs is not None and self.planned_macs:
            share = f"{100 * self.executed_macs / self.planned_macs:.1f} %"
        return [
            (
                self.target.name,
                file.path.name,
                f"{size_of(file.path) / 1e6:.2f} MB",
                f"{file.agreement.percent:.1f} %",
                f"{file.agreement.sqnr_db:.1f} dB",
                share,
            )
            for file in self.files.values()
        ]


def size_of(path: Path) -> int:
    """Bytes of a model; OpenVINO's is two files."""
    parts = (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)
    return sum(part.stat().st_size for part in parts)


def exported(
    shop: Workshop, model: Care, compact: CompactCare, kept: Path | None, validation: Samples
) -> list[Exported]:
    """Export the kept model, or the float one, to every target that can execute it."""
    if not shop.world.is_main:
        shop.world.wait()
        return []
    with shop.stage("export"):
        export = _Export(shop, model, compact, kept, _check_images(shop, validation), validation)
        done = []
        with step_line(shop.console) as notify:
            for target in chosen_targets(shop.recipe):
                notify(f"exporting to {target.name}")
                done.append(export.to(target))
        export.keep_samples(done)
    shop.world.wait()
    _print(shop, done)
    wrong = [(one.target.name, file) for one in done for file in one.files.values()]
    for name, file in wrong:
        if not file.agreement.holds:
            raise ExportError(
                f"{name}: {file.path.name} does not compute what the model does: "
                f"{file.agreement.percent:.1f} % of answers agree, {file.agreement.sqnr_db:.1f} dB;"
                f" it parts at {file.diverges}.",
                "see LOG.md for known causes; leave that layer in float by a rule, or report it",
            )
    return done


def _print(shop: Workshop, done: list[Exported]) -> None:
    rows = [row for one in done for row in one.rows()]
    if rows:
        # Names of targets and files must be whole even where a terminal is narrow.
        wide = Console(file=shop.console.file, width=max(shop.console.width, WIDTH))
        wide.print(export_table(rows, shop.recipe.export.images))
    for one in done:
        if one.skipped:
            shop.console.print(
                f"no export for {one.target.name}: {one.skipped}", markup=False, highlight=False
            )


def chosen_targets(recipe: Recipe) -> tuple[Target, ...]:
    """The targets a recipe names, or all of them."""
    names = recipe.export.targets
    return all_targets() if names is None else tuple(load_target(name) for name in names)


def _check_images(shop: Workshop, validation: Samples) -> CheckImages:
    data = shop.recipe.data
    transform = EvalTransform(data.resolution, data.crop_pct, data.exif_rotate)
    wanted = spread_indices(len(validation), shop.recipe.export.images)
    batches = list(
        evaluation_batches(validation, transform, 32, data, bad=shop.bad, indices=wanted)
    )
    pixels, labels = (torch.cat(parts) for parts in zip(*(b[:2] for b in batches), strict=True))
    return CheckImages(pixels, labels, data)


@dataclass
class _Variant:
    """A model in the form that targets of one kind execute, as a graph and as a simulation."""

    graph: ir.Model
    module: nn.Module
    quantized: QuantizedCare | None
    logits: Tensor  # of the simulation, on the check images
    planned_macs: int


@dataclass
class _Export:
    """One run's export: what targets have in common is made once."""

    shop: Workshop
    model: Care
    compact: CompactCare
    kept: Path | None
    images: CheckImages
    validation: Samples
    variants: dict[str, _Variant] = field(default_factory=dict)
    compared: dict[str, File] = field(default_factory=dict)  # by digest
    expected: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    @cached_property
    def saved(self) -> Saved | None:
        """The quantized model of ours; none for a float recipe or NNCF's."""
        ours = self.kept is not None and self.kept.suffix == ".safetensors"
        return load_saved(self.kept) if ours and self.kept is not None else None

    @cached_property
    def about(self) -> About:
        """What every file says about itself."""
        recipe = self.shop.recipe
        weights = sha256_file(self.kept) if self.kept else None
        resolved = recipe.model_dump(mode="json", exclude={"export"})
        return About(
            recipe.name,
            fingerprint({"recipe": resolved, "weights": weights}),
            tuple(self.validation.classes),
            Preprocessing.of(recipe.data),
        )

    @cached_property
    def graph(self) -> ir.Model:
        """The float network that is quantized, or exported as it is."""
        return self._graph(self.compact if self.saved is None else self.saved.network)

    @cached_property
    def float_logits(self) -> Tensor:
        """Of the float model, on the check images."""
        return self._logits(self.compact)

    @cached_property
    def baseline(self) -> _Variant:
        """The float network at its fastest, every exact rewrite applied."""
        network = rewrite(self.model, RewriteSection())
        return _Variant(self._graph(network), network, None, self._logits(network), 0)

    def to(self, target: Target) -> Exported:
        """Export to one target; skipped, with the reason, where that is impossible."""
        done = Exported(target)
        try:
            if self.kept is not None and self.saved is None:
                self._nncf_to(target, done)
            elif target.runtime == "onnxruntime":
                self._write(done, self.precision, self._variant(target))
            elif target.runtime == "openvino":
                self._openvino_to(done, self._variant(target))
            else:
                self._tensorrt_to(done, self._variant(target))
        except (RecipeError, TargetError) as error:
            done.skipped, done.files = str(error), {}
        path = self.folder(target) / "export.json"
        if done.skipped:
            path.unlink(missing_ok=True)
        else:
            self.shop.run.write_json(str(path.relative_to(self.shop.run.path)), self._json(done))
        return done

    @property
    def precision(self) -> str:
        """What the exported model is called."""
        return self.shop.recipe.precision

    def folder(self, target: Target) -> Path:
        """Where a target's files go."""
        return self.shop.run.path / "exports" / target.name

    def _json(self, done: Exported) -> dict[str, Any]:
        about = asdict(self.about)
        return {**done.as_json(), **about, "batch": self.shop.recipe.export.batch}

    def _graph(self, network: CompactCare) -> ir.Model:
        recipe = self.shop.recipe
        return float_graph(copy.deepcopy(network), recipe.data.resolution, recipe.export.batch)

    def _logits(self, module: nn.Module) -> Tensor:
        return self.images.logits(
            TorchPredictor(module, self.model.num_classes, torch.device("cpu"))
        )

    def _variant(self, target: Target) -> _Variant:
        """Shared by the targets with the same limits."""
        limits = target.model_dump(include={"activations", "weights", "rules", "float_type"})
        key = fingerprint({**limits, "typed": target.is_typed})
        if key not in self.variants:
            self.variants[key] = self._make_variant(target)
        return self.variants[key]

    def _make_variant(self, target: Target) -> _Variant:
        graph = ir.from_proto(ir.to_proto(self.graph))
        if self.saved is None:
            if target.is_typed and self.precision != "fp32":
                write_half(graph)
            return _Variant(graph, self.compact, None, self.float_logits, 0)
        rules = self.saved.section.rules
        if self.shop.recipe.export.target_rules:
            rules = (*rules, *target.rules)
        model = retarget(self.saved.model, self.saved.network, rules, target)
        put_integers(graph, model)
        if target.is_typed:
            write_half(graph)
        planned = sum(
            decision.site.macs
            for decision in model.plan.decisions
            if decision.input.is_integer and (decision.weight is None or decision.weight.is_integer)
        )
        return _Variant(graph, model, model, self._logits(model), planned)

    def _write(self, done: Exported, name: str, variant: _Variant) -> None:
        """An ONNX file, compared through ONNX Runtime."""
        path = self.folder(done.target) / f"{name}.onnx"
        write_onnx(variant.graph, self.about, path, variant.quantized)
        self._record(done, name, path, variant, lambda: OnnxPredictor(path))

    def _openvino_to(self, done: Exported, variant: _Variant) -> None:
        path = self.folder(done.target) / f"{self.precision}.xml"
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "model.onnx"
            write_onnx(variant.graph, self.about, source, variant.quantized)
            write_ir(source, self.about, path, done.target.float_type == "fp16")
        self._record_openvino(done, path, variant)

    def _record_openvino(self, done: Exported, path: Path, variant: _Variant) -> None:
        predict = OpenVinoPredictor(path)
        self._record(done, self.precision, path, variant, lambda: predict)
        done.executed_macs = integer_macs(executed_layers(predict.compiled))

    def _tensorrt_to(self, done: Exported, variant: _Variant) -> None:
        self._write(done, self.precision, variant)
        if self.precision != BASELINE:
            base = copy.copy(self.baseline)
            base.graph = ir.from_proto(ir.to_proto(base.graph))
            write_half(base.graph)
            self._write(done, BASELINE, base)

    def _nncf_to(self, target: Target, done: Exported) -> None:
        """NNCF's file is OpenVINO's own; other runtimes have nothing to gain from it."""
        if target.runtime != "openvino":
            raise TargetError(
                "NNCF's model is OpenVINO's.", "quantize with backend: torchao for this target"
            )
        assert self.kept is not None
        path = self.folder(target) / f"{self.precision}.xml"
        write_ir(self.kept, self.about, path, half=False)
        predict = OpenVinoPredictor(self.kept)
        macs = integer_macs(executed_layers(predict.compiled))
        made = _Variant(self.graph, self.compact, None, self.images.logits(predict), macs)
        self._record_openvino(done, path, made)

    def _record(
        self,
        done: Exported,
        name: str,
        path: Path,
        variant: _Variant,
        open_: Callable[[], Any],
    ) -> None:
        """Read the file back and compare it; a file of the same bytes was compared already."""
        self.shop.run.record_output(path)
        if path.suffix == ".xml":
            self.shop.run.record_output(path.with_suffix(".bin"))
        key = sha256_file(path.with_suffix(".bin") if path.suffix == ".xml" else path)
        if key not in self.compared:
            found = self.images.logits(open_())
            agreement = compare_logits(variant.logits, found)
            where = "" if agreement.holds else self._where(path, variant)
            self.compared[key] = File(path, agreement, where)
        known = self.compared[key]
        done.files[name] = File(path, known.agreement, known.diverges)
        done.planned_macs = max(done.planned_macs, variant.planned_macs)
        if name == self.precision:
            done.answers_as_float = compare_logits(self.float_logits, variant.logits).percent
        self.expected[done.target.name, name] = variant.logits

    def _where(self, path: Path, variant: _Variant) -> str:
        names = [name for name, _ in variant.module.named_modules()]
        if variant.quantized is not None:
            names = [decision.site.name for decision in variant.quantized.plan.decisions]
        (image,) = (batch[:1] for batch in [next(self.images.batches(1))])
        return first_divergence(variant.module, path, names, image)

    def keep_samples(self, done: list[Exported]) -> None:
        """Some of the images, with labels and what each engine should answer."""
        engines = [one for one in done if one.target.runtime.startswith("tensorrt") and one.files]
        if not engines:
            return
        root = self.shop.run.path / "exports"
        chosen = spread_indices(len(self.images.labels), SAMPLES)
        pixels = self.images.pixels_BCHW[chosen].contiguous().numpy()
        self._save(root / "samples" / "pixels.npy", pixels)
        self._save(root / "samples" / "labels.npy", self.images.labels[chosen].numpy())
        for one in engines:
            for name in one.files:
                logits = self.expected[one.target.name, name][chosen].float().numpy()
                self._save(self.folder(one.target) / f"expected_{name}.npy", logits)

    def _save(self, path: Path, value: NDArray[Any]) -> None:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, value)
        self.shop.run.record_output(path)
