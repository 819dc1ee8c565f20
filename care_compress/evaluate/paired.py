"""A model beside its baseline on the same images: drop with its interval, agreement, distance."""

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import TypeAdapter
from rich.console import Console
from torch import Tensor

from care_compress.data.loader import BadImages, Batch, prepared_batches
from care_compress.data.overlap import Contents
from care_compress.data.samples import Samples
from care_compress.evaluate.accuracy import NOTHING, Accuracy, hits_of
from care_compress.evaluate.significance import NORMAL_95
from care_compress.predictor import Predictor
from care_compress.progress import progress_bar
from care_compress.quantize.distance import Distance
from care_compress.sections import DataSection


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

    def as_record(self) -> Any:
        """The counts as plain data, for `of_record`."""
        return json.loads(_PLAIN.dump_json(self))

    @classmethod
    def of_record(cls, record: Any) -> "Paired":
        """What `as_record` gave."""
        return _PLAIN.validate_python(record)

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
        """95 % interval of the drop for paired proportions.

        Var = (lost + gained - (lost - gained)^2 / n) / n^2: only images whose answer changed sides
        count, so it is far narrower than the intervals of the two accuracies.
        """
        n = self.images
        changed, net = self.lost + self.gained, self.lost - self.gained
        half = NORMAL_95 * math.sqrt(max(0.0, changed - net**2 / n)) / n
        return self.drop - 100 * half, self.drop + 100 * half

    @property
    def agreement(self) -> float:
        """Percent of images with the same answer."""
        return 100 * self.agreeing / self.images

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


_PLAIN = TypeAdapter(Paired)


def measure_pair(
    baseline: Predictor,
    candidate: Predictor,
    samples: Samples,
    data: DataSection,
    *,
    batch_size: int,
    indices: Sequence[int],
    bad: BadImages,
    console: Console,
    device: torch.device,
    contents: Contents | None = None,
) -> Paired:
    """Both models on these images, decoded once; `contents` takes digests of them."""
    batches = prepared_batches(
        samples, data, batch_size, bad=bad, indices=indices, device=device, contents=contents
    )
    with (
        contextlib.closing(batches),
        progress_bar(console, "evaluating", len(indices)) as advance,
    ):
        return count_pairs(baseline, candidate, batches, advance)


@torch.inference_mode()
def count_pairs(
    baseline: Callable[[Tensor], Tensor],
    candidate: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    progress: Callable[[int], None] = lambda images: None,
) -> Paired:
    """Run both over all prepared batches and count."""
    lost = gained = agreeing = 0
    scores = [NOTHING, NOTHING]
    distance = Distance()
    for batch in batches:
        logits = [model(batch.images).cpu() for model in (baseline, candidate)]
        hits = [hits_of(one, batch.labels) for one in logits]
        for which, (first, in_top5, broken) in enumerate(hits):
            scores[which] += Accuracy(len(first), *(int(n.sum()) for n in (first, in_top5, broken)))
        lost += int((hits[0].first & ~hits[1].first).sum())
        gained += int((~hits[0].first & hits[1].first).sum())
        # What is no number agrees with nothing, and has no distance.
        sound = ~(hits[0].broken | hits[1].broken)
        before, after = (one[sound] for one in logits)
        agreeing += int((before.argmax(dim=1) == after.argmax(dim=1)).sum())
        distance.add(before, after)
        progress(len(batch.labels))
    return Paired(scores[0], scores[1], lost, gained, agreeing, distance)
