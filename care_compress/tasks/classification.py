"""Classification: one class for an image, by top-1 and top-5.

A drop comes with its interval, and with agreement and distance, of two models on the same images.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import TypeAdapter
from torch import Tensor, nn
from torch.nn import functional as F

from care_compress.data.listing import Split
from care_compress.data.loader import Batch
from care_compress.data.samples import Samples
from care_compress.data.sources import open_samples
from care_compress.errors import DataError, EvaluationError
from care_compress.model.care import Care
from care_compress.model.predictor import Predictor
from care_compress.recipe.sections import (
    AugmentSection,
    DataSection,
    DistillSection,
    TrainSection,
)
from care_compress.tasks.distance import Distance
from care_compress.tasks.intervals import drop_interval, mcnemar_p, wilson
from care_compress.tasks.task import (
    CardWords,
    Collected,
    Drop,
    Lesson,
    Metric,
    Objective,
    Outcome,
    Predict,
    Same,
    Targets,
    Task,
)

MIXING_STREAM = 1  # keeps the draws of `mix` apart from the loader's, which share the seed
BINS = 15
LISTED_FLIPS = 100
NO_ANSWER = -1  # NaN or infinity among the logits


class BothHeads:
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


def logits_along(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Logits (B, K, ...) along a random direction, free of the constant that changes no answer."""
    probe = torch.randn(logits.shape, generator=generator).to(logits)
    return (logits * (probe - probe.mean(dim=1, keepdim=True))).sum()


