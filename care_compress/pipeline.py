"""The whole product in one place: from a recipe to results, stage after stage.

    recipe -> float model (trained, or loaded) -> rewrite -> quantize -> (train) -> results.json

Each stage takes its own section of the recipe and the previous stage's value, and leaves what it
made in the run directory.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import nn

from care_compress import machine
from care_compress.data.loader import BadImages, evaluation_batches
from care_compress.data.samples import Samples
from care_compress.data.sources import check_classes, open_samples
from care_compress.data.transforms import EvalTransform
from care_compress.errors import DataError
from care_compress.evaluate.accuracy import Accuracy, measure_accuracy, spread_indices
from care_compress.evaluate.paired import Paired, measure_pair
from care_compress.evaluate.tables import quantized_table, rewrite_table
from care_compress.model.care import Care, build_model
from care_compress.model.checkpoint import load_checkpoint, resolve_checkpoint, save_checkpoint
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import RewriteStep, rewrite, rewrite_in_steps
from care_compress.predictor import Predictor
from care_compress.quantization_sections import NncfSection
from care_compress.quantize.artifact import load_quantized, save_quantized
from care_compress.quantize.calibrate import Batches
from care_compress.quantize.nncf_backend import (
    CONTROL_IMAGES,
    AccuracyControl,
    Calibration,
    quantize_openvino,
)
from care_compress.quantize.nncf_qat import train_openvino
from care_compress.quantize.openvino_library import load_nncf
from care_compress.quantize.ptq import planned, quantize_network
from care_compress.quantize.qat import train_quantized
from care_compress.quantize.selection import (
    CalibrationSet,
    deep_features,
    read_list,
    select_images,
)
from care_compress.quantize.spec import Plan
from care_compress.recipe import Recipe
from care_compress.run import Run, sha256_file
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.runtime.opening import open_predictor
from care_compress.train.distributed import World, join_world
from care_compress.train.loop import Validate
from care_compress.train.network import train_network
from care_compress.train.state import Progress

# How each backend keeps its models.
MODEL_FILES = {"torchao": "model.safetensors", "nncf": "model.xml"}
# What a quantized recipe asks for beyond this version; shrinks as the stages arrive.
PENDING_STAGES = ("export", "compare")


@dataclass
class Workshop:
    """What every stage may use: the recipe, the run it writes to, and who is watching."""

    recipe: Recipe
    run: Run
    world: World
    console: Console
    bad: BadImages = field(default_factory=BadImages)
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time one stage."""
        began = time.monotonic()
        yield
        spent = self.seconds.get(name, 0.0) + time.monotonic() - began
        self.seconds[name] = round(spent, 2)


@dataclass
class Candidate:
    """A compressed model and how it did beside the float one."""

    name: str  # ptq, qat
    path: Path
    paired: Paired
    plan: Plan | None  # of a backend that leaves its placement to the recipe's rules


def run_recipe(recipe: Recipe, runs: Path, name: str, console: Console) -> dict[str, Any]:
    """Run every stage of a recipe; the results, as they stand in ``results.json``."""
    with join_world() as world, _opened(Run(runs, name), recipe, world) as run:
        shop = Workshop(recipe, run, world, console if world.is_main else Console(quiet=True))
        shop.console.print(f"[bold]{recipe.name}[/]: {escape(recipe.claim)}")
        check_plan(recipe)
        validation = open_samples(recipe.data, "val")
        model = float_model(shop, validation)
        compact, steps = rewritten(shop, model)
        if recipe.quantize is None:
            return report_float(shop, validation, steps, evaluated(shop, compact, validation))
        tried = [quantized(shop, compact, validation)]
        if recipe.quantize.qat is not None:
            tried.append(trained_quantized(shop, tried[0], compact, validation))
        return report_quantized(shop, validation, steps, tried)


def check_plan(recipe: Recipe) -> None:
    """Refuse rules that no site or target can follow, before anything is trained."""
    if recipe.quantize is None:
        return
    if recipe.quantize.backend == "nncf":
        load_nncf()  # there are no rules; what can be missing is NNCF
    else:
        plan_recipe(recipe)


def plan_recipe(recipe: Recipe) -> Plan:
    """The plan of a recipe; needs its network's shape, no data."""
    assert recipe.quantize is not None
    if recipe.model.checkpoint is not None:
        model = load_checkpoint(recipe.model.checkpoint, recipe.model.arch)
    else:
        assert recipe.model.arch is not None
        model = build_model(recipe.model.arch)
    compact = rewrite(model, recipe.rewrite)
    return planned(compact, recipe.quantize, recipe.data.resolution)[1]


