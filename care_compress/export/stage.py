"""The export stage: one model to the files of every target, each read back and compared.

Files go to ``exports/<target>/``, with an ``export.json`` that says what they are; some of the
images they were compared on to ``exports/samples/``, for the bundles that go to devices.
"""

import itertools
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from care_compress import machine
from care_compress.console import step_line
from care_compress.data.annotations import is_annotated
from care_compress.data.samples import Samples, spread_indices
from care_compress.device.build import RTX_COMPUTE_CAPABILITIES, BuildOptions
from care_compress.device.deploy import build_file
from care_compress.device.library import load_library
from care_compress.device.problems import DeployError, TensorRtMissingError
from care_compress.errors import ExportError, RecipeError, TargetError
from care_compress.evaluate.agreement import HeldImages, compare_answers, hold_images
from care_compress.evaluate.readback import answers_beside
from care_compress.evaluate.site_distance import first_divergence
from care_compress.export.half import highest_half
from care_compress.export.result import About, Exported, File, Preprocessing, show_exports
from care_compress.export.to_openvino import write_ir
from care_compress.export.variants import CPU, Reference, Variant, Variants
from care_compress.files import atomic_file, digest_of, fingerprint, sha256_file
from care_compress.model.care import Care
from care_compress.model.checkpoint import state_digest
from care_compress.model.compact import CompactCare
from care_compress.model.predictor import Predictor
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.selection import read_list
from care_compress.quantize.stages import CALIBRATION_FILE
from care_compress.recipe.recipe import Precision, Recipe
from care_compress.recipe.target import Target, all_targets, load_target, own_target
from care_compress.run.context import RunContext
from care_compress.run.directory import TARGETS_FOLDER
from care_compress.run.stages import EVERYTHING, once, recipe_parts
from care_compress.runtime.dot_products import check_needs
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.runtime.on_openvino import OpenVinoPredictor
from care_compress.runtime.profile_openvino import executed_layers, integer_macs, quantized_macs
from care_compress.shipped import install_command
from care_compress.tasks.known import labelled

LOOKED_AT = 32  # check images, and calibration images, for the range of float16
SAMPLES = 64  # images that travel to a device
SAMPLES_FOLDER = "samples"
BASELINE = "fp16"  # what INT8 has to beat on a GPU
# What is told of an engine; its layers stand beside it.
OF_ENGINES = ("library", "version", "engine_sha256", "size_bytes", "layers_from", "precisions")


def exported(
    context: RunContext,
    recipe: Recipe,
    model: Care,
    compact: CompactCare,
    kept: Path | None,
    validation: Samples,
) -> list[Exported]:
    """Export the kept model, or the float one, to every target that can execute it."""
    done: list[Exported] = []
    section, targets = recipe.export, chosen_targets(recipe)
    if context.world.is_main:
        for target in targets:
            if (own := own_target(target.name)) is not None:  # whoever reads the run needs it
                context.run.write_json(
                    f"{TARGETS_FOLDER}/{own.name}.yaml", own.model_dump(mode="json")
                )
        # Files of an earlier model, for targets not asked for now, would pass for its own.
        root = context.run.path / "exports"
        wanted = {SAMPLES_FOLDER, *(target.name for target in targets)}
        for folder in root.iterdir() if root.is_dir() else ():
            if folder.name not in wanted or not targets:
                shutil.rmtree(folder, ignore_errors=True)
    if context.world.is_main and targets:

        def hold() -> HeldImages:
            return hold_images(validation, recipe.data, section.images, context.bad)

        variants = Variants(model, compact, kept, hold, recipe.data, section)
        with step_line(context.console) as notify:
            exporter = exporter_for(context, recipe, variants, validation, section.images, notify)
            for target in targets:
                notify(f"exporting to {target.name}")
                done.append(exporter.to(target))
            exporter.keep_samples(done)
        show_exports(done, context.console)
    context.world.wait()
    return done


