"""What a training step minimises.

An objective sees the model and one mixed batch and returns a loss; the loop knows nothing else
about it. QAT brings its own objective to the same loop.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from care_compress.errors import TrainingError
from care_compress.model.predictor import Predictor
from care_compress.recipe.sections import AugmentSection, DistillSection, FollowSection

MIXING_STREAM = 1  # keeps the draws of `mix` apart from the loader's, which share the seed


class Outcome(NamedTuple):
    """Loss of one batch, and the logits accuracy is counted on."""

    loss: Tensor
    logits: Tensor


class Objective(Protocol):
    """Maps (model, images, soft targets, part of the training done) to a loss."""

    def __call__(
        self, model: nn.Module, images_BCHW: Tensor, targets_BK: Tensor, progress: float
    ) -> Outcome:
        """Run the model forward and return the loss to minimise."""
        ...


class Classification:
    """Cross-entropy on both heads; with a teacher, the distillation head follows it instead.

    Hard distillation (arXiv 2012.12877): cross-entropy with the teacher's arg max.
    Soft: KL(teacher / T || student / T) * T^2. The teacher sees the very images the student sees.
    """

    def __init__(self, distill: DistillSection | None, teacher: Predictor | None) -> None:
        self.distill = distill
        self.teacher = teacher

    def __call__(
        self, model: nn.Module, images_BCHW: Tensor, targets_BK: Tensor, progress: float
    ) -> Outcome:
        """Loss of a CARE in training mode, which returns both heads."""
        logits, distilled = model(images_BCHW)
        labelled = F.cross_entropy(logits, targets_BK)
        if self.teacher is None or self.distill is None:
            loss = (labelled + F.cross_entropy(distilled, targets_BK)) / 2
        else:
            taught = follow_teacher(distilled, self.teacher(images_BCHW), self.distill)
            loss = (1 - self.distill.weight) * labelled + self.distill.weight * taught
        return Outcome(loss, (logits.detach() + distilled.detach()) / 2)


def follow_teacher(student_BK: Tensor, teacher_BK: Tensor, distill: DistillSection) -> Tensor:
    """Distance of the student's logits from the teacher's."""
    # Predictors run in inference mode; only a clone of their output may enter a graph.
    teacher_BK = teacher_BK.clone()
    if distill.kind == "hard":
        return F.cross_entropy(student_BK, teacher_BK.argmax(dim=1))
    return softened_distance(student_BK, teacher_BK, distill.temperature)


def softened_distance(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """KL(teacher / T || student / T) * T^2."""
    student, teacher = (
        F.log_softmax(one.float() / temperature, dim=1) for one in (student_BK, teacher_BK)
    )
    divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
    return divergence * temperature**2


def follow_float(
    logits_BK: Tensor,
    features: Sequence[Tensor],
    taught_BK: Tensor,
    taught: Sequence[Tensor],
    targets_BK: Tensor,
    section: FollowSection,
) -> Tensor:
    """Distance of a compressed model from its float teacher, on the same images.

    (1 - labels) T^2 KL(teacher / T || student / T) + labels CE
    + features mean_i ||f_i - t_i||^2 / ||t_i||^2 over the stage outputs.
    """
    distance = softened_distance(logits_BK, taught_BK, section.temperature)
    loss = (1 - section.labels) * distance
    if section.labels:
        loss = loss + section.labels * F.cross_entropy(logits_BK, targets_BK)
    if section.features:
        distances = [
            (f.float() - t.float()).square().mean() / t.float().square().mean().clamp(min=1e-12)
            for f, t in zip(features, taught, strict=True)
            if f.shape == t.shape  # the hidden channels that the network ends in may be fewer
        ]
        loss = loss + section.features * torch.stack(distances).mean()
    return loss


def soft_targets(labels_B: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """One-hot targets (B, K), softened by label smoothing."""
    off = smoothing / num_classes
    targets = torch.full((len(labels_B), num_classes), off, device=labels_B.device)
    return targets.scatter_(1, labels_B[:, None], 1 - smoothing + off)


def check_teacher(teacher: Predictor, num_classes: int) -> None:
    """Refuse a teacher of other classes before any work."""
    if teacher.num_classes != num_classes:
        raise TrainingError(
            f"the teacher has {teacher.num_classes} classes, the data has {num_classes}.",
            "use a teacher trained on the same classes",
        )


def mix(
    images_BCHW: Tensor, targets_BK: Tensor, augment: AugmentSection, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """Mix neighbours (0 with 1, 2 with 3, ...) by Mixup (arXiv 1710.09412) or CutMix (1905.04899).

    The order is already random. There is one lambda for a step, so a global batch is mixed alike
    however many processes share it. An odd last image stays as it is.
    """
    if not (augment.mixup or augment.cutmix):
        return images_BCHW, targets_BK
    rng = np.random.default_rng((seed, MIXING_STREAM, step))
    cut = augment.cutmix > 0 and (augment.mixup == 0 or rng.random() < 0.5)
    shape = augment.cutmix if cut else augment.mixup
    share = float(rng.beta(shape, shape))
    partner = neighbours(len(images_BCHW), images_BCHW.device)
    if cut:
        # A random box of area 1 - share, clipped to the image; what is left is the real share.
        height, width = images_BCHW.shape[2:]
        side = float(np.sqrt(1 - share))
        cut_h, cut_w = int(height * side), int(width * side)
        y, x = int(rng.integers(height)), int(rng.integers(width))
        top, bottom = max(0, y - cut_h // 2), min(height, y + cut_h - cut_h // 2)
        left, right = max(0, x - cut_w // 2), min(width, x + cut_w - cut_w // 2)
        share = 1 - (bottom - top) * (right - left) / (height * width)
        mixed = images_BCHW.clone()
        mixed[:, :, top:bottom, left:right] = images_BCHW[partner][:, :, top:bottom, left:right]
    else:
        mixed = images_BCHW * share + images_BCHW[partner] * (1 - share)
    return mixed, targets_BK * share + targets_BK[partner] * (1 - share)


def neighbours(count: int, device: torch.device) -> Tensor:
    """Index of each image's partner."""
    partner = torch.arange(count, device=device) ^ 1
    return partner.clamp_(max=count - 1)