def float_model(shop: Workshop, validation: Samples) -> Care:
    """Load the recipe's checkpoint, or train when it has a train section."""
    recipe, run = shop.recipe, shop.run
    if recipe.train is None:
        assert recipe.model.checkpoint is not None
        path = resolve_checkpoint(recipe.model.checkpoint)
        with shop.stage("load"):
            model = load_checkpoint(path, recipe.model.arch)
        check_classes(validation, model.num_classes)
        run.record_input("checkpoint", {"path": str(path), "sha256": sha256_file(path)})
        shop.console.print(
            f"loaded {model.arch} with {model.num_classes} classes from {escape(str(path))}",
            soft_wrap=True,
        )
        return model
    return trained(shop, validation)


def trained(shop: Workshop, validation: Samples) -> Care:
    """Train, or resume training, and keep the weights in ``float/model.safetensors``."""
    recipe, run, world = shop.recipe, shop.run, shop.world
    assert recipe.train is not None
    samples = open_samples(recipe.data, "train")
    if samples.classes != validation.classes:
        raise DataError(
            f"train has classes {samples.classes[:3]}..., val has {validation.classes[:3]}...; "
            "they must be the same.",
            "add the missing class folders, or list all classes in data.classes",
        )

    distill = recipe.train.distill
    teacher = None if distill is None else open_predictor(distill.teacher, world.device)
    with shop.stage("train"):
        model, progress = train_network(
            recipe,
            samples,
            teacher,
            _validating(shop, validation),
            run.path / "float",
            world,
            shop.console,
            shop.bad,
        )
    if world.is_main:
        run.record_input("training_images", samples.fingerprint())
        path = run.path / "float" / "model.safetensors"
        top1 = f"{progress.history[-1]['top1']:.2f}"
        made_by = f"make quantize RECIPE={recipe.name}"
        save_checkpoint(
            model, path, {"made_by": made_by, "seed": str(recipe.seed), "validation_top1": top1}
        )
        run.record_output(path)
        run.write_json("float/history.json", {"validations": progress.history})
        shop.console.print(f"trained {model.arch}: {escape(str(path))}", soft_wrap=True)
    return model


def rewritten(shop: Workshop, model: Care) -> tuple[CompactCare, list[RewriteStep]]:
    """Apply the exact rewrites and show what each of them saves."""
    with shop.stage("rewrite"):
        compact, steps = rewrite_in_steps(model, shop.recipe.rewrite, shop.recipe.data.resolution)
    shop.console.print(rewrite_table(steps))
    return compact, steps


def evaluated(shop: Workshop, model: CompactCare, validation: Samples) -> Accuracy:
    """Top-1 and top-5 on the validation images."""
    with shop.stage("evaluate"):
        chosen = spread_indices(len(validation), shop.recipe.evaluate.images)
        return _measure(shop, model, validation, chosen)


def quantized(shop: Workshop, compact: CompactCare, validation: Samples) -> Candidate:
    """PTQ on calibration images of the training split; kept in ``ptq/``."""
    section, world = shop.recipe.quantize, shop.world
    assert section is not None
    path = shop.run.path / "ptq" / MODEL_FILES[section.backend]
    if world.is_main:
        compact.to(world.device)
        chosen = calibration_images(shop, compact)
        with shop.stage("ptq"):
            if section.backend == "nncf":
                _ptq_by_nncf(shop, compact, chosen, validation, path)
            else:
                _ptq_by_torchao(shop, compact, chosen, path)
        shop.run.record_output(path)
        compact.cpu()
    world.wait()
    return _candidate(shop, "ptq", path, compact, validation)


def _ptq_by_torchao(
    shop: Workshop, compact: CompactCare, chosen: CalibrationSet, path: Path
) -> None:
    recipe, section = shop.recipe, shop.recipe.quantize
    assert section is not None
    batches = _passes(shop, chosen)
    result = quantize_network(compact, section, recipe.data.resolution, recipe.seed, batches)
    save_quantized(result.model.cpu(), section, recipe.rewrite, path)


def _ptq_by_nncf(
    shop: Workshop, compact: CompactCare, chosen: CalibrationSet, validation: Samples, path: Path
) -> None:
    recipe, section = shop.recipe, shop.recipe.quantize
    assert section is not None
    nncf = section.nncf or NncfSection()
    control = _accuracy_control(shop, validation) if nncf.accuracy_control else None
    calibration = _counted(shop, chosen)
    quantize_openvino(compact, nncf, recipe.data.resolution, calibration, control, path)


