"""Detection: boxes with classes. What the line asks a task, from the labels to a drawing.

A network answers with corners and class logits of many places (`care_compress.model.boxes`). Which
places ought to find an object is decided anew at every step, by how well each does already (TOOD,
arXiv 2108.07755).

Shape suffixes: B images, K classes, N places, M the most objects of one image of a batch. All
lengths of a loss are fractions of the square input's side.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from care_compress.data.annotations import Annotation, Boxes
from care_compress.data.letterbox import Letterbox
from care_compress.data.listing import Split
from care_compress.data.loader import Batch
from care_compress.data.samples import Samples
from care_compress.data.sources import open_annotated
from care_compress.device.boxes import SAME, SHOWN, Detections, draw_boxes, find_boxes, overlaps
from care_compress.model.boxes import CORNERS, STRIDES, BoxCare, places
from care_compress.recipe.sections import DataSection
from care_compress.tasks.average_precision import (
    IOUS,
    Matches,
    match_boxes,
    precision_drop,
    precision_of,
    precision_spread,
)
from care_compress.tasks.dense import DenseTask, Figures
from care_compress.tasks.task import CardWords, Drawn, Drop, Metric, Same

TOP = 10  # places that may find one object
SCORE_POWER, OVERLAP_POWER = 1.0, 6.0  # alpha and beta of the alignment
RESCUED = 0.1  # overlap that a place is given for an object too small to hold any centre
BOX_WEIGHT = 2.0  # of the boxes' loss, the classes' having 1
SMALLEST = 1e-3  # side of a box, in those of the input, that an error is divided by
AGREED = 0.5  # IoU of two boxes of two models that are the same


@dataclass(frozen=True)
class BoxRecord:
    """What was found in one image, and what is there, in the image's own pixels."""

    found: Detections
    labels: Boxes
    num_classes: int


