"""``care-compress sensitivity``: which site of a recipe costs accuracy, in a run of its own."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from care_compress.compression import calibration_images
from care_compress.data.loader import evaluation_batches
from care_compress.data.samples import Samples
from care_compress.data.sources import open_samples
from care_compress.data.transforms import EvalTransform, normalize
from care_compress.evaluate.accuracy import spread_indices
from care_compress.evaluate.plots import plot_sensitivity, short_name
from care_compress.pipeline import check_plan, float_model, rewritten
from care_compress.quantize.ptq import quantize_network
from care_compress.quantize.sensitivity import Sensitivity, measure_sensitivity
from care_compress.recipe import Recipe
from care_compress.run import Run, fingerprint, state_digest
from care_compress.train.distributed import World
from care_compress.workshop import Workshop, opened

BATCH = 64
SHOWN = 15


def run_sensitivity(
    recipe: Recipe, runs: Path, name: str, images: int, console: Console
) -> list[Sensitivity]:
    """Measure, draw and list every site of a recipe's PTQ result."""
    check_plan(recipe)
    assert recipe.quantize is not None
    section = recipe.quantize
    with opened(Run(runs, name), recipe, World()) as run:
        shop = Workshop(recipe, run, World(), console)
        validation = open_samples(recipe.data, "val")
        compact, _ = rewritten(shop, float_model(shop, validation))
        chosen = calibration_images(shop, compact)
        model = quantize_network(
            compact,
            section,
            recipe.data.resolution,
            recipe.seed,
            lambda: chosen.batches(recipe.data, section.calibrate.batch_size, torch.device("cpu")),
        ).model
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
        with _progress(console) as advance:
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


def _images(
    shop: Workshop, validation: Samples, count: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Evenly spaced validation images, held in memory: every site sees them twice."""
    data = shop.recipe.data
    transform = EvalTransform(data.resolution, data.crop_pct, data.exif_rotate)
    indices = spread_indices(len(validation), count)
    loaded = evaluation_batches(validation, transform, BATCH, data, bad=shop.bad, indices=indices)
    batches, labels = [], []
    with contextlib.closing(loaded):
        for batch in loaded:
            batches.append(normalize(batch.images, data.mean, data.std))
            labels.append(batch.labels)
    return batches, torch.cat(labels)


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


@contextlib.contextmanager
def _progress(console: Console) -> Any:
    bar = Progress(
        TextColumn("sites"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