def chosen_targets(recipe: Recipe) -> tuple[Target, ...]:
    """The targets a recipe names, or all of them."""
    names = recipe.export.targets
    targets = all_targets() if names is None else tuple(load_target(name) for name in names)
    if recipe.full_range:
        targets = tuple(target.at_full_range() for target in targets)
    return tuple(placed(target, recipe) for target in targets)


def placed(target: Target, recipe: Recipe) -> Target:
    """The target in the placement for the processors meant; a file is right on all others, too."""
    asked = recipe.export.dot_products
    here = machine.dot_products_in(target.runtime) if asked is None else asked
    return target.placed(target.placement_for(here))


def check_targets(
    recipe: Recipe, plan: Callable[[Target], object], console: Console
) -> tuple[Target, ...]:
    """The targets that can run the recipe; before any work, refuse those named that cannot."""
    able = []
    targets = chosen_targets(recipe)
    for target in targets:
        try:
            plan(target)
            able.append(target)
        except RecipeError as error:
            if recipe.export.targets is not None:
                raise RecipeError(f"export.targets: {error.message}", error.fix) from error
    if targets and not able:
        console.print(
            "[yellow]No target executes what this recipe makes[/]: it will be simulated and "
            "nothing exported (care-compress plan RECIPE --target NAME says why)"
        )
    return tuple(able)


def check_exports(done: Sequence[Exported]) -> None:
    """Raise for a file that is not the model, after everything else was written."""
    for one in done:
        if one.failed:
            raise ExportError(f"{one.target.name}: {one.failed}")
        for file in one.files.values():
            near = file.agreement
            if file.peak is not None and not file.peak.fits:
                raise ExportError(
                    f"{one.target.name}: {file.path.name} is unsafe: {file.peak}; an engine would "
                    "answer NaN to some images.",
                    "train with smaller activations, or leave the target out of export.targets",
                )
            if not near.comparable:
                raise ExportError(
                    f"{one.target.name}: {file.path.name} answers NaN or infinity; it parts from "
                    f"the model at {file.diverges}.",
                    "a float16 file may overflow: keep that layer in float32 by a rule, or leave "
                    "the target out",
                )
            if not near.holds:
                raise ExportError(
                    f"{one.target.name}: {file.path.name} does not compute what the model does "
                    f"({near.percent:.1f} % of answers agree, {near.sqnr_db:.1f} dB); it parts at "
                    f"{file.diverges}.",
                    "keep that layer in float by a rule, and please report it",
                )


