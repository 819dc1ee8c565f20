"""The export stage: one model to the files of every target, each read back and compared.

Files go to ``exports/<target>/``, with an ``export.json`` that says what they are; some of the
images they were compared on to ``exports/samples/``, for the bundles that go to devices.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from care_compress import machine
from care_compress.console import say, step_line, widened
from care_compress.data.samples import Samples, spread_indices
from care_compress.errors import ExportError, RecipeError, TargetError
from care_compress.evaluate.agreement import compare_logits, hold_images
from care_compress.evaluate.readback import answers_beside
from care_compress.evaluate.site_distance import first_divergence
from care_compress.export.result import Exported, File, export_table, in_short
from care_compress.export.to_engine import build_ahead
from care_compress.export.to_onnx import About, Preprocessing, write_onnx
from care_compress.export.to_openvino import write_ir
from care_compress.export.variants import Reference, Variant, Variants
from care_compress.files import atomic_file, digest_of, fingerprint, sha256_file, temporary_folder
from care_compress.model.care import Care
from care_compress.model.checkpoint import state_digest
from care_compress.model.compact import CompactCare
from care_compress.model.predictor import Predictor
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.target import Target, all_targets, load_target
from care_compress.run.context import RunContext
from care_compress.run.directory import Run
from care_compress.run.stages import EVERYTHING, once, recipe_parts, versions
from care_compress.runtime.dot_products import check_needs
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.runtime.on_openvino import OpenVinoPredictor
from care_compress.runtime.profile_openvino import executed_layers, integer_macs, quantized_macs

SAMPLES = 64  # images that travel to a device
SAMPLES_FOLDER = "samples"
BASELINE = "fp16"  # what INT8 has to beat on a GPU
LEAST_SHARE = 0.95  # of the planned integer MACs, below which a user should know
WIDTH = 112  # of the table: names must be whole even where a terminal is narrow


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
    targets = chosen_targets(recipe)
    if context.world.is_main:
        _drop_others(context.run, targets)
    if context.world.is_main and targets:
        variants = Variants(
            recipe,
            model,
            compact,
            kept,
            lambda: hold_images(validation, recipe.data, recipe.export.images, context.bad),
        )
        images = validation.content_digest(), recipe.export.images
        with step_line(context.console) as notify:
            export = Exporter(context, variants, about_export(variants, validation), images, notify)
            for target in targets:
                notify(f"exporting to {target.name}")
                done.append(export.to(target))
            export.keep_samples(done)
        _show(context.console, done)
    context.world.wait()
    return done


def _drop_others(run: Run, targets: tuple[Target, ...]) -> None:
    """Files of an earlier model, for targets that are not asked for now, would pass for its own."""
    root = run.path / "exports"
    wanted = {SAMPLES_FOLDER, *(target.name for target in targets)}
    for folder in root.iterdir() if root.is_dir() else ():
        if folder.name not in wanted or not targets:
            shutil.rmtree(folder, ignore_errors=True)


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


def about_export(variants: Variants, validation: Samples) -> About:
    """What the files say of themselves; the fingerprint is of contents, wherever they lie."""
    recipe, kept = variants.recipe, variants.kept
    prepared = Preprocessing.of(recipe.data)
    weights = sha256_file(kept) if kept else state_digest(variants.compact.state_dict())
    content = {"model": weights, "preprocessing": asdict(prepared), "classes": validation.classes}
    return About(recipe.name, fingerprint(content), tuple(validation.classes), prepared)


def _show(console: Console, done: list[Exported]) -> None:
    rows = [row for one in done for row in one.rows()]
    if rows:
        images = max(file.agreement.images for one in done for file in one.files.values())
        wide = widened(console, WIDTH)
        wide.print(export_table(rows, images))
    alike: dict[str, list[str]] = {}
    for one in done:
        if one.skipped:
            reason = one.skipped.replace(one.target.name, "it")
            alike.setdefault(reason, []).append(one.target.name)
    for reason, names in alike.items():
        text = f"no export for {', '.join(names)}: {reason}"
        say(text, console)
    for one in done:
        if one.share is not None and one.share < LEAST_SHARE:
            part = f"{100 * one.share:.1f} % of the planned integer MACs"
            console.print(
                f"[yellow]{one.target.name} runs only {part} in integers[/]: this processor may "
                "lack them (care-compress doctor)"
            )
        if one.not_built:
            text = f"no engine for {one.target.name}: {one.not_built}"
            say(text, console)


def check_targets(
    recipe: Recipe, plan: Callable[[Target], object], console: Console
) -> tuple[Target, ...]:
    """Before any work: refuse targets named that cannot run the recipe; those that can."""
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


def check_exports(done: list[Exported]) -> None:
    """A file that is not the model is an error, after everything else was written."""
    for one in done:
        if one.failed:
            raise ExportError(f"{one.target.name}: {one.failed}")
        for file in one.files.values():
            near = file.agreement
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
    checked_on: object  # what tells the images that files are compared on from others
    notify: Callable[[str], None]
    compared: dict[str, File] = field(default_factory=dict)  # by digest

    def to(self, target: Target) -> Exported:
        """Export to one target, or take over what is there; why not, where that is impossible."""
        try:
            record = once(
                self.context,
                f"export {target.name}",
                {**self._made_from, "target": target.model_dump(mode="json")},
                lambda: self._anew(target).as_record(),
            )
        except ExportError as error:
            return Exported(target, failed=str(error))
        return Exported.of_record(target, self._folder(target), record)

    @cached_property
    def _made_from(self) -> dict[str, object]:
        variants, cpu = self.variants, machine.read_machine().cpu
        return {
            **recipe_parts(variants.recipe)["export"],
            "about": asdict(self.about),
            "float model": state_digest(variants.model.state_dict()),
            "model": variants.kept and digest_of(variants.kept),
            "validation images": self.checked_on,
            "packages": versions(EVERYTHING),
            # Which decides what runs in integers, and how exactly. A name alone does not say it:
            # "AMD EPYC" is one with dot products, or one without.
            "processor": [cpu.name, dict(cpu.features)],
        }

    def _anew(self, target: Target) -> Exported:
        shutil.rmtree(self._folder(target), ignore_errors=True)
        with self.context.stage("export"):
            return self._write(target)

    def _write(self, target: Target) -> Exported:
        done = Exported(target)
        try:
            self._check_readable(target)
            if self.variants.kept is not None and self.variants.saved is None:
                self._nncf_to(done)
            elif target.runtime == "onnxruntime":
                self._onnx_to(done, self.precision, self.variants.of(target))
            elif target.runtime == "openvino":
                self._openvino_to(done)
            else:
                self._tensorrt_to(done)
        except (RecipeError, TargetError) as error:
            done = Exported(target, skipped=str(error))
        path = self._folder(target) / "export.json"
        if done.files:
            about = asdict(self._about(target))
            said = {**done.as_json(), **about, "batch": self.variants.recipe.export.batch}
            self.context.run.write_json(str(path.relative_to(self.context.run.path)), said)
        return done

    def _check_readable(self, target: Target) -> None:
        """Raise TargetError before writing what could not be read back on this processor."""
        suffix = ".xml" if target.runtime == "openvino" else ".onnx"
        check_needs(self._path(target, self.precision, suffix), target.file_needs, target.runtime)

    @property
    def precision(self) -> str:
        """What the exported model is called."""
        return self.variants.recipe.precision

    @property
    def _root(self) -> Path:
        return self.context.run.path / "exports"

    def _folder(self, target: Target) -> Path:
        return self._root / target.name

    def _path(self, target: Target, name: str, suffix: str) -> Path:
        """Where a model goes; one that is not right on every processor says so in its name."""
        needs = "-dotprod" if target.needs.dot_products else ""
        return self._folder(target) / f"{name}{needs}{suffix}"

    def _about(self, target: Target) -> About:
        return replace(self.about, needs=target.file_needs)

    def _onnx_to(self, done: Exported, name: str, variant: Variant) -> None:
        """An ONNX file, compared through ONNX Runtime."""
        path = self._path(done.target, name, ".onnx")
        write_onnx(variant.graph, self._about(done.target), path, variant.quantized)
        self._compare(done, name, path, variant, lambda: OnnxPredictor(path))

    def _openvino_to(self, done: Exported) -> None:
        variant = self.variants.of(done.target)
        path, about = self._path(done.target, self.precision, ".xml"), self._about(done.target)
        with temporary_folder(path) as folder:
            source = folder / "model.onnx"
            write_onnx(variant.graph, about, source, variant.quantized)
            write_ir(source, about, path, half=done.target.float_type == "fp16")
        self._compare_openvino(done, path, variant)

    def _tensorrt_to(self, done: Exported) -> None:
        """The typed graph, and the float16 one that it has to beat."""
        self._onnx_to(done, self.precision, self.variants.of(done.target))
        if self.precision != BASELINE:
            self._onnx_to(done, BASELINE, self.variants.baseline)
        if done.target.builds_without_device:
            self._build_engines(done)

    def _build_engines(self, done: Exported) -> None:
        """Engines where the library is installed; nothing needs a GPU."""
        try:
            for name, file in done.files.items():
                about = build_ahead(file.path, name, self.notify)
                done.engines[name] = in_short(about)
                for suffix in (".engine", ".engine.json"):
                    self.context.run.record_output(file.path.with_suffix(suffix))
        except TargetError as error:
            done.not_built = str(error)

    def _nncf_to(self, done: Exported) -> None:
        """NNCF's file is OpenVINO's own."""
        if done.target.runtime != "openvino":
            raise TargetError("NNCF's model is OpenVINO's.", "use backend: torchao for this target")
        source = self.variants.kept
        assert source is not None
        path = self._path(done.target, self.precision, ".xml")
        write_ir(source, self._about(done.target), path, half=False)
        predict = OpenVinoPredictor(source)
        done.planned_macs = quantized_macs(source)
        logits = self.variants.images.logits(predict)
        self._compare_openvino(done, path, Reference(self.variants.compact, logits))

    def _compare_openvino(self, done: Exported, path: Path, reference: Reference) -> None:
        predict = OpenVinoPredictor(path)
        self.context.run.record_output(path.with_suffix(".bin"))
        self._compare(done, self.precision, path, reference, lambda: predict)
        if done.target.device == "cpu":  # what another device runs, this one cannot tell
            done.executed_macs = integer_macs(executed_layers(predict.compiled))

    def _compare(
        self,
        done: Exported,
        name: str,
        path: Path,
        reference: Reference,
        read: Callable[[], Predictor],
    ) -> None:
        """Read the file back and compare it; one of the same bytes was compared already."""
        self.context.run.record_output(path)
        key = digest_of(path)
        images = self.variants.images
        if key not in self.compared:
            near = compare_logits(
                reference.logits, images.logits(read()), self.variants.plain.logits
            )
            where = ""
            if not near.holds:
                image = next(images.batches(1))
                where = first_divergence(reference.module, path, reference.sites, image)
            self.compared[key] = File(path, near, where)
        known = self.compared[key]
        done.files[name] = File(path, known.agreement, known.diverges)
        done.planned_macs = max(done.planned_macs, reference.integer_macs)
        if name == self.precision:
            plain = self.variants.plain.logits
            done.answers_as_float = compare_logits(plain, reference.logits).percent
        # On the images that travel to a board; or on all, so that any processor can read it back.
        answers = reference.logits[self._samples] if done.target.is_engine else reference.logits
        self._save(answers_beside(path, name), answers.float().numpy())

    @property
    def _samples(self) -> list[int]:
        return spread_indices(len(self.variants.images.labels), SAMPLES)

    def keep_samples(self, done: list[Exported]) -> None:
        """Some of the images with their labels, if there is a device that should answer them."""
        if any(one.target.is_bundled and one.files for one in done):
            # Of the images alone: another model, name or processor leaves them as they are.
            data = recipe_parts(self.variants.recipe)["export"]["data"]
            made_from = {"data": data, "validation images": self.checked_on}
            once(self.context, "export samples", made_from, self._save_samples)
        else:
            shutil.rmtree(self._root / SAMPLES_FOLDER, ignore_errors=True)

    def _save_samples(self) -> None:
        folder, images, chosen = self._root / SAMPLES_FOLDER, self.variants.images, self._samples
        self._save(folder / "pixels.npy", images.pixels_BCHW[chosen].contiguous().numpy())
        self._save(folder / "labels.npy", images.labels[chosen].numpy())

    def _save(self, path: Path, value: NDArray[Any]) -> None:
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, value)
        self.context.run.record_output(path)
