"""What a user asks before or beside a run: which site costs accuracy, which images calibrate."""

import contextlib
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from care_compress.console import progress_bar
from care_compress.data.loader import prepared_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.data.sources import open_samples
from care_compress.errors import RecipeError
from care_compress.files import fingerprint
from care_compress.model.checkpoint import load_checkpoint, state_digest
from care_compress.model.rewrite import rewrite
from care_compress.pipeline import rewritten
from care_compress.preflight import check_recipe, own_section
from care_compress.quantize.plots import plot_sensitivity, short_name
from care_compress.quantize.ptq import quantize_network
from care_compress.quantize.selection import deep_features, select_images, write_list
from care_compress.quantize.sensitivity import Sensitivity, measure_sensitivity, quantized_sites
from care_compress.quantize.stages import calibration_images, ptq_job
from care_compress.recipe.recipe import Recipe
from care_compress.run.context import Workshop, opened
from care_compress.run.directory import Run
from care_compress.run.processes import World
from care_compress.train.stage import float_model

BATCH = 64
SHOWN = 15


def run_sensitivity(
    recipe: Recipe, runs: Path, name: str, images: int, console: Console
) -> list[Sensitivity]:
    """Measure, draw and list every site of a recipe's PTQ result."""
    # Corrections and learned rounding mend the error of all sites at once: with them in, switching
    # a site off would not lead back to the float model.
    section = own_section(recipe).model_copy(
        update={"bias_correction": False, "norm_reestimation": False, "reconstruct": None}
    )
    check_recipe(recipe, World())
    with opened(Run(runs, name), recipe, World()) as run:
        shop = Workshop(recipe, run, World(), console)
        validation = open_samples(recipe.data, "val")
        compact, _ = rewritten(shop, float_model(shop, validation))
        chosen = calibration_images(shop, compact)
        model = quantize_network(ptq_job(shop, compact, chosen), section).model
        if not quantized_sites(model):
            raise RecipeError(f"{recipe.name} quantizes no site.", "add a rule with integer bits")
        batches, labels = _images(shop, validation, images)
        key = fingerprint(
            {
                "model": state_digest(model.state_dict()),
                "plan": [str(decision) for decision in model.plan.decisions],
                "images": validation.content_digest(),
                "data": recipe.data.model_dump(mode="json", exclude={"workers"}),
                "count": len(labels),
            }
        )
        with progress_bar(console, "sites", len(quantized_sites(model))) as advance:
            found = measure_sensitivity(
                model, batches, labels, run.path / "sensitivity.json", key, advance
            )
        run.record_output(run.path / "sensitivity.json")
        plot = run.path / "sensitivity.svg"
        plot_sensitivity(found, plot)
        run.record_output(plot)
        console.print(sensitivity_table(found, len(labels)))
        console.print(
            f"all {len(found)} sites: {escape(str(run.path / 'sensitivity.json'))}, "
            f"plot: {escape(str(plot))}",
            soft_wrap=True,
        )
    return found


def select_calibration(recipe: Recipe, out: Path, console: Console) -> None:
    """Write the calibration list that a recipe would use."""
    if recipe.quantize is None or recipe.model.checkpoint is None:
        raise RecipeError(
            f"{recipe.name} calibrates no given checkpoint.",
            "name a quantized recipe such as int8_ptq, and its --ckpt",
        )
    network = rewrite(load_checkpoint(recipe.model.checkpoint, recipe.model.arch), recipe.rewrite)
    samples = open_samples(recipe.data, "train")
    features = deep_features(network, samples, recipe.data)
    skip_bad = recipe.data.skip_bad_images
    chosen = select_images(samples, recipe.quantize.calibrate, recipe.seed, features, skip_bad)
    write_list(out, chosen)
    console.print(
        f"{len(chosen.indices)} of {len(samples):,} training images ({chosen.method}): {out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _images(
    shop: Workshop, validation: Samples, count: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Evenly spaced validation images, held in memory: every site sees them twice."""
    indices = spread_indices(len(validation), count)
    loaded = prepared_batches(validation, shop.recipe.data, BATCH, bad=shop.bad, indices=indices)
    with contextlib.closing(loaded):
        batches = list(loaded)
    return [batch.images for batch in batches], torch.cat([batch.labels for batch in batches])


def sensitivity_table(found: list[Sensitivity], images: int) -> Table:
    """The hardest sites."""
    table = Table(title=f"Hardest sites, {images:,} validation images", title_justify="left")
    table.add_column("site", no_wrap=True)
    for column in ("alone", "KL", "top-1", "left out", "top-1"):
        table.add_column(column, justify="right")
    for one in found[:SHOWN]:
        table.add_row(
            short_name(one.site),
            f"{one.alone.sqnr_db:.1f} dB",
            f"{one.alone.kl:.1e}",
            f"{-one.alone.top1:+.2f}",
            f"{one.left_out.sqnr_db:.1f} dB",
            f"{-one.left_out.top1:+.2f}",
        )
    return table
