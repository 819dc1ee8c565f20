"""What a board chooses among: a run's model in every placement of an engine target.

Whether integers from one layer to the next pay depends on the board's kernels, so a bundle carries
the graphs and ``care_deploy.py tune`` decides there. What each placement loses is simulated here,
on the images that files are compared on; TensorRT has run none of it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

from care_compress.console import widened
from care_compress.data.loader import BadImages
from care_compress.data.samples import spread_indices
from care_compress.errors import ExportError, RunError
from care_compress.evaluate.agreement import Agreement, compare_answers, drop_on_held, hold_images
from care_compress.export.edges import Edges, count_edges
from care_compress.export.result import About
from care_compress.export.to_onnx import FIX
from care_compress.export.variants import Variants
from care_compress.files import digest_of
from care_compress.model.checkpoint import load_checkpoint
from care_compress.model.rewrite import rewrite
from care_compress.recipe.target import AS_SHIPPED, Target
from care_compress.run.finished import FinishedRun
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.shipped import QUANTIZE
from care_compress.tasks.known import labelled
from care_compress.tasks.task import Drop

WIDTH = 110


@dataclass(frozen=True)
class PlacedModel:
    """One placement of a run's model, written and read back."""

    path: Path
    agreement: Agreement  # of the file with its simulation
    drop: Drop  # of the simulation against the float model
    edges: Edges
    logits: Tensor  # of the simulation, on the images of the bundle


def place_models(
    run: FinishedRun,
    target: Target,
    pixels_NCHW: NDArray[Any],
    about: About,
    folder: Path,
    notify: Callable[[str], None],
) -> dict[str, PlacedModel]:
    """The model as `target` usually has it and in its placements, by name; written into `folder`.

    `pixels_NCHW` are those of the bundle, some of the validation images that a file is compared on.
    """
    recipe, data = run.recipe, run.recipe.data
    model = load_checkpoint(run.checked_checkpoint(), recipe.model.arch)
    notify("reading the images that files are compared on")
    samples = labelled(recipe, "val")
    held = hold_images(samples, data, recipe.export.images, BadImages())
    bundled = spread_indices(len(held.labels), len(pixels_NCHW))
    if not torch.equal(held.pixels_BCHW[bundled], torch.from_numpy(pixels_NCHW)):
        raise RunError(
            "the validation images are not those that the run's files were compared on.",
            f"bring them back, or export again: {QUANTIZE}",
        )
    export = recipe.export.model_copy(update={"target_rules": True})
    network = rewrite(model, recipe.rewrite)
    variants = Variants(model, network, run.kept, lambda: held, data, export)
    task = variants.task
    found, digests = {}, set[str]()
    for placement in (AS_SHIPPED, *target.placements):
        notify(f"placing: {placement}")
        variant = variants.of(target.placed(placement))
        suffix = "" if placement == AS_SHIPPED else f"-{placement}"
        name = f"{recipe.precision}{suffix}"
        path = folder / f"{name}.onnx"
        variant.write(path, about)
        digest = digest_of(path)
        if digest in digests:  # of a model that has nothing to move: FP8's depthwise
            path.unlink()
            continue
        digests.add(digest)
        near = compare_answers(
            task, variant.logits, held.logits(OnnxPredictor(path)), variant.exact_db
        )
        if not near.holds:
            raise ExportError(f"{path.name} does not compute what its model does ({near}).", FIX)
        drop = drop_on_held(task, variants.float_logits, variant.logits, held)
        edges = count_edges(onnx.load(path))
        found[name] = PlacedModel(path, near, drop, edges, variant.logits[bundled])
    return found


def show_placements(found: Mapping[str, PlacedModel], console: Console) -> None:
    """Print what each placement loses, and what of its quantizers can be fused."""
    images = max(one.agreement.images for one in found.values())
    table = Table(title=f"Placements, simulated on {images:,} images", title_justify="left")
    table.add_column("model", no_wrap=True)
    for column in ("drop [95 %]", "INT8 to INT8", "quantizers alone", "MB moved", "SQNR of file"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, one in found.items():
        drop = f"{one.drop.value:.2f} [{one.drop.low:.2f}, {one.drop.high:.2f}]"
        edges = (str(one.edges.integer), str(one.edges.alone))
        moved = f"{one.edges.product_bytes / 1e6:.2f}"
        table.add_row(name, drop, *edges, moved, str(one.agreement))
    widened(console, WIDTH).print(table)
    console.print("The board decides by its own clock: python3 care_deploy.py tune")
