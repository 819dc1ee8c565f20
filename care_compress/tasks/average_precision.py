"""COCO's average precision, and how sure the drop between two models is.

pycocotools matches boxes with objects, once for each image; the curves are drawn here from its
matches, because it would take a minute for what the bootstrap draws in a second. On the whole set
both give the same numbers (a test holds that).

Shape suffixes: T overlaps (IoU) that a match needs, D boxes found, I images, S resamples,
K classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from care_compress.data.annotations import Boxes
from care_compress.device.boxes import MOST, Detections
from care_compress.errors import DataError, EvaluationError
from care_compress.libraries import silent
from care_compress.tasks.intervals import UNSEEN, Interval

IOUS = tuple(np.linspace(0.5, 0.95, 10).tolist())
RECALLS = np.linspace(0, 1, 101)  # where COCO reads a curve
RESAMPLES = 1000
FEWER = 200  # of one model by itself, whose interval is wide and decides little
AT_ONCE = 50  # resamples: their cumulative sums stay in the processor's cache


@dataclass(frozen=True)
class ClassMatches:
    """What became of the boxes of one class, the surest first."""

    images_D: NDArray[np.int64]  # where each box was found
    right_TD: NDArray[np.bool_]
    counted_TD: NDArray[np.bool_]  # a box in a crowd is neither right nor wrong
    wanted_I: NDArray[np.int64]  # objects in each image


@dataclass(frozen=True)
class Matches:
    """What became of every box that a model found in a set of images."""

    images: int
    broken: int  # images whose output was no number; nothing was found in them
    classes: tuple[ClassMatches, ...]


@dataclass(frozen=True)
class Precision:
    """Average precision over a set of images, in percent."""

    images: int
    broken: int
    map: float  # mean over classes and overlaps of 0.50 to 0.95
    map50: float  # mean over classes, where half an overlap is enough
    per_class: tuple[float, ...]  # at an overlap of 0.50; NaN for a class that no image has


@dataclass(frozen=True)
class PrecisionDrop:
    """Before minus after in points, each with its paired 95 % interval."""

    map: Interval
    map50: Interval


def match_boxes(
    found: Sequence[Detections],
    labels: Sequence[Boxes],
    num_classes: int,
    ious: Sequence[float] = IOUS,
) -> Matches:
    """Match the boxes found in each image with its objects, as COCO does.

    With ``ious=(0.5,)`` it takes less than half the time and knows mAP50 only.
    """
    assert len(found) == len(labels)
    # Imported late: it takes a while, and only detection needs it.
    from pycocotools.cocoeval import COCOeval

    with silent():
        evaluation = COCOeval(_as_coco(labels, num_classes), _as_coco(found, num_classes), "bbox")
        evaluation.params.iouThrs = np.array(ious)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [MOST]
        evaluation.evaluate()
    images = len(labels)
    rows = [evaluation.evalImgs[k * images : (k + 1) * images] for k in range(num_classes)]
    broken = sum(one.broken for one in found)
    return Matches(images, broken, tuple(_of_class(row, len(ious)) for row in rows))


def precision_of(matches: Matches) -> Precision:
    """Average precision over all images; an error if there is no object, or no answer at all."""
    if not any(one.wanted_I.any() for one in matches.classes):
        raise DataError("no image has a box to find.", "check the source and its val split")
    if matches.broken == matches.images:
        raise EvaluationError(
            f"the model answers NaN or infinity to all {matches.images:,} images.",
            "check the checkpoint, data.mean and data.std; a file in float16 may overflow",
        )
    every_image_once = np.ones((1, matches.images), np.int32)
    areas_TK = 100 * curve_areas(matches, every_image_once)[0]
    return Precision(
        matches.images,
        matches.broken,
        map=float(np.nanmean(areas_TK)),
        map50=float(np.nanmean(areas_TK[0])),
        per_class=tuple(areas_TK[0].tolist()),
    )


def precision_drop(
    before: Matches, after: Matches, seed: int = 0, resamples: int = RESAMPLES
) -> PrecisionDrop:
    """Drop from one model to another on the same images, with a 95 % interval.

    What was seen is drawn by a bootstrap over images (its percentiles), both models on the same
    resamples. That knows nothing of what was not seen, and would be surest of two models between
    which no image at hand tells. So to each end is joined, as independent deviations are (MOVER,
    Zou and Donner 2008), what may have escaped notice: of G_k objects none turned that could not
    have, up to 3.7 more may turn (exact Poisson limit), and each is worth 1 / (K G_k) of the mean:

        low = drop - sqrt((drop - low_seen)^2 + sum_k (3.7 / (K G_k))^2),    high likewise.

    Objects and not images count as seen once: eight bits move single boxes over a threshold.
    With hundreds of objects that turned the second term is nothing. Two equal models of 70 objects
    in the rarest of three classes still have an interval of 1.8 points to both sides.
    """
    wanted = np.array([one.wanted_I.sum() for one in before.classes])
    assert before.images == after.images, "another set of images"
    assert (wanted == [one.wanted_I.sum() for one in after.classes]).all()
    counts_SI = _resamples(before.images, resamples, seed)
    drops_STK = 100 * (curve_areas(before, counts_SI) - curve_areas(after, counts_SI))
    present = wanted > 0
    drops_STK = drops_STK[:, :, present]
    unseen = 100 * math.hypot(*(UNSEEN / (present.sum() * wanted[present])))

    def interval(drops_ST: NDArray[np.float64]) -> Interval:
        drops_ST = drops_ST.reshape(len(drops_ST), -1)
        some = ~np.isnan(drops_ST).all(axis=1)  # few images may be drawn without any object
        drops_S = np.nanmean(drops_ST[some], axis=1)
        value = float(drops_S[0])
        low, high = np.percentile(drops_S[1:], (2.5, 97.5))
        below = math.hypot(max(0.0, value - float(low)), unseen)
        above = math.hypot(max(0.0, float(high) - value), unseen)
        return value, max(-100.0, value - below), min(100.0, value + above)

    return PrecisionDrop(map=interval(drops_STK), map50=interval(drops_STK[:, 0]))


def precision_spread(matches: Matches, resamples: int = FEWER) -> tuple[float, float]:
    """95 % interval of the mean precision over the first overlap, by a bootstrap over images."""
    counts_SI = _resamples(matches.images, resamples)
    present = [one.wanted_I.any() for one in matches.classes]
    values_S = 100 * np.nanmean(curve_areas(matches, counts_SI)[:, 0][:, present], axis=1)
    low, high = np.nanpercentile(values_S[1:], (2.5, 97.5))
    return float(low), float(high)


def _resamples(images: int, resamples: int, seed: int = 0) -> NDArray[np.int32]:
    """How often each image counts: once, then as drawn."""
    rng = np.random.default_rng(seed)
    counts_SI = np.ones((1 + resamples, images), np.int32)
    counts_SI[1:] = rng.multinomial(images, np.full(images, 1 / images), size=resamples)
    return counts_SI


def curve_areas(matches: Matches, counts_SI: NDArray[np.int32]) -> NDArray[np.float64]:
    """Average precision (S, T, K) where each image was drawn so many times; NaN without objects.

    The mean over `RECALLS` of the best precision at that recall or a higher one. A curve rises only
    where a box is right, so nothing is looked at between those.
    """
    overlaps = matches.classes[0].right_TD.shape[0]
    areas_STK = np.full((len(counts_SI), overlaps, len(matches.classes)), np.nan)
    for k, one in enumerate(matches.classes):
        for start in range(0, len(counts_SI), AT_ONCE):
            counts = counts_SI[start : start + AT_ONCE]
            wanted_S = counts @ one.wanted_I
            drawn_SD = counts[:, one.images_D]
            seen_SD = drawn_SD.cumsum(axis=1)
            for t, (right_D, counted_D) in enumerate(
                zip(one.right_TD, one.counted_TD, strict=True)
            ):
                at = np.flatnonzero(right_D)
                hits = drawn_SD[:, at].cumsum(axis=1).astype(np.float64)
                if counted_D.all():
                    seen = seen_SD[:, at]
                else:
                    seen = (drawn_SD * counted_D).cumsum(axis=1)[:, at]
                precision = hits / (seen + np.spacing(1))
                best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
                best = np.pad(best, ((0, 0), (0, 1)))  # no box reaches the recall
                for s in np.flatnonzero(wanted_S):
                    reached = np.searchsorted(hits[s] / wanted_S[s], RECALLS)
                    areas_STK[start + s, t, k] = best[s, reached].mean()
    return areas_STK


def _of_class(rows: Sequence[dict[str, Any] | None], overlaps: int) -> ClassMatches:
    """Join what pycocotools says of one class in each image; it says nothing where none is."""
    none = np.zeros((overlaps, 0), np.bool_)
    said = {image: row for image, row in enumerate(rows) if row is not None}
    scores = np.array([score for row in said.values() for score in row["dtScores"]])
    order = np.argsort(-scores, kind="stable")  # as COCO breaks ties: by image
    ignored = np.concatenate([none, *(row["dtIgnore"] for row in said.values())], axis=1)
    matched = np.concatenate([none, *(row["dtMatches"] > 0 for row in said.values())], axis=1)
    wanted, sizes = np.zeros((2, len(rows)), np.int64)
    for image, row in said.items():
        wanted[image] = np.count_nonzero(row["gtIgnore"] == 0)
        sizes[image] = len(row["dtScores"])
    counted = ~ignored.astype(np.bool_)[:, order]
    return ClassMatches(
        np.repeat(np.arange(len(rows)), sizes)[order],
        matched.astype(np.bool_)[:, order] & counted,
        counted,
        wanted,
    )


def _as_coco(images: Sequence[Boxes | Detections], num_classes: int) -> Any:
    """COCO's own form of boxes: a list of dictionaries with left, top, width, height."""
    from pycocotools.coco import COCO

    annotations: list[dict[str, object]] = []
    for image, boxes in enumerate(images):
        corners = boxes.corners.astype(np.float64)
        for row, (x1, y1, x2, y2) in enumerate(corners.tolist()):
            annotation = {
                "id": len(annotations) + 1,  # 0 would mean unmatched
                "image_id": image,
                "category_id": int(boxes.classes[row]),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": 0,
            }
            if isinstance(boxes, Detections):
                annotation["score"] = float(boxes.scores[row])
            else:
                annotation["iscrowd"] = int(boxes.crowd[row])
            annotations.append(annotation)
    coco = COCO()
    coco.dataset = {
        "images": [{"id": image} for image in range(len(images))],
        "categories": [{"id": place} for place in range(num_classes)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco
