"""Segmentation: a class for every pixel, by the mean intersection over union of the classes.

Images are letterboxed into the network's square. What it says there is enlarged to the square, cut
to the image, enlarged to the image's own size and compared with the mask as it is stored.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from care_compress.data.annotations import IGNORED, Annotation, Boxes, Mask
from care_compress.data.letterbox import Letterbox
from care_compress.data.listing import Split
from care_compress.data.loader import Batch
from care_compress.data.samples import Samples
from care_compress.data.sources import open_annotated
from care_compress.errors import DataError
from care_compress.model.masks import MaskCare
from care_compress.recipe.sections import DataSection
from care_compress.tasks.classification import logits_along, softened_distance
from care_compress.tasks.dense import DenseTask, Figures
from care_compress.tasks.intervals import UNSEEN
from care_compress.tasks.overlay import draw_mask, legend_of
from care_compress.tasks.task import CardWords, Drawn, Drop, Metric, Same

RESAMPLES = 1000
# Pixels that turn together: masks change by whole places of the network, four wide and high.
MOVED = 16


class MaskTargets(NamedTuple):
    """Masks of a batch at the network's size, and how far labels are softened."""

    masks_BHW: Tensor  # int64, IGNORED where every answer is right
    smoothing: float


@dataclass(frozen=True)
class MaskRecord:
    """Pixels of one image, by class; those that are ignored are in none of the counts."""

    right_K: NDArray[np.int64]
    found_K: NDArray[np.int64]
    labelled_K: NDArray[np.int64]
    broken: bool