def _accuracy_control(shop: Workshop, validation: Samples) -> AccuracyControl:
    """Evenly spaced validation images, kept as pixels: the search looks at them many times."""
    recipe = shop.recipe
    wanted = min(CONTROL_IMAGES, recipe.evaluate.images or CONTROL_IMAGES)
    transform = EvalTransform(recipe.data.resolution, recipe.data.crop_pct, recipe.data.exif_rotate)
    batches = evaluation_batches(
        validation,
        transform,
        recipe.evaluate.batch_size,
        recipe.data,
        bad=shop.bad,
        indices=spread_indices(len(validation), wanted),
    )
    with contextlib.closing(batches):
        items = [(batch.images, batch.labels) for batch in batches]
    assert recipe.budget.max_top1_drop is not None  # the recipe's own check
    return AccuracyControl(recipe.budget.max_top1_drop, items, recipe.data)


def _passes(shop: Workshop, chosen: CalibrationSet) -> Batches:
    """What starts a pass over the calibration images."""
    data, section = shop.recipe.data, shop.recipe.quantize
    assert section is not None
    size = section.calibrate.batch_size
    return lambda: chosen.batches(data, size, shop.world.device)


def _counted(shop: Workshop, chosen: CalibrationSet) -> Calibration:
    section = shop.recipe.quantize
    assert section is not None
    count = math.ceil(len(chosen.indices) / section.calibrate.batch_size)
    return Calibration(_passes(shop, chosen), count)


def _candidate(
    shop: Workshop, name: str, path: Path, compact: CompactCare, validation: Samples
) -> Candidate:
    """What was written, read again and measured beside the float model."""
    recipe, section = shop.recipe, shop.recipe.quantize
    assert section is not None
    plan = None
    if section.backend == "torchao":
        plan = planned(compact, section, recipe.data.resolution)[1]
    model = open_predictor(str(path), shop.world.device)
    return Candidate(name, path, _compared(shop, compact, model, validation), plan)


def calibration_images(shop: Workshop, compact: CompactCare) -> CalibrationSet:
    """Choose them, and write the list into the run."""
    recipe, section = shop.recipe, shop.recipe.quantize
    assert section is not None
    samples = open_samples(recipe.data, "train")
    with shop.stage("select"):
        features = deep_features(compact, samples, recipe.data)
        chosen = select_images(samples, section.calibrate, recipe.seed, features)
        path = shop.run.write_json("calibration.json", chosen.listing())
    shop.run.record_input(
        "calibration",
        {"list": path.name, "sha256": sha256_file(path), "images": len(chosen.indices)},
    )
    shop.console.print(
        f"calibrating on {len(chosen.indices)} training images ({escape(chosen.method)})"
    )
    return chosen


def trained_quantized(
    shop: Workshop, start: Candidate, compact: CompactCare, validation: Samples
) -> Candidate:
    """QAT from the PTQ result; kept in ``qat/``."""
    section = shop.recipe.quantize
    assert section is not None
    path = shop.run.path / "qat" / MODEL_FILES[section.backend]
    with shop.stage("qat"):
        train = _qat_by_nncf if section.backend == "nncf" else _qat_by_torchao
        progress = train(shop, start, compact, validation, path)
    if shop.world.is_main:
        shop.run.record_output(path)
        shop.run.write_json("qat/history.json", {"validations": progress.history})
    shop.world.wait()
    return _candidate(shop, "qat", path, compact, validation)


def _qat_by_torchao(
    shop: Workshop, start: Candidate, compact: CompactCare, validation: Samples, path: Path
) -> Progress:
    recipe, section = shop.recipe, shop.recipe.quantize
    assert section is not None and section.qat is not None
    model, progress = train_quantized(
        load_quantized(start.path),
        compact,
        recipe,
        section.qat,
        open_samples(recipe.data, "train"),
        _validating(shop, validation),
        path.parent,
        shop.world,
        shop.console,
        shop.bad,
    )
    if shop.world.is_main:
        save_quantized(model, section, recipe.rewrite, path)
    return progress


def _qat_by_nncf(
    shop: Workshop, start: Candidate, compact: CompactCare, validation: Samples, path: Path
) -> Progress:
    """From PTQ's calibration images, not its file: an OpenVINO model cannot be trained."""
    recipe, section = shop.recipe, shop.recipe.quantize
    assert section is not None and section.qat is not None
    samples = open_samples(recipe.data, "train")
    return train_openvino(
        compact,
        section.qat,
        section.nncf or NncfSection(),
        recipe,
        _counted(shop, read_list(shop.run.path / "calibration.json", samples)),
        samples,
        _validating(shop, validation),
        path,
        shop.world,
        shop.console,
        shop.bad,
    )


def report_float(
    shop: Workshop, validation: Samples, steps: list[RewriteStep], accuracy: Accuracy
) -> dict[str, Any]:
    """Results of a recipe without a quantize section."""
    results = _results(shop, validation, steps, accuracy)
    _finish(shop, results)
    shop.console.print(
        f"[bold]top-1 {accuracy.top1:.2f} %[/]  top-5 {accuracy.top5:.2f} %  "
        f"on {accuracy.images:,} images (float32)"
    )
    return results


