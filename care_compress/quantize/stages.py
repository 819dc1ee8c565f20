"""The quantize stages: calibration images, PTQ with the search for bits, QAT, sensitivity.

They make models and score none: what has to be judged on the way is judged by functions handed in.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from care_compress.console import progress_bar, step_line
from care_compress.data.loader import images_at_once, pixel_batches, prepared_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.errors import RecipeError
from care_compress.files import digest_of, fingerprint, model_files, sha256_file
from care_compress.machine import installed_versions
from care_compress.model.checkpoint import state_digest
from care_compress.model.compact import CompactCare
from care_compress.quantize.artifact import load_saved, save_quantized
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
from care_compress.quantize.plots import plot_sensitivity, plot_trials, short_name
from care_compress.quantize.ptq import PtqJob, first_images, quantize_network
from care_compress.quantize.qat import train_quantized
from care_compress.quantize.search import (
    Found,
    MeasureNoises,
    Trial,
    noises_here,
    search_bits,
)
from care_compress.quantize.selection import CalibrationSet, deep_features, read_list, select_images
from care_compress.quantize.sensitivity import (
    MeasureSites,
    Sensitivity,
    SiteJob,
    measure_sensitivity,
    quantized_sites,
)
from care_compress.recipe.quantize import NncfSection, QatSection, QuantizeSection
from care_compress.recipe.recipe import Recipe
from care_compress.run.context import RunContext
from care_compress.run.stages import EVERYTHING, once, recipe_parts
from care_compress.tasks.known import labelled, task_called
from care_compress.train.loop import Validate
from care_compress.train.stage import training_in

# How each backend keeps its models.
MODEL_FILES = {"torchao": "model.safetensors", "nncf": "model.xml"}
CALIBRATION_FILE = "calibration.json"
SITE_BATCH = 64  # of the images that every site is measured on
SHOWN_SITES = 15  # the hardest; the JSON has all
UNITS = {"bit_operations": "bit operations of one image", "energy": "energy of one image (mJ)"}
# A simulation, and images of a data set; its drop there in points of the task.
Judge = Callable[[QuantizedCare, Samples, Sequence[int]], float]


def quantized(
    context: RunContext,
    recipe: Recipe,
    section: QuantizeSection,
    compact: CompactCare,
    judge: Judge,
    measure: MeasureNoises = noises_here,
) -> Path:
    """PTQ on calibration images of the training split; kept in ``ptq/``.

    `measure` takes a search's measurements. Wherever they are taken they are the same, so it is
    nothing that the stage is made from.
    """
    world, path = context.world, context.run.path / "ptq" / MODEL_FILES[section.backend]

    def make() -> None:
        images = _calibration(context, recipe, section, chosen)
        with context.stage("ptq"):
            if section.backend == "nncf":
                _ptq_by_nncf(context, recipe, section, compact, images, chosen, path)
            else:
                _ptq_by_torchao(
                    context, recipe, section, compact, images.batches, chosen, judge, measure, path
                )
        _record_model(context, path)

    if world.is_main:
        compact.to(world.device)
        chosen = calibration_images(context, recipe, section, compact)
        made_from = {
            **recipe_parts(recipe)["ptq"],
            **made_from_network(section, compact),
            "calibration images": chosen.listing(),
            "images to choose by": chosen.samples.content_digest() if section.searches else None,
        }
        once(context, "ptq", made_from, make, handed_in=[judge] if section.searches else [])
        compact.cpu()
    world.wait()
    return path


def trained_quantized(
    context: RunContext,
    recipe: Recipe,
    section: QuantizeSection,
    qat: QatSection,
    compact: CompactCare,
    teacher: CompactCare,
    start: Path,
    validate: Validate,
) -> Path:
    """QAT from the PTQ result `start`; kept in ``qat/``.

    `teacher` is the float network it follows: `compact` itself, or the whole one it was cut from.
    """
    path = context.run.path / "qat" / MODEL_FILES[section.backend]
    samples, listed = labelled(recipe, "train"), context.run.path / CALIBRATION_FILE

    def make() -> None:
        with context.stage("qat"):
            training = training_in(context, recipe, samples, validate, "qat")
            if section.backend == "nncf":
                # From the calibration images, not PTQ's file: an OpenVINO model cannot be trained.
                nncf = section.nncf or NncfSection()
                images = _calibration(context, recipe, section, read_list(listed, samples))
                progress = train_openvino(
                    compact, teacher, qat, nncf, section.full_range, images, training, path
                )
            else:
                saved = load_saved(start)
                model, progress = train_quantized(saved.model, teacher, qat, training)
                if context.world.is_main:
                    save_quantized(model, saved.section, recipe.rewrite, path)
                    # The channels were watched in the float model, which training leaves behind.
                    health = read_health(start.with_name("health.json")) or Health()
                    images = _calibration(context, recipe, section, read_list(listed, samples))
                    _keep_health(context, model, health, images.batches, path)
        if context.world.is_main:
            _record_model(context, path)
            context.run.write_json("qat/history.json", {"validations": progress.history})

    made_from = {
        **recipe_parts(recipe)["qat"],
        **made_from_network(section, compact),
        "ptq": digest_of(start),
        "teacher": state_digest(teacher.state_dict()),
        "training images": samples.content_digest(),
    }
    once(context, "qat", made_from, make, together=True, handed_in=[validate])
    context.world.wait()
    return path


def made_from_network(section: QuantizeSection, compact: CompactCare) -> dict[str, object]:
    """What every stage of a quantized network is made from beside its part of the recipe."""
    given: dict[str, object] = {"float model": state_digest(compact.state_dict())}
    if section.backend == "nncf":
        given["packages"] = installed_versions(EVERYTHING)
    return given


def calibration_images(
    context: RunContext, recipe: Recipe, section: QuantizeSection, compact: CompactCare
) -> CalibrationSet:
    """Choose images and write the list into the run; it is read from there, whoever wrote it."""
    samples = labelled(recipe, "train")

    def choose() -> None:
        with context.stage("select"):
            features = deep_features(compact, samples, recipe.data)
            skip_bad = recipe.data.skip_bad_images
            chosen = select_images(
                samples, section.calibrate, recipe.seed, features, skip_bad, context.bad
            )
            path = context.run.write_json(CALIBRATION_FILE, chosen.listing())
        about = {"list": path.name, "sha256": sha256_file(path), "images": len(chosen.indices)}
        context.run.record_input("calibration", about)
        context.console.print(
            f"calibrating on {len(chosen.indices)} training images ({escape(chosen.method)})"
        )

    given = section.calibrate.list
    made_from = {
        **recipe_parts(recipe)["calibration"],
        **made_from_network(section, compact),
        "training images": samples.content_digest(),
        "list": given and sha256_file(Path(given)),
    }
    once(context, "calibration", made_from, choose)
    return read_list(context.run.path / CALIBRATION_FILE, samples)


def measure_sites(
    context: RunContext,
    recipe: Recipe,
    section: QuantizeSection,
    compact: CompactCare,
    validation: Samples,
    count: int,
    measure: MeasureSites,
) -> list[Sensitivity]:
    """Measure every site of the PTQ result on `count` evenly spaced validation images."""
    run, console = context.run, context.console
    chosen = calibration_images(context, recipe, section, compact)
    # Corrections and learned rounding mend the error of all sites at once: with them in, switching
    # a site off would not lead back to the float model.
    plain = section.model_copy(
        update={"bias_correction": False, "norm_reestimation": False, "reconstruct": None}
    )
    calibration = _calibration(context, recipe, plain, chosen)
    job = PtqJob(compact, recipe.data.resolution, recipe.seed, calibration.batches)
    model = quantize_network(job, plain).model
    sites = quantized_sites(model)
    if not sites:
        raise RecipeError(f"{recipe.name} quantizes no site.", "add a rule with integer bits")
    # Held in memory: every site sees them twice.
    indices = spread_indices(len(validation), count)
    loaded = prepared_batches(validation, recipe.data, SITE_BATCH, bad=context.bad, indices=indices)
    with contextlib.closing(loaded):
        batches = list(loaded)
    task = task_called(recipe.task)
    site_job = SiteJob(task, model, plain, recipe.rewrite, tuple(batches))
    key = fingerprint(
        {
            "model": state_digest(model.state_dict()),
            "plan": [str(decision) for decision in model.plan.decisions],
            "images": validation.content_digest(),
            "data": recipe.data.model_dump(mode="json", exclude={"workers"}),
            "count": site_job.images,
        }
    )
    measured, plot = run.path / "sensitivity.json", run.path / "sensitivity.svg"
    with progress_bar(console, "sites", len(sites)) as advance:
        found = measure_sensitivity(site_job, measured, key, advance, measure)
    run.record_output(measured)
    plot_sensitivity(found, plot)
    run.record_output(plot)
    console.print(sensitivity_table(found, task.metric.name, site_job.images))
    console.print(
        f"all {len(found)} sites: {escape(str(measured))}, plot: {escape(str(plot))}",
        soft_wrap=True,
    )
    return found


def sensitivity_table(found: list[Sensitivity], metric: str, images: int) -> Table:
    """The hardest sites."""
    table = Table(title=f"Hardest sites, {images:,} validation images", title_justify="left")
    table.add_column("site", no_wrap=True)
    for column in ("alone", "KL", metric, "left out", metric):
        table.add_column(column, justify="right")
    for one in found[:SHOWN_SITES]:
        table.add_row(
            short_name(one.site),
            f"{one.alone.sqnr_db:.1f} dB",
            f"{one.alone.kl:.1e}",
            f"{-one.alone.drop:+.2f}",
            f"{one.left_out.sqnr_db:.1f} dB",
            f"{-one.left_out.drop:+.2f}",
        )
    return table


def _ptq_by_torchao(
    context: RunContext,
    recipe: Recipe,
    section: QuantizeSection,
    compact: CompactCare,
    batches: Batches,
    chosen: CalibrationSet,
    judge: Judge,
    measure: MeasureNoises,
    path: Path,
) -> None:
    job = PtqJob(compact, recipe.data.resolution, recipe.seed, batches)
    if section.search is not None:
        found = _searched(context, recipe, section, job, chosen, judge, measure)
        made, section = found.quantized, found.section
    else:
        with step_line(context.console) as notify:
            made = quantize_network(replace(job, notify=notify), section)
    context.run.write_json("ptq/tuning.json", asdict(made.tuning))
    if str(made.tuning):
        where = escape(str(path.parent / "tuning.json"))
        context.console.print(f"{made.tuning}: {where}", soft_wrap=True, highlight=False)
    save_quantized(made.model.cpu(), section, recipe.rewrite, path)
    _keep_health(context, made.model, made.health, batches, path)


def _searched(
    context: RunContext,
    recipe: Recipe,
    section: QuantizeSection,
    job: PtqJob,
    chosen: CalibrationSet,
    judge: Judge,
    measure: MeasureNoises,
) -> Found:
    """Bits per site by trial; the trail and its picture are kept in ``ptq/``."""
    console, search, max_drop = context.console, section.search, recipe.budget.max_drop
    assert search is not None and max_drop is not None  # the recipe's own check

    def show(trial: Trial) -> None:
        within = "within" if trial.within else "over"
        console.print(
            f"trial: {trial.steps} steps, cost {trial.cost:.4g}, "
            f"drop {trial.drop:.2f} points ({within} budget)",
            highlight=False,
        )

    console.print("measuring every site at every precision")
    held_back = chosen.held_back(search.images)

    def drop_of(model: QuantizedCare) -> float:
        return judge(model, chosen.samples, held_back)

    found = search_bits(job, section, max_drop, drop_of, show, measure)
    trials = [asdict(trial) for trial in found.trials]
    context.run.write_json("ptq/trials.json", {"cost": search.cost, "trials": trials})
    picture = context.run.path / "ptq" / "trials.svg"
    metric = task_called(recipe.task).metric.name
    plot_trials(found.trials, max_drop, metric, UNITS[search.cost], picture)
    context.run.record_output(picture)
    console.print(f"trials: {escape(str(picture))}", soft_wrap=True)
    if search.max_cost is not None and found.cost > search.max_cost:
        console.print(
            f"[yellow]max_cost {search.max_cost:.4g} was not reached[/] within "
            f"{max_drop} points; the cheapest found costs {found.cost:.4g}"
        )
    return found


def _ptq_by_nncf(
    context: RunContext,
    recipe: Recipe,
    section: QuantizeSection,
    compact: CompactCare,
    calibration: Calibration,
    chosen: CalibrationSet,
    path: Path,
) -> None:
    nncf, control = section.nncf or NncfSection(), None
    if nncf.accuracy_control:
        # Evenly spaced, and kept as pixels: the search looks at them many times.
        wanted = min(CONTROL_IMAGES, recipe.evaluate.images or CONTROL_IMAGES)
        indices = chosen.held_back(wanted)
        size = images_at_once(recipe.evaluate.batch_size, context.world.device)
        batches = pixel_batches(chosen.samples, recipe.data, indices, size, context.bad)
        assert recipe.budget.max_drop is not None  # the recipe's own check
        task = task_called(recipe.task)
        control = AccuracyControl(task, recipe.budget.max_drop, list(batches), recipe.data)
    with step_line(context.console) as notify:
        notify("NNCF is quantizing")
        quantize_openvino(
            compact, nncf, section.full_range, recipe.data.resolution, calibration, control, path
        )


def _calibration(
    context: RunContext, recipe: Recipe, section: QuantizeSection, chosen: CalibrationSet
) -> Calibration:
    """What starts a pass over the calibration images, and of how many batches."""
    size = section.calibrate.batch_size
    count = math.ceil(len(chosen.indices) / size)
    return Calibration(lambda: chosen.batches(recipe.data, size, context.world.device), count)


def _record_model(context: RunContext, path: Path) -> None:
    for part in model_files(path):
        context.run.record_output(part)


def _keep_health(
    context: RunContext, model: QuantizedCare, health: Health, batches: Batches, path: Path
) -> None:
    """Count what the ranges cut off, and keep it beside the model."""
    images = first_images(batches, IMAGES)
    found = replace(health, counted=len(images), cut=share_cut(model.to(images.device), images))
    name = path.with_name("health.json").relative_to(context.run.path)
    context.run.write_json(str(name), asdict(found))