def soft_targets(labels_B: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """One-hot targets (B, K), softened by label smoothing."""
    off = smoothing / num_classes
    targets = torch.full((len(labels_B), num_classes), off, device=labels_B.device)
    return targets.scatter_(1, labels_B[:, None], 1 - smoothing + off)


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


@dataclass(frozen=True)
class Accuracy:
    """Counts over a set of images."""

    images: int
    correct: int
    correct_in_top5: int
    broken: int = 0  # answers that are NaN or infinite somewhere; they count as wrong

    def __add__(self, other: "Accuracy") -> "Accuracy":
        """Counts over both sets."""
        return Accuracy(
            self.images + other.images,
            self.correct + other.correct,
            self.correct_in_top5 + other.correct_in_top5,
            self.broken + other.broken,
        )

    @property
    def top1(self) -> float:
        """Percent of images whose highest logit is right."""
        return 100 * self.correct / self.counted()

    @property
    def top5(self) -> float:
        """Percent of images whose label is among the five highest logits."""
        return 100 * self.correct_in_top5 / self.counted()

    def metrics(self) -> dict[str, float]:
        """Both, in percent."""
        return {"top1": self.top1, "top5": self.top5}

    def counted(self) -> int:
        """Return how many images; none is an error, and so is a model that answers none of them."""
        if self.images == 0:
            raise DataError("there was no image to evaluate.", "check the source and its val split")
        if self.broken == self.images:
            raise EvaluationError(
                f"the model answers NaN or infinity to all {self.images:,} images.",
                "check the checkpoint, data.mean and data.std; a file in float16 may overflow",
            )
        return self.images


NOTHING = Accuracy(0, 0, 0)


def count_correct(predict: Callable[[Tensor], Tensor], batches: Iterable[Batch]) -> Accuracy:
    """Run `predict` over all prepared batches."""
    return sum((count_batch(predict, batch) for batch in batches), NOTHING)


@torch.inference_mode()
def count_batch(predict: Callable[[Tensor], Tensor], batch: Batch) -> Accuracy:
    """Run `predict` over one prepared batch."""
    return hits_of(predict(batch.images), batch.labels).counted()


class Hits(NamedTuple):
    """What became of each image of a batch (B,)."""

    first: Tensor
    in_top5: Tensor
    broken: Tensor

    def counted(self) -> Accuracy:
        """Count each of them."""
        return Accuracy(len(self.first), *(int(each.sum()) for each in self))


def hits_of(logits: Tensor, labels: Tensor) -> Hits:
    """Tell right, right among the first five, or no answer; NaN would otherwise rank first."""
    broken = ~torch.isfinite(logits).all(dim=1).cpu()
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu() == labels[:, None]
    return Hits(ranked[:, 0] & ~broken, ranked.any(dim=1) & ~broken, broken)


def changes(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[int, int]:
    """Count images that were right and are wrong now, and the other way round."""
    return int((before & ~after).sum()), int((~before & after).sum())


def calibration_error(confidence: NDArray[np.float32], right: NDArray[np.bool_]) -> float:
    """ECE in points: |accuracy - confidence| in 15 bins of confidence, weighted by their images."""
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(place, weights=right - confidence.astype(float), minlength=BINS)
    return float(100 * np.abs(gap).sum() / len(confidence))


def drop_between(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> Drop:
    """Compare answers to the same images: whether each was right."""
    lost, gained = changes(before, after)
    images = len(before)
    return Drop(100 * (lost - gained) / images, *drop_interval(lost, gained, images))


@dataclass(frozen=True)
class Paired:
    """Counts over images that both models answered."""

    baseline: Accuracy
    candidate: Accuracy
    lost: int  # right before, wrong now
    gained: int  # wrong before, right now
    agreeing: int  # same answer, right or wrong
    distance: Distance  # of the logits

    def __add__(self, other: "Paired") -> "Paired":
        """Counts over both sets of images."""
        return Paired(
            self.baseline + other.baseline,
            self.candidate + other.candidate,
            self.lost + other.lost,
            self.gained + other.gained,
            self.agreeing + other.agreeing,
            self.distance + other.distance,
        )

    @property
    def images(self) -> int:
        """How many, if any: a share of few images may be empty, the whole may not."""
        return self.baseline.counted()

    @property
    def drop(self) -> float:
        """Baseline top-1 minus candidate top-1, in points."""
        return 100 * (self.lost - self.gained) / self.images

    @property
    def drop_ci95(self) -> tuple[float, float]:
        """95 % interval of the drop, in points; far narrower than those of the two accuracies."""
        return drop_interval(self.lost, self.gained, self.images)

    @property
    def agreement(self) -> float:
        """Percent of images with the same answer."""
        return 100 * self.agreeing / self.images

    def settled(self) -> "Paired":
        """Counts are numbers already."""
        return self

    def is_below(self, other: "Paired") -> bool:
        """Whether the candidate is beyond doubt worse than that of another pair."""
        lost, gained = self.lost + other.gained, self.gained + other.lost
        return drop_interval(lost, gained, self.images)[0] > 0

    def as_json(self) -> dict[str, Any]:
        """The numbers as ``results.json`` holds them; points in percent."""
        return {
            "images": self.candidate.images,
            "top1": self.candidate.top1,
            "top5": self.candidate.top5,
            "drop": self.drop,
            "drop_ci95": list(self.drop_ci95),
            "agreement": self.agreement,
            "sqnr_db": self.distance.known_db,
        }


@torch.inference_mode()
def count_pairs(
    baseline: Callable[[Tensor], Tensor],
    candidate: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
) -> Paired:
    """Run both over all prepared batches and count."""
    lost = gained = agreeing = 0
    scores = [NOTHING, NOTHING]
    distance = Distance()
    for batch in batches:
        logits = [model(batch.images).cpu() for model in (baseline, candidate)]
        hits = [hits_of(one, batch.labels) for one in logits]
        scores = [so_far + one.counted() for so_far, one in zip(scores, hits, strict=True)]
        lost += int((hits[0].first & ~hits[1].first).sum())
        gained += int((~hits[0].first & hits[1].first).sum())
        # What is no number agrees with nothing, and has no distance.
        sound = ~(hits[0].broken | hits[1].broken)
        before, after = (one[sound] for one in logits)
        agreeing += int((before.argmax(dim=1) == after.argmax(dim=1)).sum())
        distance.add(before, after)
    return Paired(scores[0], scores[1], lost, gained, agreeing, distance)


@dataclass(frozen=True)
class Answers:
    """One model's answers, in the order of the images."""

    first: NDArray[np.int32]  # the class answered, or NO_ANSWER
    right: NDArray[np.bool_]
    in_top5: NDArray[np.bool_]
    confidence: NDArray[np.float32]  # of the class answered
    distance: Distance  # of the logits to the baseline's

    def __add__(self, other: "Answers") -> "Answers":
        """Answers to both lists of images."""
        return Answers(
            np.concatenate([self.first, other.first]),
            np.concatenate([self.right, other.right]),
            np.concatenate([self.in_top5, other.in_top5]),
            np.concatenate([self.confidence, other.confidence]),
            self.distance + other.distance,
        )

    @property
    def broken(self) -> int:
        """Answers that are NaN or infinite somewhere; they count as wrong."""
        return int((self.first == NO_ANSWER).sum())

    @property
    def top1(self) -> float:
        """Percent right."""
        return 100 * float(self.right.mean())

    @property
    def top5(self) -> float:
        """Percent with the label among the first five."""
        return 100 * float(self.in_top5.mean())

    @property
    def sqnr_db(self) -> float | None:
        """Distance of the logits to the baseline's; None for the baseline itself."""
        return self.distance.known_db

    def metrics(self) -> dict[str, float]:
        """Both, in percent."""
        return {"top1": self.top1, "top5": self.top5}

    def intervals(self) -> dict[str, tuple[float, float]]:
        """Top-1 and the number of images tell it."""
        return {}

    def drop_to(self, after: "Answers") -> Drop:
        """Return what of top-1 another model lost on these images."""
        return drop_between(self.right, after.right)

    def agreement(self, after: "Answers") -> float:
        """Return the percent of images that both answered the same."""
        return same_answers(self, after)

    def details(
        self,
        after: "Answers",
        names: tuple[str, str],
        images: "Collected[Answers]",
        classes: Sequence[str],
    ) -> dict[str, Any]:
        """Changed answers, what each class lost, and how far confidence is from accuracy."""
        lost, gained = changes(self.right, after.right)
        flipped = np.flatnonzero(~alike(self, after))
        per_class = {}
        for place in np.unique(images.labels):
            of = images.labels == place
            gone = 100 * float(self.right[of].mean() - after.right[of].mean())
            per_class[classes[int(place)]] = gone
        return {
            "mcnemar_p": mcnemar_p(lost, gained),
            "lost": lost,
            "gained": gained,
            "ece": {
                name: calibration_error(one.confidence, one.right)
                for name, one in zip(names, (self, after), strict=True)
            },
            "drop_per_class": per_class,
            "flipped": [
                {
                    "index": int(images.indices[i]),
                    "label": classes[int(images.labels[i])],
                    "before": _named(classes, int(self.first[i])),
                    "after": _named(classes, int(after.first[i])),
                }
                for i in flipped[:LISTED_FLIPS]
            ],
            "flipped_in_all": len(flipped),
        }


def _named(classes: Sequence[str], first: int) -> str:
    return "no number" if first == NO_ANSWER else classes[first]


def alike(before: Answers, after: Answers) -> NDArray[np.bool_]:
    """Which images both answered the same; what is no number agrees with nothing."""
    same: NDArray[np.bool_] = (before.first == after.first) & (before.first != NO_ANSWER)
    return same


def same_answers(before: Answers, after: Answers) -> float:
    """Return the percent of images that both answered the same."""
    return 100 * float(alike(before, after).mean())


@torch.inference_mode()
def collect_answers(
    models: Mapping[str, Predict],
    baseline_of: Mapping[str, str],
    batches: Iterable[Batch],
    progress: Callable[[int], None],
) -> Collected[Answers]:
    """Run every model over all prepared batches; `baseline_of` says whom each is compared with.

    Each image is decoded once for all of them. A few bytes are held for each image and model, so
    memory is that of the batches.
    """
    parts: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in models}
    distances = {name: Distance() for name in models}
    labels, indices = [], []
    for batch in batches:
        logits = {name: predict(batch.images).cpu() for name, predict in models.items()}
        for name, value in logits.items():
            hits, top = hits_of(value, batch.labels), value.argmax(dim=1, keepdim=True)
            odds = value.float().softmax(dim=1).gather(1, top).squeeze(1)
            answer = top.squeeze(1).masked_fill(hits.broken, NO_ANSWER).int()
            # No answer is no confidence either; NaN would spoil the calibration error of all.
            sure = odds.masked_fill(hits.broken, 0.0)
            parts[name].append((answer, hits.first, hits.in_top5, sure))
            baseline = logits[baseline_of[name]]
            sound = ~hits.broken & torch.isfinite(baseline).all(dim=1)
            distances[name].add(baseline[sound], value[sound])
        labels.append(batch.labels)
        indices.append(batch.indices)
        progress(len(batch.labels))
    if not labels:
        raise DataError("there was no image to evaluate.", "check the source and its val split")
    found = {}
    for name, columns in parts.items():
        first, right, in_top5, confidence = (
            torch.cat(column).numpy() for column in zip(*columns, strict=True)
        )
        one = Answers(first, right, in_top5, confidence, distances[name])
        if one.broken == len(right):
            raise EvaluationError(
                f"{name} answers NaN or infinity to all {one.broken:,} images.",
                "leave it out by --targets, and check the run that made it",
            )
        found[name] = one
    return Collected(torch.cat(labels).numpy(), torch.cat(indices).numpy(), found)


class Classification(Task):
    """One class for an image."""

    name = "classification"
    metric = Metric("top1", "top-1", "top-1")
    shown = {"top1": "top-1", "top5": "top-5"}
    paired = {"mcnemar_p": "McNemar p"}
    same = Same("same answer", "answers")
    recipes = ""
    card = CardWords(
        tag="image-classification",
        metric="accuracy",
        said="Top-1 accuracy",
        noun="an image classifier",
        program="classify.py",
        answer="""\
odds = np.exp(logits[0] - logits[0].max())
best = int(odds.argmax())
print(f"{about['classes'][best]} ({odds[best] / odds.sum():.1%})")
""",
    )
    how_sure = (
        "The interval of a top-1 is Wilson's; that of a drop is of paired images, and so far "
        "narrower: only images whose answer changed sides count."
    )
    kind = Care
    unused: frozenset[str] = frozenset()
    keeps_counts = True

    def samples(self, data: DataSection, split: Split) -> Samples:
        """Open images in folders, or another labelled set."""
        return open_samples(data, split)

    def told(self, value: float, images: int) -> str:
        """Say how many are right."""
        return f"{value:.2f} % of {images:,} images right"

    def interval(self, value: float, images: int) -> tuple[float, float]:
        """Wilson's: top-1 is a share of the images."""
        return wilson(value, images)

    def draw(
        self, image: Image.Image, answer: Tensor, resolution: int, classes: Sequence[str]
    ) -> None:
        """A class is a word."""

    def check_training(self, section: TrainSection) -> None:
        """Everything that a recipe can ask for was made for this task."""

    def targets(self, batch: Batch, images_BCHW: Tensor, lesson: Lesson) -> tuple[Tensor, Targets]:
        """Return mixed images and their softened labels."""
        labels, plan = batch.labels.to(images_BCHW.device), lesson.plan
        targets = soft_targets(labels, lesson.num_classes, plan.label_smoothing)
        return mix(images_BCHW, targets, plan.augment, lesson.seed, lesson.step)

    def objective(self, distill: DistillSection | None, teacher: Predictor | None) -> Objective:
        """Train both heads."""
        return BothHeads(distill, teacher)

    def loss(self, answer: Tensor, targets: Targets) -> Tensor:
        """Cross-entropy with soft targets."""
        return F.cross_entropy(answer, targets)

    def loss_of_images(self, answer: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of each image."""
        return F.cross_entropy(answer, batch.labels.to(answer.device), reduction="sum")

    def along(self, answer: Tensor, generator: torch.Generator) -> Tensor:
        """Logits along a random direction."""
        return logits_along(answer, generator)

    def weighed(self, answer: Tensor, reference: Tensor) -> Tensor:
        """Every logit counts alike."""
        return answer

    def lost(self, before: Accuracy, after: Accuracy) -> float:
        """Points of top-1."""
        return 100 * (before.correct / before.images - after.correct / after.images)

    def following(self, answer: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Divergence of the softened answers."""
        return softened_distance(answer, taught, temperature)

    def running_score(self, answer: Tensor, batch: Batch) -> float:
        """Top-1 of one batch."""
        right = answer.argmax(dim=1) == batch.labels.to(answer.device)
        return 100 * int(right.sum()) / len(batch.labels)

    def count(self, answer: Tensor, batch: Batch) -> Accuracy:
        """Count a batch."""
        return hits_of(answer, batch.labels).counted()

    def count_pairs(
        self, baseline: Predict, candidate: Predict, batches: Iterable[Batch]
    ) -> Paired:
        """Count what changed."""
        return count_pairs(baseline, candidate, batches)

    def score_of(self, record: Any) -> Accuracy:
        """Read counts from JSON."""
        return Accuracy(**record)

    def record_of_score(self, score: Any) -> Any:
        """Return counts as JSON."""
        return asdict(score)

    def pair_of(self, record: Any) -> Paired:
        """Read counts from JSON."""
        return _PAIRED.validate_python(record)

    def record_of(self, pair: Any) -> Any:
        """Return counts as JSON."""
        return _PAIRED.dump_python(pair, mode="json")

    def collect(
        self,
        models: Mapping[str, Predict],
        baseline_of: Mapping[str, str],
        batches: Iterable[Batch],
        progress: Callable[[int], None],
    ) -> Collected[Answers]:
        """Keep the class answered, and how sure it was."""
        return collect_answers(models, baseline_of, batches, progress)

    def rows(self, answer: Tensor) -> Tensor:
        """Logits are rows."""
        return answer


_PAIRED = TypeAdapter(Paired)
