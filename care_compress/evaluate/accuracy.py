"""Top-1 and top-5 of any predictor, streaming: memory does not grow with the number of images."""

import contextlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from care_compress.data.loader import CPU, BadImages, Batch, prepared_batches
from care_compress.data.samples import Samples
from care_compress.data.sources import check_classes, open_samples
from care_compress.errors import DataError
from care_compress.predictor import Predictor
from care_compress.progress import progress_bar
from care_compress.run import write_text
from care_compress.runtime.opening import open_predictor
from care_compress.sections import DataSection


@dataclass(frozen=True)
class Accuracy:
    """Counts over a set of images."""

    images: int
    correct: int
    correct_in_top5: int

    @property
    def top1(self) -> float:
        """Percent of images whose highest logit is right."""
        return 100 * self.correct / self._counted()

    @property
    def top5(self) -> float:
        """Percent of images whose label is among the five highest logits."""
        return 100 * self.correct_in_top5 / self._counted()

    def _counted(self) -> int:
        if self.images == 0:
            raise DataError("there was no image to evaluate.", "check the source and its val split")
        return self.images


def measure_artifact(
    artifact: str,
    data: DataSection,
    images: int | None,
    batch_size: int,
    json_file: Path | None,
    console: Console,
) -> Accuracy:
    """Score one file on the validation images of a source, and say so."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    predict = open_predictor(artifact, device)
    samples = open_samples(data, "val")
    check_classes(samples, predict.num_classes)
    bad = BadImages()
    accuracy = measure_accuracy(
        predict,
        samples,
        data,
        batch_size=batch_size,
        indices=spread_indices(len(samples), images),
        bad=bad,
        console=console,
        device=device,
    )
    for name, reason in bad.reasons.items():
        console.print(f"skipped {name}: {reason}", markup=False)
    console.print(
        f"top-1 {accuracy.top1:.2f} %  top-5 {accuracy.top5:.2f} %  on {accuracy.images:,} images"
    )
    if json_file is not None:
        result = {
            "artifact": artifact,
            "images": accuracy.images,
            "top1": accuracy.top1,
            "top5": accuracy.top5,
            "skipped_images": bad.reasons,
            "data": data.model_dump(mode="json"),
            "samples": samples.fingerprint(),
        }
        write_text(json_file, json.dumps(result, indent=2) + "\n")
    return accuracy


def spread_indices(count: int, wanted: int | None) -> list[int]:
    """`wanted` of `count` images, evenly spaced: the first of a folder are all of one class."""
    chosen = min(wanted or count, count)
    return [i * count // chosen for i in range(chosen)]


def measure_accuracy(
    predict: Predictor,
    samples: Samples,
    data: DataSection,
    *,
    batch_size: int,
    indices: Sequence[int],
    bad: BadImages,
    console: Console,
    device: torch.device = CPU,
) -> Accuracy:
    """Accuracy of `predict` on these images of a data set."""
    batches = prepared_batches(samples, data, batch_size, bad=bad, indices=indices, device=device)
    with (
        contextlib.closing(batches),
        progress_bar(console, "evaluating", len(indices)) as advance,
    ):
        return count_correct(predict, batches, advance)


@torch.inference_mode()
def count_correct(
    predict: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    progress: Callable[[int], None] = lambda images: None,
) -> Accuracy:
    """Run `predict` over all prepared batches."""
    images = correct = in_top5 = 0
    for batch in batches:
        logits = predict(batch.images)
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked.cpu() == batch.labels[:, None]
        images += len(batch.labels)
        correct += int(hits[:, 0].sum())
        in_top5 += int(hits.sum())
        progress(len(batch.labels))
    return Accuracy(images, correct, in_top5)