@dataclass
class Exporter:
    """Writes one run's model to targets."""

    context: RunContext
    variants: Variants
    about: About
    precision: Precision  # what the exported model is called
    recipe_part: Mapping[str, object]  # what of the recipe decides the files
    checked_on: object  # what tells the images that files are compared on from others
    calibrated_on: Callable[[], Iterator[Tensor]]  # further images for the range of float16
    notify: Callable[[str], None]
    compared: dict[str, File] = field(default_factory=dict)  # by digest

    def to(self, target: Target) -> Exported:
        """Export to one target, or take over what is there; why not, where that is impossible."""
        folder = self._root / target.name

        def anew() -> Any:
            shutil.rmtree(folder, ignore_errors=True)
            with self.context.stage("export"):
                return self._write(target).as_record()

        made_from = {**self._made_from, "target": target.model_dump(mode="json")}
        try:
            record = once(self.context, f"export {target.name}", made_from, anew)
        except ExportError as error:
            return Exported(target, failed=str(error))
        return Exported.of_record(target, folder, record)

    @cached_property
    def _made_from(self) -> dict[str, object]:
        variants = self.variants
        return {
            **self.recipe_part,
            "about": self.about.as_json(),
            "float model": state_digest(variants.model.state_dict()),
            "model": variants.kept and digest_of(variants.kept),
            "validation images": self.checked_on,
            "packages": machine.installed_versions(EVERYTHING),
            # Which decides what runs in integers, and how exactly.
            "processor": machine.read_machine().cpu.kind,
        }

    @property
    def _root(self) -> Path:
        return self.context.run.path / "exports"

    def _path(self, target: Target, name: str, suffix: str) -> Path:
        """Where a model goes; one that is not right on every processor says so in its name."""
        needs = "-dotprod" if target.needs.dot_products else ""
        return self._root / target.name / f"{name}{needs}{suffix}"

    def _write(self, target: Target) -> Exported:
        """Every file of a target, or why it cannot execute the model."""
        done = Exported(target)
        about = replace(self.about, needs=target.file_needs)
        suffix = ".xml" if target.runtime == "openvino" else ".onnx"
        path = self._path(target, self.precision, suffix)
        try:
            # TargetError, before writing what could not be read back on this processor.
            check_needs(path, target.file_needs, target.runtime)
            if target.runtime == "openvino":
                self._ir_to(done, path, about)
            elif self.variants.nncf is not None:
                raise TargetError(
                    "NNCF's model is OpenVINO's.", "use backend: torchao for this target"
                )
            else:
                self._onnx_to(done, self.precision, about, self.variants.of(target))
                if target.is_engine and self.precision != BASELINE:
                    self._onnx_to(done, BASELINE, about, self.variants.baseline)
                if target.builds_without_device:
                    self._build_engines(done)
        except (RecipeError, TargetError) as error:
            done = Exported(target, skipped=str(error))
        if done.files:
            said = {**done.as_json(), **about.as_json(), "layout": about.layout}
            said["batch"] = self.variants.section.batch
            self.context.run.write_json(f"exports/{target.name}/export.json", said)
        return done

    def _onnx_to(self, done: Exported, name: str, about: About, variant: Variant) -> None:
        """Write an ONNX file, compared through ONNX Runtime."""
        path = self._path(done.target, name, ".onnx")
        variant.write(path, about)
        self._compare(done, name, path, variant, lambda: OnnxPredictor(path))

    def _ir_to(self, done: Exported, path: Path, about: About) -> None:
        """Write OpenVINO's IR, of our graph or of NNCF's own file, compared through OpenVINO."""
        nncf = self.variants.nncf
        variant: Reference
        if nncf is not None:
            write_ir(nncf, about, path, half=False, bytes_in=about.input == "uint8")
            done.planned_macs = quantized_macs(nncf)
            logits = self.variants.images.logits(OpenVinoPredictor(nncf))
            variant = Reference(self.variants.compact, logits, math.inf)
        else:
            variant = ours = self.variants.of(done.target)
            ours.write(path, about, half=done.target.float_type == "fp16")
        predict = OpenVinoPredictor(path)
        self.context.run.record_output(path.with_suffix(".bin"))
        self._compare(done, self.precision, path, variant, lambda: predict)
        if done.target.device == "cpu":  # what another device runs, this one cannot tell
            done.executed_macs = integer_macs(executed_layers(predict.compiled))

    def _build_engines(self, done: Exported) -> None:
        """Build engines ahead of time where NVIDIA's compiler is installed, with no GPU at hand.

        The builder is the one that boards run (`care_compress.device`); every graph that gets here
        has passed NVIDIA's own parser and compiler.
        """
        try:
            library = load_library("tensorrt_rtx")
            for name, file in done.files.items():
                engine = file.path.with_suffix(".engine")

                def notify(phase: str, _: float | None, building: str = engine.name) -> None:
                    self.notify(f"{building}: {phase}")

                digest, options = sha256_file(file.path), _options(name, done.target)
                about = build_file(library, None, file.path, digest, engine, options, notify)
                done.engines[name] = {key: about[key] for key in OF_ENGINES}
                for path in (engine, engine.with_suffix(".engine.json")):
                    self.context.run.record_output(path)
        except TensorRtMissingError:
            done.not_built = str(
                TargetError("tensorrt-rtx is not installed here.", install_command("tensorrt-rtx"))
            )
        except DeployError as error:
            raise ExportError(error.message, error.fix) from error

    def _compare(
        self,
        done: Exported,
        name: str,
        path: Path,
        made_from: Reference,
        read: Callable[[], Predictor],
    ) -> None:
        """Read the file back and compare it; one of the same bytes was compared already."""
        self.context.run.record_output(path)
        key, images, as_float = digest_of(path), self.variants.images, self.variants.float_logits
        task, module, logits = self.variants.task, made_from.module, made_from.logits
        if isinstance(module, QuantizedCare):
            sites = [decision.site.name for decision in module.plan.decisions]
            macs = sum(d.site.macs for d in module.plan.decisions if d.in_integers)
            done.planned_macs = max(done.planned_macs, macs)
        else:
            sites = [name for name, _ in module.named_modules()]
        if key not in self.compared:
            answers = images.logits(read())
            near, where = compare_answers(task, logits, answers, made_from.exact_db), ""
            if not near.holds:
                where = first_divergence(module, path, sites, next(images.batches(1)))
            few = spread_indices(len(images.labels), LOOKED_AT)
            looked_at = itertools.chain(images.only(few).batches(LOOKED_AT), self.calibrated_on())
            peak = highest_half(path, looked_at) if done.target.is_typed else None
            self.compared[key] = File(path, near, where, peak)
        done.files[name] = replace(self.compared[key], path=path)
        if name == self.precision:
            done.answers_as_float = compare_answers(task, as_float, logits).percent
        # On the images that travel to a board; or on all, so that any processor can read it back.
        answers = logits[self._samples] if done.target.is_engine else logits
        self._save(answers_beside(path, name), answers.float().numpy())

    @property
    def _samples(self) -> list[int]:
        return spread_indices(len(self.variants.images.labels), SAMPLES)

    def keep_samples(self, done: Sequence[Exported]) -> None:
        """Some of the images with their labels, if there is a device that should answer them."""
        folder = self._root / SAMPLES_FOLDER

        def save() -> None:
            images, chosen = self.variants.images, self._samples
            self._save(folder / "pixels.npy", images.pixels_BCHW[chosen].contiguous().numpy())
            self._save(folder / "labels.npy", images.labels[chosen].numpy())

        if any(one.target.is_bundled and one.files for one in done):
            # Of the images alone: another model, name or processor leaves them as they are.
            made_from = {"data": self.recipe_part["data"], "validation images": self.checked_on}
            once(self.context, "export samples", made_from, save)
        else:
            shutil.rmtree(folder, ignore_errors=True)

    def _save(self, path: Path, value: NDArray[Any]) -> None:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, value)
        self.context.run.record_output(path)


