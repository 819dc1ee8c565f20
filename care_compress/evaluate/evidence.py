"""What the report shows beyond the run's own figures, gathered once from the kept model.

Written to ``evidence.json`` in the run directory. A second report of the same model reads it again;
another model, other images or another checkpoint make it anew.
"""

import base64
import contextlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from care_compress.console import step_line
from care_compress.data.annotations import is_annotated
from care_compress.data.loader import CPU, BadImages, Batch, pixel_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.data.sources import check_classes
from care_compress.data.transforms import normalize
from care_compress.errors import CareError
from care_compress.evaluate.layer_noise import measure_layers
from care_compress.files import (
    digest_of,
    fingerprint,
    json_text,
    read_json,
    sha256_file,
    write_text,
)
from care_compress.model.checkpoint import load_checkpoint
from care_compress.model.predictor import Predictor
from care_compress.model.rewrite import rewrite
from care_compress.quantize.artifact import load_saved
from care_compress.quantize.plan_table import plan_as_json, rule_text
from care_compress.recipe.sections import DataSection
from care_compress.run.finished import FinishedRun, read_run
from care_compress.runtime.artifact import open_predictor
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.shipped import COMPARE
from care_compress.tasks.known import labelled

BATCH = 32
SHOWN = 24  # flipped images with a picture
THUMBNAIL = 96  # pixels at most; an image is a few kilobytes of the page
DRAWN = f"Answers with a place are drawn by the comparison: {COMPARE} fp32 and this run."
PARTS = ("plan", "layers", "answers")
VERSION = 1  # raised when the same model would be described in another way
# Answers on as many images as so many MACs allow, within these ends: a flipped answer is rare, and
# a large network on a slow core should not keep its user waiting for pictures.
MACS = 25e9
FEWEST, MOST = 256, 4000
LAYER_IMAGES = 32  # many thousand values of every layer; they are run three times
NNCF_HAS_NO_PLAN = "NNCF places its quantizers by itself: there is no plan of ours."
NNCF_HAS_NO_LAYERS = (
    "NNCF wrote OpenVINO's own file: its layers have other names and no simulation to compare with."
)


@dataclass(frozen=True)
class Images:
    """Validation images in a fixed order, read again for every look at them."""

    samples: Samples
    data: DataSection
    indices: Sequence[int]

    def batches(self) -> Iterator[Batch]:
        """Yield their pixels."""
        return pixel_batches(self.samples, self.data, self.indices, BATCH, BadImages())

    def inputs(self, pixels: Tensor) -> Tensor:
        """Return pixels as the network takes them."""
        return normalize(pixels, self.data.mean, self.data.std)


@torch.inference_mode()
def measure_answers(before: Predictor, after: Predictor, images: Images) -> dict[str, Any]:
    """Compare answers to the same images: the label, both answers, and how sure each model was."""
    seen = same = lost = gained = 0
    classes = images.samples.classes
    changes: Counter[tuple[int, int, int]] = Counter()
    flipped: list[dict[str, Any]] = []
    for batch in images.batches():
        inputs, labels = images.inputs(batch.images), batch.labels
        # A model that answers NaN is sure of nothing; JSON has no other number for it.
        odds = [predict(inputs).cpu().softmax(dim=1).nan_to_num(0.0) for predict in (before, after)]
        was, now = (one.argmax(dim=1) for one in odds)
        seen += len(labels)
        same += int((was == now).sum())
        lost += int(((was == labels) & (now != labels)).sum())
        gained += int(((was != labels) & (now == labels)).sum())
        for row in (was != now).nonzero().flatten().tolist():
            label, first, second = (int(each[row]) for each in (labels, was, now))
            changes[label, first, second] += 1
            if len(flipped) < SHOWN:
                flipped.append(
                    {
                        "name": images.samples.name(int(batch.indices[row])),
                        "label": classes[label],
                        "before": classes[first],
                        "after": classes[second],
                        "sure_before": float(odds[0][row, first]),
                        "sure_after": float(odds[1][row, second]),
                        "picture": thumbnail(batch.images[row]),
                    }
                )
    ranked = sorted(changes.items(), key=lambda item: (-item[1], item[0]))
    return {
        "images": seen,
        "same": same,
        "lost": lost,
        "gained": gained,
        "changes": [
            {
                "label": classes[label],
                "before": classes[first],
                "after": classes[second],
                "images": number,
            }
            for (label, first, second), number in ranked
        ],
        "flipped": flipped,
    }


def thumbnail(pixels_CHW: Tensor) -> str:
    """Return a data URI of what the network saw, as a small JPEG."""
    picture = Image.fromarray(pixels_CHW.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


def gather(run_dir: Path, results: dict[str, Any], console: Console) -> dict[str, Any]:
    """Return the evidence of a run, from its file where that still holds; reasons where it lacks.

    `results` is the run's results.json. Nothing here ends a report: images that moved away are a
    reason, not an error.
    """
    if "model" not in results:
        return {"missing": dict.fromkeys(PARTS, "This run quantized nothing.")}
    path = run_dir / "evidence.json"
    try:
        run, model = read_run(run_dir), run_dir / results["model"]
        wanted = max(FEWEST, min(MOST, int(MACS / results["rewrites"][-1]["macs"])))
        # Never more than the run was measured on.
        images = min(wanted, int(results["accuracy"]["images"]))
        # Equal only where the evidence would be.
        key = fingerprint(
            {
                "version": VERSION,
                "model": digest_of(model),
                "checkpoint": sha256_file(run.checkpoint),
                "data": run.recipe.data.model_dump(mode="json", exclude={"workers"}),
                "images": images,
            }
        )
        with contextlib.suppress(OSError, ValueError):  # a damaged file is gathered again
            known = read_json(path)
            if isinstance(known, dict) and known.get("key") == key:
                return known
        with step_line(console) as notify:
            notify("gathering evidence for the report")
            found = {"key": key, **_measured(run, model, images)}
    except (CareError, OSError) as error:
        reason = error.message if isinstance(error, CareError) else str(error.strerror)
        return {"missing": dict.fromkeys(PARTS, f"It could not be measured: {reason}")}
    write_text(path, json_text(found, indent=1))
    return found


def _measured(run: FinishedRun, model: Path, count: int) -> dict[str, Any]:
    recipe = run.recipe
    samples = labelled(recipe, "val")
    network = load_checkpoint(run.checkpoint, recipe.model.arch)
    before = TorchPredictor(rewrite(network, recipe.rewrite), network.num_classes, CPU)
    check_classes(samples, before.num_classes)
    images = Images(samples, recipe.data, spread_indices(len(samples), count))

    def answers(after: Predictor) -> dict[str, Any]:
        if is_annotated(samples):
            return {"missing": {"answers": DRAWN}}
        return {"answers": measure_answers(before, after, images), "missing": {}}

    if model.suffix != ".safetensors":
        after = open_predictor(str(model), CPU)
        found = answers(after)
        found["missing"] |= {"plan": NNCF_HAS_NO_PLAN, "layers": NNCF_HAS_NO_LAYERS}
        return found
    saved = load_saved(model)
    # Spread over all images again: the first of a folder are all of one class.
    few = Images(samples, recipe.data, spread_indices(len(samples), min(count, LAYER_IMAGES)))
    batches = (few.inputs(batch.images) for batch in few.batches())
    layers = measure_layers(saved.model, batches)
    simulated = TorchPredictor(saved.model, saved.model.num_classes, CPU)
    return {
        "plan": plan_as_json(saved.model.plan),
        "rules": [rule_text(rule) for rule in saved.section.rules],
        "layers": layers,
        **answers(simulated),
    }
