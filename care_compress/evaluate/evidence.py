"""What the report shows beyond the run's own figures, gathered once from the kept model.

Written to ``evidence.json`` in the run directory. A second report of the same model reads it again;
another model, other images or another checkpoint make it anew.
"""

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from torch import Tensor

from care_compress.console import step_line
from care_compress.data.loader import BadImages, Batch, pixel_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.data.sources import check_classes, open_samples
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
from care_compress.recipe.recipe import Recipe
from care_compress.recipe.sections import DataSection
from care_compress.run.finished import read_run
from care_compress.runtime.artifact import open_predictor
from care_compress.runtime.on_torch import TorchPredictor

BATCH = 32
SHOWN = 24  # flipped images with a picture
THUMBNAIL = 96  # pixels at most; an image is a few kilobytes of the page


@dataclass(frozen=True)
class Images:
    """Validation images in a fixed order, read again for every look at them."""

    samples: Samples
    data: DataSection
    indices: Sequence[int]

    def batches(self) -> Iterator[Batch]:
        """Their pixels."""
        return pixel_batches(self.samples, self.data, self.indices, BATCH, BadImages())

    def inputs(self, pixels: Tensor) -> Tensor:
        """Pixels as the network takes them."""
        return normalize(pixels, self.data.mean, self.data.std)


@dataclass
class _Counts:
    """What changed so far."""

    images: int = 0
    same: int = 0
    lost: int = 0
    gained: int = 0
    changes: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    flipped: list[dict[str, Any]] = field(default_factory=list)


@torch.inference_mode()
def measure_answers(before: Predictor, after: Predictor, images: Images) -> dict[str, Any]:
    """Answers of both models on the same images; the label, both answers, and how sure each was."""
    counts, classes = _Counts(), images.samples.classes
    for batch in images.batches():
        inputs = images.inputs(batch.images)
        # A model that answers NaN is sure of nothing; JSON has no other number for it.
        odds = [predict(inputs).cpu().softmax(dim=1).nan_to_num(0.0) for predict in (before, after)]
        _count(counts, batch, odds, images.samples)
    ranked = sorted(counts.changes.items(), key=lambda item: (-item[1], item[0]))
    return {
        "images": counts.images,
        "same": counts.same,
        "lost": counts.lost,
        "gained": counts.gained,
        "changes": [
            {
                "label": classes[label],
                "before": classes[was],
                "after": classes[now],
                "images": number,
            }
            for (label, was, now), number in ranked
        ],
        "flipped": counts.flipped,
    }


def _count(counts: _Counts, batch: Batch, odds: list[Tensor], samples: Samples) -> None:
    was, now = (one.argmax(dim=1) for one in odds)
    counts.images += len(batch.labels)
    counts.same += int((was == now).sum())
    counts.lost += int(((was == batch.labels) & (now != batch.labels)).sum())
    counts.gained += int(((was != batch.labels) & (now == batch.labels)).sum())
    for row in (was != now).nonzero().flatten().tolist():
        label, first, second = (int(each[row]) for each in (batch.labels, was, now))
        counts.changes[label, first, second] += 1
        if len(counts.flipped) < SHOWN:
            counts.flipped.append(
                {
                    "name": samples.name(int(batch.indices[row])),
                    "label": samples.classes[label],
                    "before": samples.classes[first],
                    "after": samples.classes[second],
                    "sure_before": float(odds[0][row, first]),
                    "sure_after": float(odds[1][row, second]),
                    "picture": thumbnail(batch.images[row]),
                }
            )