def _options(name: str, target: Target) -> BuildOptions:
    """How an engine of a model is built: one of 8-bit floats for the GPUs that multiply them."""
    able = target.float8 if name == "fp8" else ("*",)
    chosen = (one for one in RTX_COMPUTE_CAPABILITIES if any(fnmatch(one, kind) for kind in able))
    return BuildOptions(name, compute_capabilities=tuple(chosen))


def exporter_for(
    context: RunContext,
    recipe: Recipe,
    variants: Variants,
    validation: Samples,
    images: int,
    notify: Callable[[str], None],
) -> Exporter:
    """The exporter of a recipe's model, which compares on so many of the validation images."""
    kept = variants.kept
    prepared = Preprocessing.of(recipe.data, letterbox=is_annotated(validation))
    weights = digest_of(kept) if kept else state_digest(variants.compact.state_dict())
    # The fingerprint is of contents, wherever they lie.
    content = {"model": weights, "preprocessing": prepared.as_json(), "classes": validation.classes}
    classes, takes = tuple(validation.classes), recipe.export.input
    digest = fingerprint(content)
    about = About(recipe.name, digest, classes, prepared, input=takes, task=recipe.task)
    part = recipe_parts(recipe)["export"]
    checked_on = validation.content_digest(), images
    listed = context.run.path / CALIBRATION_FILE

    def calibrated_on() -> Iterator[Tensor]:
        if listed.is_file():
            chosen = read_list(listed, labelled(recipe, "train"))
            few = replace(chosen, indices=chosen.indices[:LOOKED_AT])
            yield from few.batches(recipe.data, LOOKED_AT, CPU)

    return Exporter(
        context, variants, about, recipe.precision, part, checked_on, calibrated_on, notify
    )
