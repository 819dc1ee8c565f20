"""The quantize stages: PTQ, the search for bits and QAT, by either backend."""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.markup import escape

from care_compress.console import step_line
from care_compress.data.loader import pixel_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.data.sources import open_samples
from care_compress.evaluate.pairs import Paired
from care_compress.evaluate.run_accuracy import batch_size, compared
from care_compress.files import digest_of, model_files, sha256_file
from care_compress.model.checkpoint import state_digest
from care_compress.model.compact import CompactCare
from care_compress.quantize.artifact import load_quantized, quantized_section, save_quantized
from care_compress.quantize.calibrate import Batches
from care_compress.quantize.health import IMAGES, Health, read_health, share_cut
from care_compress.quantize.nncf_ptq import (
    CONTROL_IMAGES,
    AccuracyControl,
    Calibration,
    quantize_openvino,
)
from care_compress.quantize.nncf_qat import train_openvino
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.plots import plot_trials
from care_compress.quantize.ptq import PtqJob, first_images, quantize_network
from care_compress.quantize.qat import train_quantized
from care_compress.quantize.search import Found, Trial, search_bits
from care_compress.quantize.selection import CalibrationSet, deep_features, read_list, select_images
from care_compress.quantize.spec import Plan
from care_compress.recipe.quantize import NncfSection
from care_compress.run.context import Workshop
from care_compress.run.processes import World
from care_compress.run.stages import EVERYTHING, Json, once, recipe_parts, versions
from care_compress.runtime.artifact import open_predictor
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.train.stage import training_in
from care_compress.train.state import Progress

# How each backend keeps its models.
MODEL_FILES = {"torchao": "model.safetensors", "nncf": "model.xml"}
CALIBRATION_FILE = "calibration.json"
UNITS = {"bit_operations": "bit operations of one image", "energy": "energy of one image (mJ)"}


@dataclass
class Candidate:
    """A compressed model and how it did beside the float one."""

    name: str  # ptq, qat
    path: Path
    paired: Paired
    plan: Plan | None  # of a backend that leaves its placement to the recipe's rules


def quantized(shop: Workshop, compact: CompactCare, validation: Samples) -> Candidate:
    """PTQ on calibration images of the training split; kept in ``ptq/``."""
    section, world = shop.recipe.quantize, shop.world
    assert section is not None
    path = shop.run.path / "ptq" / MODEL_FILES[section.backend]
    if world.is_main:
        compact.to(world.device)
        chosen = calibration_images(shop, compact)
        made_from = {
            **recipe_parts(shop.recipe)["ptq"],
            **_given(shop, compact),
            "calibration images": chosen.listing(),
            "validation images": validation.content_digest() if section.searches else None,
        }
        once(shop, "ptq", made_from, lambda: _ptq(shop, compact, chosen, validation, path))
        compact.cpu()
    world.wait()
    return _candidate(shop, "ptq", path, compact, validation)


def _given(shop: Workshop, compact: CompactCare) -> dict[str, object]:
    """What every stage of quantization is made from beside its part of the recipe."""
    section = shop.recipe.quantize
    assert section is not None
    given: dict[str, object] = {"float model": state_digest(compact.state_dict())}
    if section.backend == "nncf":
        given["packages"] = versions(EVERYTHING)
    return given


def _ptq(
    shop: Workshop, compact: CompactCare, chosen: CalibrationSet, validation: Samples, path: Path
) -> None:
    section = shop.recipe.quantize
    assert section is not None
    with shop.stage("ptq"):
        quantize = _ptq_by_nncf if section.backend == "nncf" else _ptq_by_torchao
        quantize(shop, compact, chosen, validation, path)
    _record_model(shop, path)


def _record_model(shop: Workshop, path: Path) -> None:
    for part in model_files(path):
        shop.run.record_output(part)


def _ptq_by_torchao(
    shop: Workshop, compact: CompactCare, chosen: CalibrationSet, validation: Samples, path: Path
) -> None:
    recipe, section = shop.recipe, shop.recipe.quantize
    assert section is not None
    job = ptq_job(shop, compact, chosen)
    if section.search is not None:
        found = _searched(shop, job, validation)
        made, section = found.quantized, found.section
    else:
        with step_line(shop.console) as notify:
            made = quantize_network(replace(job, notify=notify), section)
    shop.run.write_json("ptq/tuning.json", asdict(made.tuning))
    if str(made.tuning):
        where = escape(str(path.parent / "tuning.json"))
        shop.console.print(f"{made.tuning}: {where}", soft_wrap=True, highlight=False)
    save_quantized(made.model.cpu(), section, recipe.rewrite, path)
    _keep_health(shop, made.model, made.health, _passes(shop, chosen), path)