def thumbnail(pixels_CHW: Tensor) -> str:
    """A data URI of what the network saw, as a small JPEG."""
    picture = Image.fromarray(pixels_CHW.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()


VERSION = 1  # raised when the same model would be described in another way
# Answers on as many images as so many MACs allow, within these ends: a flipped answer is rare, and
# a large network on a slow core should not keep its user waiting for pictures.
MACS = 25e9
FEWEST, MOST = 256, 4000
LAYER_IMAGES = 32  # many thousand values of every layer; they are run three times
NNCF_HAS_NO_PLAN = "NNCF places its quantizers by itself: there is no plan of ours."
CPU = torch.device("cpu")
NNCF_HAS_NO_LAYERS = (
    "NNCF wrote OpenVINO's own file: its layers have other names and no simulation to compare with."
)


@dataclass(frozen=True)
class _Kept:
    """The run's models and what they were made from."""

    recipe: Recipe
    model: Path
    checkpoint: Path

    def float_predictor(self) -> Predictor:
        network = load_checkpoint(self.checkpoint, self.recipe.model.arch)
        compact = rewrite(network, self.recipe.rewrite)
        return TorchPredictor(compact, network.num_classes, CPU)

    def key(self, images: int) -> str:
        """Equal only where the evidence would be."""
        return fingerprint(
            {
                "version": VERSION,
                "model": digest_of(self.model),
                "checkpoint": sha256_file(self.checkpoint),
                "data": self.recipe.data.model_dump(mode="json", exclude={"workers"}),
                "images": images,
            }
        )


def gather(run_dir: Path, results: dict[str, Any], console: Console) -> dict[str, Any]:
    """The evidence of a run, from its file where that is still true; reasons for what is missing.

    `results` is the run's results.json. Nothing here ends a report: images that moved away are a
    reason, not an error.
    """
    if "model" not in results:
        return {"missing": _all_missing("This run quantized nothing.")}
    try:
        kept = _kept(run_dir, results["model"])
        images = _affordable(results)
        key = kept.key(images)
        known = _read(run_dir / "evidence.json")
        if known is not None and known.get("key") == key:
            return known
        with step_line(console) as notify:
            notify("gathering evidence for the report")
            found = {"key": key, **_measured(kept, images)}
    except (CareError, OSError) as error:
        reason = error.message if isinstance(error, CareError) else str(error.strerror)
        return {"missing": _all_missing(f"It could not be measured: {reason}")}
    write_text(run_dir / "evidence.json", json_text(found, indent=1))
    return found


def _affordable(results: dict[str, Any]) -> int:
    """How many images answers are compared on; never more than the run was measured on."""
    wanted = max(FEWEST, min(MOST, int(MACS / results["rewrites"][-1]["macs"])))
    return min(wanted, int(results["accuracy"]["images"]))


def _all_missing(reason: str) -> dict[str, str]:
    return dict.fromkeys(("plan", "layers", "answers"), reason)


def _kept(run_dir: Path, model: str) -> _Kept:
    run = read_run(run_dir)
    return _Kept(run.recipe, run_dir / model, run.checkpoint)


def _read(path: Path) -> dict[str, Any] | None:
    """What was gathered before; a damaged file is gathered again."""
    try:
        content = read_json(path)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _measured(kept: _Kept, count: int) -> dict[str, Any]:
    recipe = kept.recipe
    samples = open_samples(recipe.data, "val")
    before = kept.float_predictor()
    check_classes(samples, before.num_classes)
    images = Images(samples, recipe.data, spread_indices(len(samples), count))
    if kept.model.suffix != ".safetensors":
        after = open_predictor(str(kept.model), CPU)
        return {
            "answers": measure_answers(before, after, images),
            "missing": {"plan": NNCF_HAS_NO_PLAN, "layers": NNCF_HAS_NO_LAYERS},
        }
    saved = load_saved(kept.model)
    # Spread over all images again: the first of a folder are all of one class.
    few = Images(samples, recipe.data, spread_indices(len(samples), min(count, LAYER_IMAGES)))
    batches = (few.inputs(batch.images) for batch in few.batches())
    layers = measure_layers(saved.model, batches)
    simulated = TorchPredictor(saved.model, saved.model.num_classes, CPU)
    return {
        "plan": plan_as_json(saved.model.plan),
        "rules": [rule_text(rule) for rule in saved.section.rules],
        "layers": layers,
        "answers": measure_answers(before, simulated, images),
        "missing": {},
    }
