"""``care-compress accuracy FILE``: one artifact on a whole image set, however long that takes.

Images stream, so memory does not grow with them. Under torchrun each process takes its share, and
``--ray`` hands them out in pieces. With ``--json`` an interrupted evaluation goes on where it was,
and ends with the same numbers.
"""

import contextlib
import json
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console

from care_compress import machine
from care_compress.console import progress_bar, show_checks
from care_compress.data.loader import BadImages, images_at_once, prepared_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.data.sources import check_classes
from care_compress.errors import RunError, Stopped
from care_compress.evaluate.accuracy import (
    answers_check,
    count,
    metrics_line,
    own_share,
    total,
    whole,
)
from care_compress.files import digest_of, fingerprint, json_text, read_json, write_text
from care_compress.model.predictor import Predictor
from care_compress.recipe.sections import DataSection
from care_compress.run.processes import World, join_world
from care_compress.runtime.artifact import artifact_path, open_predictor
from care_compress.runtime.probe import probe
from care_compress.tasks.known import task_called
from care_compress.tasks.task import Score, Task

SECONDS = 10.0  # between states; what is lost when a process is killed


@dataclass(frozen=True)
class ScoringProgress:
    """What one process has counted so far."""

    done: int = 0  # of its images, in whole batches
    accuracy: Score | None = None
    skipped: dict[str, str] = field(default_factory=dict)  # name to what is wrong with it


