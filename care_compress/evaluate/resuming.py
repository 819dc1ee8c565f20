"""The state of an evaluation beside its ``--json`` file, until that file is written."""

import contextlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from care_compress.evaluate.accuracy import NOTHING, Accuracy
from care_compress.files import read_json
from care_compress.run import write_text
from care_compress.train.distributed import World

SECONDS = 10.0  # between states; what is lost when a process is killed


@dataclass(frozen=True)
class Progress:
    """What one process has counted so far."""

    done: int = 0  # of its images, in whole batches
    accuracy: Accuracy = NOTHING
    skipped: dict[str, str] = field(default_factory=dict)  # name to what is wrong with it


class ProgressFile:
    """One process's state on disk; nothing is kept without a path."""

    def __init__(self, path: Path | None, evaluation: str) -> None:
        self.path = path
        self.evaluation = evaluation  # fingerprint of all that decides the numbers
        self.is_of_another = False  # found when it is read
        self._written = time.monotonic()

    @classmethod
    def beside(cls, json_file: Path | None, world: World, evaluation: str) -> "ProgressFile":
        """Of this process: a share of other processes is another evaluation."""
        if json_file is None:
            return cls(None, evaluation)
        process = "" if world.size == 1 else f"-{world.rank}-of-{world.size}"
        return cls(json_file.with_name(f"{json_file.name}.progress{process}"), evaluation)

    def read(self) -> Progress:
        """Where the same evaluation was interrupted; the beginning, if it was not."""
        if self.path is None or not self.path.is_file():
            return Progress()
        with contextlib.suppress(ValueError, KeyError, TypeError):  # damaged: not ours to continue
            found = read_json(self.path)
            if found["evaluation"] == self.evaluation:
                return Progress(found["done"], Accuracy(**found["accuracy"]), found["skipped"])
        self.is_of_another = True
        return Progress()

    def keep(self, progress: Progress) -> None:
        """Write, if the last state is old."""
        if time.monotonic() - self._written >= SECONDS:
            self.write(progress)

    def write(self, progress: Progress) -> None:
        """Write now."""
        if self.path is not None:
            content = {"evaluation": self.evaluation, **asdict(progress)}
            write_text(self.path, json.dumps(content) + "\n")
        self._written = time.monotonic()

    def remove(self) -> None:
        """The evaluation is through."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def hint(self) -> str:
        """What a user who interrupts should know."""
        if self.path is None:
            return "with --json FILE the same command would go on from here"
        return "the same command goes on from here"
