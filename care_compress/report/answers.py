"""Which answers quantization changed: class by class, and the images themselves, made small."""

import base64
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from care_compress.data.loader import BadImages, Batch
from care_compress.data.samples import Samples
from care_compress.data.transforms import normalize
from care_compress.evaluate.images import pixel_batches
from care_compress.predictor import Predictor
from care_compress.sections import DataSection

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
