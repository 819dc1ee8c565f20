"""The sensitivity stage: every site of a PTQ result measured, listed and drawn."""

import contextlib

import torch
from rich.markup import escape
from rich.table import Table

from care_compress.console import progress_bar
from care_compress.data.loader import prepared_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.errors import RecipeError
from care_compress.files import fingerprint
from care_compress.model.checkpoint import state_digest
from care_compress.model.compact import CompactCare
from care_compress.quantize.plots import plot_sensitivity, short_name
from care_compress.quantize.ptq import quantize_network
from care_compress.quantize.sensitivity import Sensitivity, measure_sensitivity, quantized_sites
from care_compress.quantize.stages import calibration_images, ptq_job
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.recipe import Recipe
from care_compress.run.context import RunContext

BATCH = 64
SHOWN = 15


def measure_sites(
    context: RunContext,
    recipe: Recipe,
    section: QuantizeSection,
    compact: CompactCare,
    validation: Samples,
    count: int,
) -> list[Sensitivity]:
    """Measure every site of the PTQ result on `count` evenly spaced validation images."""
    run, console = context.run, context.console
    chosen = calibration_images(context, recipe, section, compact)
    # Corrections and learned rounding mend the error of all sites at once: with them in, switching
    # a site off would not lead back to the float model.
    plain = section.model_copy(
        update={"bias_correction": False, "norm_reestimation": False, "reconstruct": None}
    )
    model = quantize_network(ptq_job(context, recipe, plain, compact, chosen), plain).model
    sites = quantized_sites(model)
    if not sites:
        raise RecipeError(f"{recipe.name} quantizes no site.", "add a rule with integer bits")
    # Held in memory: every site sees them twice.
    indices = spread_indices(len(validation), count)
    loaded = prepared_batches(validation, recipe.data, BATCH, bad=context.bad, indices=indices)
    with contextlib.closing(loaded):
        batches = list(loaded)
    images, labels = [one.images for one in batches], torch.cat([one.labels for one in batches])
    key = fingerprint(
        {
            "model": state_digest(model.state_dict()),
            "plan": [str(decision) for decision in model.plan.decisions],
            "images": validation.content_digest(),
            "data": recipe.data.model_dump(mode="json", exclude={"workers"}),
            "count": len(labels),
        }
    )
    measured, plot = run.path / "sensitivity.json", run.path / "sensitivity.svg"
    with progress_bar(console, "sites", len(sites)) as advance:
        found = measure_sensitivity(model, images, labels, measured, key, advance)
    run.record_output(measured)
    plot_sensitivity(found, plot)
    run.record_output(plot)
    console.print(sensitivity_table(found, len(labels)))
    console.print(
        f"all {len(found)} sites: {escape(str(measured))}, plot: {escape(str(plot))}",
        soft_wrap=True,
    )
    return found


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
