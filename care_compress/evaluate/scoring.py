"""``care-compress accuracy FILE``: one artifact on a whole image set, however long that takes.

Images stream, so memory does not grow with them. Under torchrun each process takes its share. With
``--json`` an interrupted evaluation goes on where it was, and ends with the same numbers.
"""

import contextlib
import json
import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from care_compress import machine
from care_compress.console import progress_bar, show_checks
from care_compress.data.loader import BadImages, images_at_once, prepared_batches
from care_compress.data.samples import Samples, spread_indices
from care_compress.data.sources import check_classes
from care_compress.errors import Stopped
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


def measure_artifact(
    artifact: str,
    data: DataSection,
    images: int | None,
    batch_size: int | None,
    json_file: Path | None,
    console: Console,
) -> Score:
    """Score one file on the validation images of a source, and say so."""
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
        job = _Job(samples, data, chosen, batch_size)
        # What decides the numbers; how many processes decode does not.
        about = data.model_dump(mode="json", exclude={"workers"})
        asked = [digest_of(path), images, world.rank, world.size]
        given = [about, samples.content_digest(), batch_size, world.device.type]
        state = ProgressFile.beside(task, json_file, world, fingerprint([*asked, *given]))
        mine = _score(predict, job, state, world, console)
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
                "samples": samples.fingerprint(),
            }
            write_text(json_file, json_text(result))
        world.wait()  # the states are of use until the result is written
        state.remove()
    return accuracy


@dataclass(frozen=True)
class _Job:
    """One process's images."""

    samples: Samples
    data: DataSection
    indices: Sequence[int]  # rising
    batch_size: int


def _score(
    predict: Predictor, job: _Job, state: ProgressFile, world: World, console: Console
) -> ScoringProgress:
    """Score the share of one process, from where it was interrupted."""
    so_far = state.read()
    before = sum(world.gathered(so_far.done))
    if before:
        console.print(f"going on after {before:,} images")
    elif state.is_of_another:
        console.print("another evaluation was interrupted here: starting anew")
    state.write(so_far)  # a place that cannot be written to is found now, not after hours
    bad, indices = BadImages(dict(so_far.skipped)), job.indices
    batches = prepared_batches(
        job.samples,
        job.data,
        job.batch_size,
        bad=bad,
        indices=indices[so_far.done :],
        device=world.device,
    )
    try:
        with (
            progress_bar(console, "evaluating", len(indices)) as advance,
            contextlib.closing(batches),
        ):
            advance(so_far.done)
            for batch in batches:
                accuracy = total((so_far.accuracy, count(state.task, predict, [batch])))
                # Bad images are no part of a batch, but its last image tells which batch it is.
                number = bisect_left(indices, int(batch.indices[-1])) // job.batch_size
                done = min((number + 1) * job.batch_size, len(indices))
                advance(done - so_far.done)
                so_far = ScoringProgress(done, accuracy, bad.reasons)
                state.keep(so_far)
            # The last batches may have been nothing but bad images.
            advance(len(indices) - so_far.done)
            so_far = ScoringProgress(len(indices), so_far.accuracy, bad.reasons)
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
