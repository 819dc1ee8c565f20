"""What evaluating an image set costs beside its larger half: decoding alone, or inference alone.

    make bench WHAT=evaluate
    .venv/bin/python bench/evaluate.py --artifact int8.xml --data images.zip --res 96 --crop 1.0

Workers and threads share the cores out, so that neither half slows the other. The repetitions of
the three loops alternate; a ratio of 1 means that the smaller half is free. Other programs only add
time, so the shortest of each loop says most where the machine is not ours alone. Processor seconds
see neither other programs nor the wait for the first images.
"""

import json
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from data import make_images
from rich.console import Console
from rich.progress import track
from rich.table import Table

from care_compress.data.loader import BATCH_SIZES, BadImages, evaluation_batches, prepared_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.data.sources import open_samples
from care_compress.data.transforms import EvalTransform
from care_compress.evaluate.accuracy import measure_accuracy
from care_compress.model.predictor import Predictor
from care_compress.recipe.sections import DataSection
from care_compress.runtime.artifact import open_predictor
from care_compress.tasks.classification import Classification

BATCH_SIZE = BATCH_SIZES["cpu"]
QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Cost:
    """Seconds at best, and how much the whole takes of its larger half."""

    artifact: str
    images: int
    workers: int
    threads: int
    decoding: float
    inference: float
    whole: float
    ratio: float  # of these three
    ratio_median: float  # within a repetition
    ratio_min: float
    ratio_max: float
    processor_ratio: float  # processor seconds of this process over those of inference alone


@dataclass(frozen=True)
class Spent:
    """Seconds on the clock, and seconds this process (decoding workers apart) had a core."""

    clock: float
    processor: float


@dataclass(frozen=True)
class Job:
    """One artifact on some images."""

    predict: Predictor
    samples: Samples
    data: DataSection
    indices: list[int]

    def decode(self) -> Spent:
        """All images to pixels, and nothing else."""
        transform = EvalTransform(self.data.resolution, self.data.crop_pct, self.data.exif_rotate)
        loaded = evaluation_batches(
            self.samples, transform, BATCH_SIZE, self.data, bad=BadImages(), indices=self.indices
        )
        return seconds(lambda: deque(loaded, maxlen=0))

    def infer(self) -> Spent:
        """As many images through the network, always the same ones."""
        here = self.data.model_copy(update={"workers": 0})
        first = self.indices[:BATCH_SIZE]
        (batch,) = prepared_batches(self.samples, here, BATCH_SIZE, bad=BadImages(), indices=first)
        sizes = [len(self.indices) - at for at in range(0, len(self.indices), BATCH_SIZE)]
        with torch.inference_mode():
            return seconds(lambda: [self.predict(batch.images[:size]) for size in sizes])

    def whole(self) -> Spent:
        """The evaluation as ``care-compress accuracy`` does it."""
        return seconds(
            lambda: measure_accuracy(
                Classification(),
                self.predict,
                self.samples,
                self.data,
                batch_size=BATCH_SIZE,
                indices=self.indices,
                bad=BadImages(),
                console=QUIET,
            )
        )


def seconds(work: Callable[[], object]) -> Spent:
    """How long it takes."""
    began, used = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - began, time.process_time() - used)


def main(
    artifact: Annotated[str, typer.Option(help="any file accuracy takes")] = "",
    data: Annotated[str, typer.Option(help="its images; JPEGs are made if left out")] = "",
    res: Annotated[int, typer.Option(help="input resolution")] = 224,
    crop: Annotated[float, typer.Option(help="crop ratio")] = 0.875,
    images: Annotated[int, typer.Option(help="how many of them")] = 1024,
    workers: Annotated[int, typer.Option(help="decoding processes")] = 1,
    threads: Annotated[int, typer.Option(help="of the runtime")] = 1,
    repetitions: Annotated[int, typer.Option(help="of each loop")] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="write figures here")] = None,
) -> None:
    """Time decoding, inference and the evaluation in turns; print the ratio to the larger half."""
    torch.set_num_threads(threads)
    name = artifact or "builtin:care_nano_shapes"
    with tempfile.TemporaryDirectory() as folder:
        if not data:
            make_images(Path(folder), images)
        section = DataSection(source=data or folder, resolution=res, crop_pct=crop, workers=workers)
        samples = open_samples(section, "val")
        predict = open_predictor(name, torch.device("cpu"), threads)
        job = Job(predict, samples, section, spread_indices(len(samples), images))
        cost = measure(Path(name).name, job, threads, repetitions)
    Console().print(table_of(cost))
    if json_file:
        json_file.write_text(json.dumps(asdict(cost), indent=2) + "\n")


def measure(artifact: str, job: Job, threads: int, repetitions: int) -> Cost:
    """The three loops in turn."""
    found = []
    job.infer()  # memory is allocated in the first
    for _ in track(range(repetitions), artifact, transient=True):
        found.append((job.decode(), job.infer(), job.whole()))
    ratios = [
        whole.clock / max(decoding.clock, inference.clock) for decoding, inference, whole in found
    ]
    columns = list(zip(*found, strict=True))
    decoding, inference, whole = (min(spent.clock for spent in column) for column in columns)
    _, alone, together = (min(spent.processor for spent in column) for column in columns)
    workers = job.data.workers
    assert workers is not None
    return Cost(
        artifact,
        len(job.indices),
        workers,
        threads,
        decoding,
        inference,
        whole,
        whole / max(decoding, inference),
        statistics.median(ratios),
        min(ratios),
        max(ratios),
        together / alone,
    )


def table_of(cost: Cost) -> Table:
    """The figures."""
    table = Table(
        "artifact", "images", "decode s", "infer s", "whole s", "ratio", "paired", "processor"
    )
    table.add_row(
        cost.artifact,
        f"{cost.images}",
        *(f"{value:.2f}" for value in (cost.decoding, cost.inference, cost.whole)),
        f"{cost.ratio:.3f}",
        f"{cost.ratio_median:.3f} [{cost.ratio_min:.3f} .. {cost.ratio_max:.3f}]",
        f"{cost.processor_ratio:.3f}",
    )
    return table


if __name__ == "__main__":
    typer.run(main)