class Segmentation(DenseTask):
    """A class for every pixel."""

    name = "segmentation"
    metric = Metric("miou", "mIoU", "IoU")
    shown = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy"}
    same = Same("same places", "places")
    recipes = "seg_"
    kind = MaskCare
    card = CardWords(
        tag="image-segmentation",
        metric="mean_iou",
        said="Mean intersection over union",
        noun="a network for semantic segmentation",
        program="segment.py",
        answer="""\
planes = []
for plane in logits[0]:  # of each class, to the square, cut to the picture, to its size
    plane = Image.fromarray(plane).resize((side, side), Image.Resampling.BILINEAR)
    plane = plane.crop((left, top, left + width, top + height))
    planes.append(np.asarray(plane.resize(picture.size, Image.Resampling.BILINEAR)))
mask = np.argmax(planes, axis=0).astype(np.uint8)
for place in np.unique(mask):
    print(f"{(mask == place).mean():6.1%} {about['classes'][place]}")
Image.fromarray(mask).save("mask.png")  # each pixel is a place in the list of classes
""",
    )

    def samples(self, data: DataSection, split: Split) -> Samples:
        """Open images with masks."""
        return open_annotated(data, split, "masks")

    def draw(
        self, image: Image.Image, answer: Tensor, resolution: int, classes: Sequence[str]
    ) -> Drawn:
        """Colour every pixel."""
        mask = mask_of(answer, image.size[::-1], resolution)
        return Drawn(draw_mask(image, mask, classes), legend_of(mask, classes))

    def targets_of(
        self, annotations: Sequence[Annotation], device: torch.device, smoothing: float
    ) -> MaskTargets:
        """Return the masks as they are."""
        masks = [torch.from_numpy(_mask(one)).long() for one in annotations]
        return MaskTargets(torch.stack(masks).to(device), smoothing)

    def loss(self, answer: Tensor, targets: MaskTargets) -> Tensor:
        """Cross-entropy of every pixel that is not ignored."""
        logits = enlarged(answer.float(), targets.masks_BHW.shape[1:])
        loss = F.cross_entropy(
            logits, targets.masks_BHW, ignore_index=IGNORED, label_smoothing=targets.smoothing
        )
        # A batch of nothing but ignored pixels has no mean.
        return torch.nan_to_num(loss) if bool((targets.masks_BHW == IGNORED).all()) else loss

    def along(self, answer: Tensor, generator: torch.Generator) -> Tensor:
        """Logits of every place along a random direction."""
        return logits_along(answer, generator)

    def weighed(self, answer: Tensor, reference: Tensor) -> Tensor:
        """Every logit of every place counts alike."""
        return answer

    def following(self, answer: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Divergence of the softened answers, over all places."""
        return softened_distance(self.rows(answer), self.rows(taught), temperature)

    def running_score(self, answer: Tensor, batch: Batch) -> float:
        """Pixel accuracy at the places of the network."""
        step = batch.images.shape[-1] // answer.shape[-1]
        masks = np.stack(
            [_mask(one)[step // 2 :: step, step // 2 :: step] for one in batch.annotations]
        )
        found = answer.argmax(dim=1).cpu().numpy()[:, : masks.shape[1], : masks.shape[2]]
        counted = masks != IGNORED
        return 100 * float((found == masks)[counted].mean()) if counted.any() else 100.0

    def record(self, answer: Tensor, annotation: Annotation, resolution: int) -> MaskRecord:
        """Count the pixels of each class in the image as it is stored."""
        mask, classes = _mask(annotation), answer.shape[0]
        counted = mask != IGNORED
        labelled = np.bincount(mask[counted], minlength=classes)
        if not bool(torch.isfinite(answer).all()):
            nothing = np.zeros(classes, np.int64)
            return MaskRecord(nothing, nothing, labelled, True)
        found = mask_of(answer, mask.shape, resolution)[counted]
        right = np.bincount(found[found == mask[counted]], minlength=classes)
        return MaskRecord(right, np.bincount(found, minlength=classes), labelled, False)

    def is_broken(self, record: MaskRecord) -> bool:
        """Whether the answer was no number somewhere."""
        return record.broken

    def figures(self, records: Sequence[MaskRecord]) -> Figures:
        """Mean IoU over the classes that are there, and the share of pixels that are right."""
        counts_1P3K = _counts(records).sum(axis=0, keepdims=True)
        shares_K, labelled = overlap_of(counts_1P3K)[0], counts_1P3K[0, 2].sum()
        if not labelled:
            raise DataError("no mask has a pixel that counts.", "check data.ignore_index")
        values = {
            "miou": 100 * float(np.nanmean(shares_K)),
            "pixel_accuracy": 100 * float(counts_1P3K[0, 0].sum() / labelled),
        }
        per_class = tuple(None if np.isnan(one) else 100 * float(one) for one in shares_K)
        return Figures(len(records), sum(one.broken for one in records), values, per_class)

    def drop(self, before: Sequence[MaskRecord], after: Sequence[MaskRecord]) -> Drop:
        """Points of mIoU lost, with a 95 % interval by a bootstrap over images.

        Both models are on the same resamples. To each end is joined, as independent deviations
        are, what may have escaped notice: `UNSEEN` more places of each class that turn.
        """
        first, second = _resampled(before), _resampled(after)
        drops_S = 100 * (first - second)
        value = float(drops_S[0])
        low, high = np.percentile(drops_S[1:], (2.5, 97.5))
        labelled_K = _counts(before)[:, 2].sum(axis=0)
        there = labelled_K[labelled_K > 0]
        unseen = 100 * float(np.linalg.norm(UNSEEN * MOVED / (len(there) * there)))
        return Drop(
            value,
            value - float(np.hypot(max(0.0, value - low), unseen)),
            value + float(np.hypot(max(0.0, high - value), unseen)),
        )

    def spread(self, records: Sequence[MaskRecord]) -> tuple[float, float]:
        """Percentiles of mIoU."""
        low, high = np.percentile(100 * _resampled(records)[1:], (2.5, 97.5))
        return float(low), float(high)

    def agreed(
        self,
        before: Tensor,
        after: Tensor,
        records: Sequence[tuple[MaskRecord, MaskRecord]],
    ) -> list[tuple[int, int]]:
        """Places of the network with the same class; what is no number agrees with nothing."""
        same_B = (before.argmax(dim=1) == after.argmax(dim=1)).flatten(1).sum(dim=1).tolist()
        places = before[0, 0].numel()
        return [
            (0 if one.broken or other.broken else int(same), places)
            for same, (one, other) in zip(same_B, records, strict=True)
        ]

    def rows(self, answer: Tensor) -> Tensor:
        """Return every place as a row."""
        return answer.permute(0, 2, 3, 1).flatten(0, 2)


def enlarged(logits_BKhw: Tensor, size: Sequence[int]) -> Tensor:
    """Logits at another size, smoothly."""
    return F.interpolate(logits_BKhw, size=tuple(size), mode="bilinear", align_corners=False)


def mask_of(logits_Khw: Tensor, size: Sequence[int], resolution: int) -> Mask:
    """The class of each pixel of an image of this height and width."""
    height, width = size
    square = enlarged(logits_Khw[None], (resolution, resolution))
    rows, columns = Letterbox.of((height, width), resolution).window
    image = enlarged(square[..., rows, columns], (height, width))
    return image[0].argmax(dim=0).to(torch.uint8).numpy()


def overlap_of(counts_S3K: NDArray[np.generic]) -> NDArray[np.float64]:
    """Intersection over union of each class (S, K); NaN for one that is nowhere."""
    right, found, labelled = (counts_S3K[:, row].astype(float) for row in range(3))
    union = found + labelled - right
    shares: NDArray[np.float64] = np.divide(
        right, union, out=np.full_like(right, np.nan), where=union > 0
    )
    return shares


def _resampled(records: Sequence[MaskRecord]) -> NDArray[np.float64]:
    """Mean IoU of the images as they are, then of resamples; the same ones for every model."""
    rng, images = np.random.default_rng(0), len(records)
    counts_SI = np.ones((1 + RESAMPLES, images))
    counts_SI[1:] = rng.multinomial(images, np.full(images, 1 / images), size=RESAMPLES)
    counts_I3K = _counts(records)
    drawn = counts_SI @ counts_I3K.reshape(images, -1)
    shares_SK = overlap_of(drawn.reshape(-1, *counts_I3K.shape[1:]))
    # Few images may be drawn without any pixel that counts, for both models alike.
    some = ~np.isnan(shares_SK).all(axis=1)
    means: NDArray[np.float64] = np.nanmean(shares_SK[some], axis=1)
    return means


def _counts(records: Sequence[MaskRecord]) -> NDArray[np.int64]:
    return np.stack([np.stack([r.right_K, r.found_K, r.labelled_K]) for r in records])


def _mask(annotation: Annotation) -> Mask:
    assert not isinstance(annotation, Boxes)
    return annotation