def report_quantized(
    shop: Workshop, validation: Samples, steps: list[RewriteStep], tried: list[Candidate]
) -> dict[str, Any]:
    """Results of a quantized recipe: the last candidate, unless it ended below the first."""
    best = max(reversed(tried), key=lambda candidate: candidate.paired.candidate.correct)
    section = shop.recipe.quantize
    assert section is not None
    results = {
        **_results(shop, validation, steps, best.paired.candidate),
        "float": {
            "top1": best.paired.baseline.top1,
            "top5": best.paired.baseline.top5,
        },
        "backend": section.backend,
        "kept": best.name,
        "model": str(best.path.relative_to(shop.run.path)),
        "candidates": {candidate.name: candidate.paired.as_json() for candidate in tried},
        **({} if best.plan is None else {"plan": _plan_in_short(best.plan)}),
        "pending_stages": list(PENDING_STAGES),
    }
    _finish(shop, results)
    named = [(candidate.name, candidate.paired) for candidate in tried]
    shop.console.print(quantized_table(named, best.name))
    if best is not tried[-1]:
        shop.console.print(
            f"[yellow]{tried[-1].name} ended below {best.name}[/], so the {best.name} weights "
            "are kept; try a lower quantize.qat.learning_rate"
        )
    shop.console.print(f"quantized model: {escape(str(best.path))}", soft_wrap=True)
    measured = "the file" if section.backend == "nncf" else "the simulation"
    shop.console.print(
        f"Accuracy is that of {measured}: {' and '.join(PENDING_STAGES)} are not part of this "
        "version."
    )
    return results


def _plan_in_short(plan: Plan) -> dict[str, Any]:
    return {
        "target": plan.target,
        "macs": plan.macs_by_precision(),
        "energy_mj": plan.energy_mj,
    }


def _results(
    shop: Workshop, validation: Samples, steps: list[RewriteStep], accuracy: Accuracy
) -> dict[str, Any]:
    """What every kind of recipe reports."""
    recipe = shop.recipe
    return {
        "run": shop.run.name,
        "recipe": recipe.name,
        "precision": recipe.precision,
        "accuracy": {"images": accuracy.images, "top1": accuracy.top1, "top5": accuracy.top5},
        "rewrites": [{"name": step.name, **asdict(step.cost)} for step in steps],
        "data": {
            "source": recipe.data.source,
            "fingerprint": validation.fingerprint(),
            "classes": list(validation.classes),
            "skipped_images": shop.bad.reasons,
        },
        "seconds": shop.seconds,
    }


def _finish(shop: Workshop, results: dict[str, Any]) -> None:
    """Write ``results.json`` and say where."""
    if not shop.world.is_main:
        return
    path = shop.run.write_json("results.json", results)
    if len(shop.bad):
        shop.console.print(f"[yellow]{len(shop.bad)} images could not be decoded and were skipped")
    shop.console.print(f"results: {escape(str(path))}", soft_wrap=True)


def _validating(shop: Workshop, validation: Samples) -> Validate:
    """What a training calls to know how it is doing; each process counts its share."""

    def validate(candidate: nn.Module) -> tuple[int, int]:
        chosen = spread_indices(len(validation), shop.recipe.evaluate.images)
        share = chosen[slice(*shop.world.share(len(chosen)))]
        accuracy = _measure(shop, candidate, validation, share)
        return accuracy.images, accuracy.correct

    return validate


def _compared(
    shop: Workshop, compact: CompactCare, model: Predictor, validation: Samples
) -> Paired:
    """The quantized model beside the float one, on the validation images."""
    recipe, device = shop.recipe, shop.world.device
    classes = len(validation.classes)
    with shop.stage("evaluate"):
        return measure_pair(
            TorchPredictor(compact, classes, device),
            model,
            validation,
            recipe.data,
            batch_size=recipe.evaluate.batch_size,
            indices=spread_indices(len(validation), recipe.evaluate.images),
            bad=shop.bad,
            console=shop.console,
            device=device,
        )


@contextlib.contextmanager
def _opened(run: Run, recipe: Recipe, world: World) -> Iterator[Run]:
    """Only the main process holds and writes the run directory."""
    if not world.is_main:
        yield run
        return
    with run.open(recipe, machine.describe()):
        yield run


def _measure(
    shop: Workshop, model: nn.Module, validation: Samples, indices: Sequence[int]
) -> Accuracy:
    predict = TorchPredictor(model, len(validation.classes), shop.world.device)
    return measure_accuracy(
        predict,
        validation,
        shop.recipe.data,
        batch_size=shop.recipe.evaluate.batch_size,
        indices=indices,
        bad=shop.bad,
        console=shop.console,
        device=shop.world.device,
    )