class ProgressFile:
    """One process's state on disk; nothing is kept without a path."""

    def __init__(self, task: Task, path: Path | None, evaluation: str) -> None:
        self.task = task
        self.path = path
        self.evaluation = evaluation  # fingerprint of all that decides the numbers
        self.is_of_another = False  # found when it is read
        self._written = time.monotonic()

    @classmethod
    def beside(
        cls, task: Task, json_file: Path | None, world: World, evaluation: str
    ) -> "ProgressFile":
        """Open the file of this process: a share of other processes is another evaluation."""
        if json_file is None:
            return cls(task, None, evaluation)
        process = "" if world.size == 1 else f"-{world.rank}-of-{world.size}"
        return cls(task, json_file.with_name(f"{json_file.name}.progress{process}"), evaluation)

    def read(self) -> ScoringProgress:
        """Read where the same evaluation was interrupted; the beginning, if it was not."""
        if self.path is None or not self.path.is_file():
            return ScoringProgress()
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: not ours to continue
            found = read_json(self.path)
            if found["evaluation"] == self.evaluation:
                known = found["accuracy"]
                score = None if known is None else self.task.score_of(known)
                return ScoringProgress(found["done"], score, found["skipped"])
        self.is_of_another = True
        return ScoringProgress()

    def keep(self, progress: ScoringProgress) -> None:
        """Write, if the last state is old."""
        if time.monotonic() - self._written >= SECONDS:
            self.write(progress)

    def write(self, progress: ScoringProgress) -> None:
        """Write now."""
        # A record of every image is more than what is saved by going on from it.
        if self.path is not None and self.task.keeps_counts:
            score = progress.accuracy
            known = None if score is None else self.task.record_of_score(score)
            content = {
                "evaluation": self.evaluation,
                "done": progress.done,
                "accuracy": known,
                "skipped": progress.skipped,
            }
            write_text(self.path, json.dumps(content) + "\n")
        self._written = time.monotonic()

    def remove(self) -> None:
        """Remove it: the evaluation is through."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def hint(self) -> str:
        """Say what a user who interrupts should know."""
        if self.path is None:
            return "with --json FILE the same command would go on from here"
        return "the same command goes on from here"


@dataclass(frozen=True)
class ScoringJob:
    """What is scored on what, as plain data: another process can open it."""

    artifact: str
    digest: str  # of the file
    data: DataSection
    listing: str  # fingerprint of the samples
    batch_size: int
    device: str


class Scored(NamedTuple):
    """What came of some images, in whole batches."""

    images: int
    score: Score | None
    skipped: dict[str, str]


# A job and positions of images; what comes back is of the first of them, then of the next.
ScoreImages = Callable[[ScoringJob, Sequence[int]], Generator[Scored]]


def measure_artifact(
    artifact: str,
    data: DataSection,
    images: int | None,
    batch_size: int | None,
    json_file: Path | None,
    console: Console,
    score_images: ScoreImages | None = None,
) -> Score:
    """Score one file on the validation images of a source, and say so.

    `score_images` may spread the images over processes; without it they are scored here.
    """
    path = artifact_path(artifact)
    with join_world() as world:
        console = console if world.is_main else Console(quiet=True)
        threads = None
        if world.local_size > 1:  # each runtime would take all cores
            threads = max(1, len(machine.usable_cores()) // world.local_size)
        probe(path, data.resolution)
        predict = open_predictor(artifact, world.device, threads)
        task = task_called(predict.task)
        samples = task.samples(data, "val")
        check_classes(samples, predict.num_classes)
        # On a CPU memory of larger batches is new each time, and the system clears it first: at
        # 224 that costs more than everything else beside the network (LOG.md).
        batch_size = images_at_once(batch_size, world.device)
        chosen = own_share(spread_indices(len(samples), images), batch_size, world)
        digest, listing = digest_of(path), samples.fingerprint()
        job = ScoringJob(artifact, digest, data, listing, batch_size, world.device.type)

        def here(job: ScoringJob, indices: Sequence[int]) -> Generator[Scored]:
            return batch_by_batch(predict, samples, job, indices, world.device)

        # What decides the numbers; how many processes decode does not.
        about = data.model_dump(mode="json", exclude={"workers"})
        asked = [digest, images, world.rank, world.size]
        given = [about, samples.content_digest(), batch_size, world.device.type]
        state = ProgressFile.beside(task, json_file, world, fingerprint([*asked, *given]))
        mine = _score(score_images or here, job, chosen, state, world, console)
        every = world.gathered(mine)
        accuracy = whole(one.accuracy for one in every)
        skipped = {name: why for one in every for name, why in one.skipped.items()}
        for name, reason in skipped.items():
            console.print(f"skipped {name}: {reason}", markup=False)
        show_checks([answers_check({"the model": accuracy})], console)
        console.print(f"{'  '.join(metrics_line(task, accuracy))}  on {accuracy.images:,} images")
        if json_file is not None and world.is_main:
            result = {
                "artifact": artifact,
                "task": task.name,
                "images": accuracy.images,
                **accuracy.metrics(),
                "not_finite": accuracy.broken,
                "skipped_images": skipped,
                "data": data.model_dump(mode="json"),
                "samples": listing,
            }
            write_text(json_file, json_text(result))
        world.wait()  # the states are of use until the result is written
        state.remove()
    return accuracy


def batch_by_batch(
    predict: Predictor,
    samples: Samples,
    job: ScoringJob,
    indices: Sequence[int],
    device: torch.device,
) -> Generator[Scored]:
    """Score these images, which rise, in this process; close it."""
    task, bad, through = task_called(predict.task), BadImages(), 0
    batches = prepared_batches(
        samples, job.data, job.batch_size, bad=bad, indices=indices, device=device
    )
    with contextlib.closing(batches):
        for batch in batches:
            score = count(task, predict, [batch])
            # Bad images are no part of a batch, but its last image tells which batch it is.
            number = bisect_left(indices, int(batch.indices[-1])) // job.batch_size
            done = min((number + 1) * job.batch_size, len(indices))
            yield Scored(done - through, score, dict(bad.reasons))
            through = done
    # The last batches may have been nothing but bad images.
    yield Scored(len(indices) - through, None, dict(bad.reasons))


def score_elsewhere(job: ScoringJob, indices: Sequence[int], threads: int) -> Scored:
    """Score these images in a process that has opened nothing, or the same job before."""
    predict, samples, device = opened(job, threads)
    with contextlib.closing(batch_by_batch(predict, samples, job, indices, device)) as parts:
        found = list(parts)
    return Scored(len(indices), total(one.score for one in found), found[-1].skipped)


@lru_cache(maxsize=1)
def opened(job: ScoringJob, threads: int) -> tuple[Predictor, Samples, torch.device]:
    """Open a job's file and images; `RunError` where they are not those that were asked about."""
    device = torch.device(job.device)
    predict = open_predictor(job.artifact, device, threads)
    samples = task_called(predict.task).samples(job.data, "val")
    same = digest_of(artifact_path(job.artifact)) == job.digest
    if not same or samples.fingerprint() != job.listing:
        what = job.data.source if same else job.artifact
        raise RunError(
            f"{platform.node()} has another {what} than the machine that hands out work.",
            "put it where every node sees it under the same path",
        )
    return predict, samples, device


def _score(
    score_images: ScoreImages,
    job: ScoringJob,
    indices: Sequence[int],
    state: ProgressFile,
    world: World,
    console: Console,
) -> ScoringProgress:
    """Score the share of one process, from where it was interrupted."""
    so_far = state.read()
    before = sum(world.gathered(so_far.done))
    if before:
        console.print(f"going on after {before:,} images")
    elif state.is_of_another:
        console.print("another evaluation was interrupted here: starting anew")
    state.write(so_far)  # a place that cannot be written to is found now, not after hours
    try:
        with (
            progress_bar(console, "evaluating", len(indices)) as advance,
            contextlib.closing(score_images(job, indices[so_far.done :])) as parts,
        ):
            advance(so_far.done)
            for part in parts:
                advance(part.images)
                so_far = ScoringProgress(
                    so_far.done + part.images,
                    total((so_far.accuracy, part.score)),
                    {**so_far.skipped, **part.skipped},
                )
                state.keep(so_far)
    except BaseException as error:
        if so_far.done:
            state.write(so_far)
        else:
            state.remove()
        if isinstance(error, KeyboardInterrupt):
            console.print(f"interrupted; {state.hint()}")
        if isinstance(error, Stopped):  # the command line says it, in its last line
            error.hint = state.hint()
        raise
    return so_far