def _keep_health(
    shop: Workshop, model: QuantizedCare, health: Health, batches: Batches, path: Path
) -> None:
    """Count what the ranges cut off, and keep it beside the model."""
    images = first_images(batches, IMAGES)
    found = replace(health, counted=len(images), cut=share_cut(model.to(images.device), images))
    name = path.with_name("health.json").relative_to(shop.run.path)
    shop.run.write_json(str(name), asdict(found))


def ptq_job(shop: Workshop, compact: CompactCare, chosen: CalibrationSet) -> PtqJob:
    """PTQ of this network on these images."""
    recipe = shop.recipe
    return PtqJob(compact, recipe.data.resolution, recipe.seed, _passes(shop, chosen))


def _searched(shop: Workshop, job: PtqJob, validation: Samples) -> Found:
    """Bits per site by trial; the trail and its picture are kept in ``ptq/``."""
    recipe, section = shop.recipe, shop.recipe.quantize
    assert section is not None and section.search is not None
    assert recipe.budget.max_top1_drop is not None  # the recipe's own check
    images = section.search.images
    # The other processes wait for the search: none of them would count a share.
    alone = replace(shop, world=World(device=shop.world.device))

    def judge(model: QuantizedCare) -> float:
        predict = TorchPredictor(model, model.num_classes, shop.world.device)
        return compared(alone, job.network, predict, validation, images).drop

    def show(trial: Trial) -> None:
        within = "within" if trial.within else "over"
        shop.console.print(
            f"trial: {trial.steps} steps, cost {trial.cost:.4g}, "
            f"drop {trial.drop:.2f} points ({within} budget)",
            highlight=False,
        )

    shop.console.print("measuring every site at every precision")
    found = search_bits(job, section, recipe.budget.max_top1_drop, judge, show)
    shop.run.write_json("ptq/trials.json", {"cost": section.search.cost, "trials": found.trail()})
    picture = shop.run.path / "ptq" / "trials.svg"
    unit = UNITS[section.search.cost]
    plot_trials(found.trials, recipe.budget.max_top1_drop, unit, picture)
    shop.run.record_output(picture)
    shop.console.print(f"trials: {escape(str(picture))}", soft_wrap=True)
    limit = section.search.max_cost
    if limit is not None and found.cost > limit:
        shop.console.print(
            f"[yellow]max_cost {limit:.4g} was not reached[/] within "
            f"{recipe.budget.max_top1_drop} points; the cheapest found costs {found.cost:.4g}"
        )
    return found


def _ptq_by_nncf(
    shop: Workshop, compact: CompactCare, chosen: CalibrationSet, validation: Samples, path: Path
) -> None:
    recipe, section = shop.recipe, shop.recipe.quantize
    assert section is not None
    nncf = section.nncf or NncfSection()
    control = _accuracy_control(shop, validation) if nncf.accuracy_control else None
    calibration = _counted(shop, chosen)
    with step_line(shop.console) as notify:
        notify("NNCF is quantizing")
        quantize_openvino(
            compact,
            nncf,
            section.full_range,
            recipe.data.resolution,
            calibration,
            control,
            path,
        )


def _accuracy_control(shop: Workshop, validation: Samples) -> AccuracyControl:
    """Evenly spaced validation images, kept as pixels: the search looks at them many times."""
    recipe = shop.recipe
    wanted = min(CONTROL_IMAGES, recipe.evaluate.images or CONTROL_IMAGES)
    indices = spread_indices(len(validation), wanted)
    size = batch_size(shop)
    batches = pixel_batches(validation, recipe.data, indices, size, shop.bad)
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
    section, device = shop.recipe.quantize, shop.world.device
    assert section is not None
    simulated = None if section.backend == "nncf" else load_quantized(path)

    def measure() -> Json:
        if simulated is None:
            predict = open_predictor(str(path), device)
        else:
            predict = TorchPredictor(simulated, simulated.num_classes, device)
        return compared(shop, compact, predict, validation).as_record()

    made_from = {
        **recipe_parts(shop.recipe)["evaluate"],
        **_given(shop, compact),
        "model": digest_of(path),
        "validation images": validation.content_digest(),
    }
    counted = once(shop, f"evaluate {name}", made_from, measure, together=True)
    plan = None if simulated is None else simulated.plan
    return Candidate(name, path, Paired.of_record(counted), plan)


