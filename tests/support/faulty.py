"""The product in processes of its own, to be killed, stopped and starved, and what it leaves.

Processes are forked from one that has imported everything: a kill then costs the work that it
interrupts, not seconds of imports.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from quantized import care
from tiny import image_folder

from care_compress.cli import main
from care_compress.model.checkpoint import save_checkpoint
from care_compress.run.directory import Run

LONGEST = 240.0  # seconds; what takes longer hangs
Harm = Callable[[], None]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["care_compress.pipeline", "faulty"])


def end_server() -> None:
    """End what processes are forked from, which lives as long as the tests otherwise.

    As Python's own tests do, because other tests count the children of this process.
    """
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@dataclass
class Product:
    """One command, started as often as it takes."""

    recipe: Path
    runs: Path
    options: tuple[str, ...] = ()
    aside: Path | None = None
    started: int = 0
    short: tempfile.TemporaryDirectory[str] = field(
        default_factory=lambda: tempfile.TemporaryDirectory(prefix="faulty-")
    )

    @property
    def run(self) -> Path:
        return self.runs / "run"

    @property
    def temporary(self) -> Path:
        """Sockets are made there, whose names are short."""
        return Path(self.short.name)

    @property
    def scratch(self) -> Path:
        """Beside the runs, and never on their disk: what is said."""
        folder = self.aside or self.runs.with_name(f"{self.runs.name}-aside")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def start(self, harm: Harm | None = None, *more: str) -> "Process":
        self.started += 1
        log = self.scratch / f"said-{self.started}.log"
        log.write_bytes(b"")
        given = ["quantize", str(self.recipe), "--runs", str(self.runs), "--name", "run"]
        given += [*self.options, *more]
        process = _CONTEXT.Process(target=_work, args=(given, log, self.temporary, harm))
        process.start()
        return Process(process, log)

    def finish(self, *more: str) -> dict[str, Any]:
        """Run to the end, without a disturbance; what it left."""
        process = self.start(None, *more)
        assert process.wait() == 0, process.said
        return self.left()

    def left(self) -> dict[str, Any]:
        """Digests of every result, and the numbers in ``results.json`` but for times."""
        assert not list(self.runs.rglob(".*.tmp")), "a temporary file was left"
        # A killed loader leaves a folder of its sockets: torch's, in the system's temporary place.
        others = [one for one in self.temporary.iterdir() if not one.name.startswith("pymp-")]
        assert not others, "a temporary file was left"
        results = json.loads((self.run / "results.json").read_text())
        del results["seconds"]
        kept = {
            str(path.relative_to(self.run)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.run.rglob("*"))
            if path.is_file() and not _is_scratch(path)
        }
        return {"results": results, "files": kept}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Two of what `left` gives: the same files, bit for bit, and the same numbers."""
    files = found["files"], expected["files"]
    different = [name for name in files[0] | files[1] if files[0].get(name) != files[1].get(name)]
    assert not different, f"these files differ: {different}"
    assert found["results"] == expected["results"], "the numbers differ"


def _is_scratch(path: Path) -> bool:
    """States, curves and what tells times."""
    return (
        path.name.startswith("train_state")
        or path.name in {".lock", "manifest.json", "results.json"}
        or path.parent.name == "tensorboard"
    )


@dataclass
class Process:
    process: ForkServerProcess
    log: Path

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def errors(self) -> list[str]:
        """Lines of standard error."""
        return [line[2:] for line in self.said.splitlines() if line.startswith("E:")]

    def children(self) -> list[psutil.Process]:
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def wait(self, seconds: float = LONGEST) -> int:
        self.process.join(seconds)
        if self.process.exitcode is None:
            said = self.said
            self.process.kill()
            raise AssertionError(f"it hangs after {seconds} seconds: {said}")
        return self.process.exitcode

    def ends_within(self, seconds: float) -> bool:
        self.process.join(seconds)
        return self.process.exitcode is not None

    def signal(self, signum: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signum)


class _Marked:
    """Standard error, told from standard output in one log."""

    def __init__(self) -> None:
        self.fresh = True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            os.write(2, ("E:" if self.fresh else "").encode() + line.encode())
            self.fresh = line.endswith("\n")
        return len(text)

    def flush(self) -> None: ...

    def isatty(self) -> bool:
        return False


def _work(arguments: list[str], log: Path, temporary: Path, harm: Harm | None) -> None:
    """What the child does."""
    out = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stderr = _Marked()  # type: ignore[assignment]
    tempfile.tempdir = str(temporary)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was not forked
    torch.set_num_threads(1)
    # A shell ignores Ctrl-C for what it starts in the background, these tests too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if harm is not None:
        harm()
    main(arguments)


def kill_at_border(stage: str, written: bool) -> Harm:
    """Die right before, or right after, a stage is recorded."""
    return functools.partial(_kill_at_border, stage, written)


def _kill_at_border(stage: str, written: bool) -> None:
    record = Run.record_stage

    def die(self: Run, name: str, value: Any) -> None:
        if written:
            record(self, name, value)
        if name == stage:
            os.kill(os.getpid(), signal.SIGKILL)
        record(self, name, value)

    Run.record_stage = die  # type: ignore[method-assign]


def kill_at_write(number: int) -> Harm:
    """Die in the middle of putting a file into its place, the one of this number."""
    return functools.partial(_kill_at_write, number)


def _kill_at_write(number: int) -> None:
    replace, done = Path.replace, 0

    def die(self: Path, target: Path) -> Path:
        nonlocal done
        done += 1
        if done == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = die  # type: ignore[method-assign,assignment]


RULES = [
    {"weight": 8, "input": 8},
    {"role": "residual_add", "input": "float"},
    {"role": "attention.kv", "input": "float"},
    {"role": "attention.out", "input": "float"},
]


def small_recipe(
    folder: Path, targets: list[str], workers: int = 0, train: bool = True, **quantize: object
) -> Path:
    """A recipe with every kind of stage, on four classes of small images; made in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    images = folder / "images"
    if not images.exists():
        image_folder(images, per_class=12)
    save_checkpoint(care(4), folder / "four.safetensors", {})
    plan = {"batch_size": 8, "checkpoint_steps": 1}
    content: dict[str, Any] = {
        "claim": "a test",
        "precision": "int8",
        "model": {"arch": "care_nano"}
        if train
        else {"checkpoint": str(folder / "four.safetensors")},
        "data": {"source": str(images), "resolution": 32, "crop_pct": 1.0, "workers": workers},
        "rewrite": {"fold_norms": False},
        "quantize": {
            "target": None,
            "rules": RULES,
            "calibrate": {"images": 16},
            "qat": {**plan, "max_steps": 3, "ema_decay": 0.9},
            **quantize,
        },
        "export": {"targets": targets, "images": 8},
    }
    if train:
        content["train"] = {**plan, "epochs": 1, "learning_rate": 2e-3, "ema_decay": 0.9}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def flip_bit(path: Path) -> None:
    """Of the byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    """To half of its bytes."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