class Detection(DenseTask):
    """Boxes with a class each."""

    name = "detection"
    metric = Metric("map50", "mAP50", "AP50")
    shown = {"map50": "mAP50", "map": "mAP"}
    same = Same("same boxes", "boxes")
    recipes = "det_"
    kind = BoxCare
    card = CardWords(
        tag="object-detection",
        metric="map",
        said="Mean average precision at an overlap of 0.50",
        noun="an object detector",
        program="detect.py",
        answer=f"""\
corners, scores = logits[0][:4].T * side, 1 / (1 + np.exp(-logits[0][4:].T))
corners = (corners - [left, top] * 2) / ([width, height] * 2) * (picture.size * 2)
corners = corners.clip(0, picture.size * 2)
areas, kept = (corners[:, 2:] - corners[:, :2]).prod(axis=1), []
for place in np.argsort(-scores, axis=None):  # the surest first
    box, kind = divmod(int(place), scores.shape[1])
    if scores[box, kind] < {SHOWN}:
        break
    near = [np.maximum(corners[box, :2], corners[other, :2]) for other, of in kept if of == kind]
    far = [np.minimum(corners[box, 2:], corners[other, 2:]) for other, of in kept if of == kind]
    same = [areas[other] for other, of in kept if of == kind]
    shared = (np.subtract(far, near).clip(0).prod(axis=1)) if same else np.zeros(0)
    if (shared <= {SAME} * (areas[box] + same - shared)).all():
        kept.append((box, kind))
        print(about["classes"][kind], f"{{scores[box, kind]:.2f}}", corners[box].round())
""",
    )

    def samples(self, data: DataSection, split: Split) -> Samples:
        """Open images with boxes."""
        return open_annotated(data, split, "boxes")

    def draw(
        self, image: Image.Image, answer: Tensor, resolution: int, classes: Sequence[str]
    ) -> Drawn:
        """Draw the boxes with their names, so that nothing has to be told beside them."""
        found = find_boxes(answer.numpy(), Letterbox.of(image.size[::-1], resolution))
        return Drawn(draw_boxes(image, found, classes), {})

    def targets_of(
        self, annotations: Sequence[Annotation], device: torch.device, smoothing: float
    ) -> list[Boxes]:
        """Return the boxes as they are; no label of theirs is softened."""
        return [_boxes(one) for one in annotations]

    def loss(self, answer: Tensor, targets: Sequence[Boxes]) -> Tensor:
        """What training minimises; the labels are in pixels of the square input."""
        return detection_loss(answer, targets)

    def along(self, answer: Tensor, generator: torch.Generator) -> Tensor:
        """Corners and logits along a random direction, each in units of what it does to a box."""
        weighed = self.weighed(answer, answer.detach())
        return (weighed * torch.randn(weighed.shape, generator=generator).to(weighed)).sum()

    def weighed(self, answer: Tensor, reference: Tensor) -> Tensor:
        """Corners by the size of their box, logits by how sure they are."""
        return weighed_by(reference, answer)

    def following(self, answer: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """How far a student's output is from its teacher's; independent classes have no softmax."""
        return output_distance(answer, taught)

    def running_score(self, answer: Tensor, batch: Batch) -> None:
        """Precision of a single batch means nothing."""

    def record(self, answer: Tensor, annotation: Annotation, resolution: int) -> BoxRecord:
        """Bring the boxes that count for the metric back to the image."""
        labels = _boxes(annotation)
        found = find_boxes(answer.numpy(), Letterbox.of(labels.size, resolution))
        return BoxRecord(found, labels, answer.shape[0] - CORNERS)

    def is_broken(self, record: BoxRecord) -> bool:
        """Whether the answer was no number somewhere."""
        return record.found.broken

    def figures(self, records: Sequence[BoxRecord]) -> Figures:
        """COCO's mAP50 and mAP."""
        one = precision_of(_matches(records))
        per_class = tuple(None if np.isnan(area) else area for area in one.per_class)
        return Figures(one.images, one.broken, {"map50": one.map50, "map": one.map}, per_class)

    def drop(self, before: Sequence[BoxRecord], after: Sequence[BoxRecord]) -> Drop:
        """Points of mAP50 lost."""
        ious = IOUS[:1]
        return Drop(*precision_drop(_matches(before, ious), _matches(after, ious)).map50)

    def spread(self, records: Sequence[BoxRecord]) -> tuple[float, float]:
        """Percentiles of mAP50."""
        return precision_spread(_matches(records, IOUS[:1]))

    def agreed(
        self, before: Tensor, after: Tensor, records: Sequence[tuple[BoxRecord, BoxRecord]]
    ) -> list[tuple[int, int]]:
        """Boxes of either model that the other has, too."""
        pairs = (boxes_agreed(one.found, other.found) for one, other in records)
        return [(2 * one.matched, one.boxes) for one in pairs]

    def rows(self, answer: Tensor) -> Tensor:
        """Return every place as a row: the classes, and that nothing is there."""
        logits = answer[:, CORNERS:].transpose(1, 2).flatten(0, 1)
        nothing = logits.new_full((len(logits), 1), math.log(SHOWN / (1 - SHOWN)))
        return torch.cat([logits, nothing], dim=1)


def _matches(records: Sequence[BoxRecord], ious: Sequence[float] = IOUS) -> Matches:
    found, labels = [one.found for one in records], [one.labels for one in records]
    return match_boxes(found, labels, records[0].num_classes, ious)


def _boxes(annotation: Annotation) -> Boxes:
    assert isinstance(annotation, Boxes)
    return annotation


class Objects(NamedTuple):
    """Labels of a batch as tensors; images with fewer objects than M have absent ones."""

    corners_BM4: Tensor  # fractions of the square
    classes_BM: Tensor
    wanted_BM: Tensor  # bool: an object to be found
    crowd_BM: Tensor  # bool: a region in which nothing is wrong


def objects_of(labels: Sequence[Boxes], device: torch.device) -> Objects:
    """Pad the labels of a batch to one length, at least 1."""
    most = max(1, max(len(one) for one in labels))  # no reduction takes none
    corners = np.zeros((len(labels), most, 4), np.float32)
    classes = np.zeros((len(labels), most), np.int64)
    wanted, crowd = np.zeros((2, len(labels), most), np.bool_)
    for row, one in enumerate(labels):
        height, width = one.size
        scale = np.array([width, height, width, height], np.float32)
        corners[row, : len(one)] = one.corners / scale
        classes[row, : len(one)] = one.classes
        wanted[row, : len(one)], crowd[row, : len(one)] = ~one.crowd, one.crowd
    return Objects(
        *(torch.from_numpy(part).to(device) for part in (corners, classes, wanted, crowd))
    )


class Assigned(NamedTuple):
    """What each place ought to say."""

    scores_BKN: Tensor  # of its object's class, up to the overlap reached; 0 where nothing is
    corners_BN4: Tensor  # of its object; without meaning where it has none
    weights_BN: Tensor  # its score of any class
    silent_BN: Tensor  # bool: it lies in a crowd and is no negative


@torch.no_grad()
def assign(
    corners_B4N: Tensor, logits_BKN: Tensor, grid: tuple[Tensor, Tensor], wanted: Objects
) -> Assigned:
    """Give each object the places that find it best, out of those whose centre it holds.

    How well a place does is t = s^alpha u^beta of its score s for the object's class and its
    overlap u; an object takes the `TOP` places of the largest t, and a place that several objects
    take goes to the one it overlaps most. The target score is t, scaled so that an object's best
    place gets the best overlap reached. An object too small to hold a centre takes the nearest of
    the finest level.
    """
    objects, count = wanted.corners_BM4.shape[1], corners_B4N.shape[2]
    centres_2N, steps_2N = grid
    overlaps_BMN = overlaps_of(wanted.corners_BM4, corners_B4N)
    every_class = wanted.classes_BM[..., None].expand(-1, -1, count)
    scores_BMN = logits_BKN.sigmoid().gather(1, every_class)
    holds_BMN = centres_in(wanted.corners_BM4, centres_2N)
    crowded_BN = (holds_BMN & wanted.crowd_BM[..., None]).any(dim=1)
    holds_BMN &= wanted.wanted_BM[..., None]
    empty_BM = wanted.wanted_BM & ~holds_BMN.any(dim=2)
    if empty_BM.any():
        middles = (wanted.corners_BM4[..., :2] + wanted.corners_BM4[..., 2:]) / 2
        away_BMN = ((middles[..., None] - centres_2N).square() + steps_2N.square()).sum(dim=2)
        nearest = F.one_hot(away_BMN.argmin(dim=2), count).bool() & empty_BM[..., None]
        holds_BMN |= nearest
        overlaps_BMN = torch.where(nearest, overlaps_BMN.clamp(min=RESCUED), overlaps_BMN)
    aligned_BMN = scores_BMN**SCORE_POWER * overlaps_BMN**OVERLAP_POWER
    best = torch.where(holds_BMN, aligned_BMN, -1.0).topk(min(TOP, count), dim=2)
    taken_BMN = torch.zeros_like(holds_BMN).scatter(2, best.indices, best.values >= 0)
    owner_BN = torch.where(taken_BMN, overlaps_BMN, -1.0).argmax(dim=1)
    taken_BMN &= owner_BN[:, None] == torch.arange(objects, device=owner_BN.device)[:, None]
    aligned_BMN, reached_BMN = aligned_BMN * taken_BMN, overlaps_BMN * taken_BMN
    largest_BM1 = aligned_BMN.amax(dim=2, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    targets_BMN = aligned_BMN / largest_BM1 * reached_BMN.amax(dim=2, keepdim=True)
    weights_BN = targets_BMN.sum(dim=1)  # each place belongs to one object at most
    classes_BN = wanted.classes_BM.gather(1, owner_BN)
    scores_BKN = torch.zeros_like(logits_BKN).scatter(1, classes_BN[:, None], weights_BN[:, None])
    corners_BN4 = wanted.corners_BM4.gather(1, owner_BN[..., None].expand(-1, -1, 4))
    return Assigned(scores_BKN, corners_BN4, weights_BN, crowded_BN & ~taken_BMN.any(dim=1))


def detection_loss(output_BCN: Tensor, labels: Sequence[Boxes]) -> Tensor:
    """Cross-entropy of the classes and (1 - GIoU) of the boxes, over the sum of target scores.

    (sum BCE(logit, target) + w sum target (1 - GIoU)) / sum target: a place counts for as much as
    it is believed to find its object.
    """
    output_BCN = output_BCN.float()
    corners_B4N, logits_BKN = output_BCN[:, :CORNERS], output_BCN[:, CORNERS:]
    wanted = objects_of(labels, output_BCN.device)
    height, width = labels[0].size
    grid = places([(height // stride, width // stride) for stride in STRIDES], output_BCN)
    assigned = assign(corners_B4N, logits_BKN, grid, wanted)
    total = assigned.weights_BN.sum().clamp(min=1)
    classes = F.binary_cross_entropy_with_logits(logits_BKN, assigned.scores_BKN, reduction="none")
    classes = classes.masked_fill(assigned.silent_BN[:, None], 0).sum()
    at = assigned.weights_BN > 0
    overlap = generalized_overlap(corners_B4N.transpose(1, 2)[at], assigned.corners_BN4[at])
    boxes = ((1 - overlap) * assigned.weights_BN[at]).sum()
    return (classes + BOX_WEIGHT * boxes) / total


def output_distance(output_BCN: Tensor, taught_BCN: Tensor) -> Tensor:
    """Distance of a student's output from its teacher's, mostly where the teacher sees something.

    (sum KL(p_taught || p) + w sum s (1 - GIoU)) / sum s, with the teacher's highest score s of each
    place. The divergences are those of independent yes-or-no classes, so that 0 means equal.
    """
    # Predictors run in inference mode; only a clone of their output may enter a graph.
    output_BCN, taught_BCN = output_BCN.float(), taught_BCN.detach().clone().float()
    logits, taught = output_BCN[:, CORNERS:], taught_BCN[:, CORNERS:]
    scores_BKN = taught.sigmoid()
    weights_BN = scores_BKN.amax(dim=1)
    crossed = F.binary_cross_entropy_with_logits(logits, scores_BKN, reduction="sum")
    entropy = F.binary_cross_entropy_with_logits(taught, scores_BKN, reduction="sum")
    student, teacher = (one[:, :CORNERS].transpose(1, 2) for one in (output_BCN, taught_BCN))
    boxes = ((1 - generalized_overlap(student, teacher)) * weights_BN).sum()
    return (crossed - entropy + BOX_WEIGHT * boxes) / weights_BN.sum().clamp(min=1)


def weighed_by(reference_BCN: Tensor, output_BCN: Tensor) -> Tensor:
    """An output in units in which equal errors cost about equally, near a reference.

    A logit counts by the deviation of its class, sqrt(p (1 - p)): half its square is what the
    divergence grows by. A corner counts in sides of its box, by how sure the place is of any class:
    sqrt(w s) d / side. So places where nothing is seen count for next to nothing.
    """
    scores_BKN = reference_BCN[:, CORNERS:].sigmoid()
    surest_B1N = scores_BKN.amax(dim=1, keepdim=True)
    near, far = reference_BCN[:, :2], reference_BCN[:, 2:CORNERS]
    sides_B2N = (far - near).clamp(min=SMALLEST)
    corners = output_BCN[:, :CORNERS] / torch.cat([sides_B2N, sides_B2N], dim=1)
    logits = output_BCN[:, CORNERS:] * (scores_BKN * (1 - scores_BKN)).sqrt()
    return torch.cat([corners * (BOX_WEIGHT * surest_B1N).sqrt(), logits], dim=1)


def overlaps_of(wanted_BM4: Tensor, found_B4N: Tensor) -> Tensor:
    """IoU of every object with the box of every place (B, M, N)."""
    left, top, right, bottom = (one[..., None] for one in wanted_BM4.unbind(dim=2))
    x1, y1, x2, y2 = (one[:, None] for one in found_B4N.unbind(dim=1))
    width = (torch.minimum(right, x2) - torch.maximum(left, x1)).clamp(min=0)
    height = (torch.minimum(bottom, y2) - torch.maximum(top, y1)).clamp(min=0)
    shared: Tensor = width * height
    union: Tensor = (right - left) * (bottom - top) + (x2 - x1) * (y2 - y1) - shared
    return shared / union.clamp(min=1e-12)


def centres_in(corners_BM4: Tensor, centres_2N: Tensor) -> Tensor:
    """Whether each box holds the centre of each place (B, M, N)."""
    left, top, right, bottom = (one[..., None] for one in corners_BM4.unbind(dim=2))
    x, y = centres_2N.unbind()
    return (left < x) & (x < right) & (top < y) & (y < bottom)


def generalized_overlap(a: Tensor, b: Tensor) -> Tensor:
    """GIoU of boxes (..., 4), pair by pair (arXiv 1902.09630): IoU - (hull - union) / hull.

    Unlike IoU it still falls as boxes that do not touch move apart.
    """
    near, far = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    shared = (far - near).clamp(min=0).prod(dim=-1)
    area_a, area_b = ((one[..., 2:] - one[..., :2]).prod(dim=-1) for one in (a, b))
    union = area_a + area_b - shared
    outer = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = outer.prod(dim=-1).clamp(min=1e-12)
    overlap: Tensor = shared / union.clamp(min=1e-12) - (hull - union) / hull
    return overlap


@dataclass(frozen=True)
class BoxAgreement:
    """Boxes of two models over the same images."""

    images: int = 0
    same_images: int = 0  # in which every box of each model is one of the other's
    boxes: int = 0  # of both models
    matched: int = 0  # pairs

    def __add__(self, other: "BoxAgreement") -> "BoxAgreement":
        """Counts over both sets of images."""
        return BoxAgreement(
            self.images + other.images,
            self.same_images + other.same_images,
            self.boxes + other.boxes,
            self.matched + other.matched,
        )

    @property
    def percent(self) -> float:
        """Boxes that the other model has, too; two models that see nothing agree."""
        return 100 * 2 * self.matched / self.boxes if self.boxes else 100.0


def boxes_agreed(before: Detections, after: Detections) -> BoxAgreement:
    """Pair the boxes of one image that both models are sure of, those that overlap most first.

    A pair is of one class and overlaps by half at least; each box has one partner. An answer that
    is broken is the same as none, not even another broken one.
    """
    one, other = before.surer(SHOWN), after.surer(SHOWN)
    overlap = overlaps(one.corners, other.corners)
    overlap[one.classes[:, None] != other.classes] = 0
    matched = 0
    while overlap.size and overlap.max() >= AGREED:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[row], overlap[:, column] = 0, 0
        matched += 1
    boxes = len(one) + len(other)
    same = 2 * matched == boxes and not (before.broken or after.broken)
    return BoxAgreement(1, int(same), boxes, matched)