def calibration_images(shop: Workshop, compact: CompactCare) -> CalibrationSet:
    """Choose them, and write the list into the run; read from there, whoever wrote it."""
    recipe, section = shop.recipe, shop.recipe.quantize
    assert section is not None
    samples = open_samples(recipe.data, "train")
    given = section.calibrate.list
    made_from = {
        **recipe_parts(recipe)["calibration"],
        **_given(shop, compact),
        "training images": samples.content_digest(),
        "list": given and sha256_file(Path(given)),
    }
    once(shop, "calibration", made_from, lambda: _choose_images(shop, compact, samples))
    return read_list(shop.run.path / CALIBRATION_FILE, samples)


def _choose_images(shop: Workshop, compact: CompactCare, samples: Samples) -> None:
    recipe, section = shop.recipe, shop.recipe.quantize
    assert section is not None
    with shop.stage("select"):
        features = deep_features(compact, samples, recipe.data)
        chosen = select_images(
            samples,
            section.calibrate,
            recipe.seed,
            features,
            recipe.data.skip_bad_images,
            shop.bad,
        )
        path = shop.run.write_json(CALIBRATION_FILE, chosen.listing())
    shop.run.record_input(
        "calibration",
        {"list": path.name, "sha256": sha256_file(path), "images": len(chosen.indices)},
    )
    shop.console.print(
        f"calibrating on {len(chosen.indices)} training images ({escape(chosen.method)})"
    )


def trained_quantized(
    shop: Workshop, start: Candidate, compact: CompactCare, validation: Samples
) -> Candidate:
    """QAT from the PTQ result; kept in ``qat/``."""
    section = shop.recipe.quantize
    assert section is not None
    path = shop.run.path / "qat" / MODEL_FILES[section.backend]
    samples = open_samples(shop.recipe.data, "train")

    def train() -> None:
        with shop.stage("qat"):
            by_backend = _qat_by_nncf if section.backend == "nncf" else _qat_by_torchao
            progress = by_backend(shop, start, compact, samples, validation, path)
        if shop.world.is_main:
            _record_model(shop, path)
            shop.run.write_json("qat/history.json", {"validations": progress.history})

    made_from = {
        **recipe_parts(shop.recipe)["qat"],
        **_given(shop, compact),
        "ptq": digest_of(start.path),
        "training images": samples.content_digest(),
    }
    once(shop, "qat", made_from, train, together=True)
    shop.world.wait()
    return _candidate(shop, "qat", path, compact, validation)


def _qat_by_torchao(
    shop: Workshop,
    start: Candidate,
    compact: CompactCare,
    samples: Samples,
    validation: Samples,
    path: Path,
) -> Progress:
    recipe, section = shop.recipe, shop.recipe.quantize
    assert section is not None and section.qat is not None
    training = training_in(shop, samples, validation, "qat")
    start_model = load_quantized(start.path)
    model, progress = train_quantized(start_model, compact, section.qat, training)
    if shop.world.is_main:
        save_quantized(model, quantized_section(start.path), recipe.rewrite, path)
        chosen = read_list(shop.run.path / CALIBRATION_FILE, samples)
        # The channels were watched in the float model, which training leaves behind.
        watched = read_health(start.path.with_name("health.json")) or Health()
        _keep_health(shop, model, watched, _passes(shop, chosen), path)
    return progress


def _qat_by_nncf(
    shop: Workshop,
    start: Candidate,
    compact: CompactCare,
    samples: Samples,
    validation: Samples,
    path: Path,
) -> Progress:
    """From PTQ's calibration images, not its file: an OpenVINO model cannot be trained."""
    section = shop.recipe.quantize
    assert section is not None and section.qat is not None
    training = training_in(shop, samples, validation, "qat")
    calibration = _counted(shop, read_list(shop.run.path / CALIBRATION_FILE, samples))
    nncf = section.nncf or NncfSection()
    return train_openvino(
        compact, section.qat, nncf, section.full_range, calibration, training, path
    )
