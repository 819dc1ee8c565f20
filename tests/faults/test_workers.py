"""However a verb ends, none of the processes it started is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from quantized import care
from tiny import image_folder, recipe_file

from care_compress.model.checkpoint import save_checkpoint

# torch's workers look for their parent every five seconds when it was killed without a chance to
# end them.
PATIENCE = 10.0
LONGEST = 120.0  # seconds until a verb that should end has ended
ENDLESS = {"epochs": 100_000, "warmup_epochs": 0, "validate_epochs": 100_000}


class Watched:
    """A verb in a process of its own, and everything that it ever started."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "care_compress", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Started from a shell's background, it would ignore Ctrl-C like everything there.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.seen: set[psutil.Process] = set()

    def look(self) -> set[psutil.Process]:
        """Its descendants now."""
        try:
            now = set(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            now = set()
        self.seen |= now
        return now

    def until(self, enough: Callable[[set[psutil.Process]], bool]) -> set[psutil.Process]:
        """Look until there are enough of them."""
        while self.process.poll() is None:
            if enough(now := self.look()):
                return now
            time.sleep(0.01)
        pytest.fail(f"it ended before it could be disturbed: {self.process.communicate()[0]}")

    def end(self) -> tuple[int, str]:
        """Wait for its own end; its exit code and what it said."""
        until = time.monotonic() + LONGEST
        while self.process.poll() is None:
            if time.monotonic() > until:
                self.process.kill()
                self.survivors()
                pytest.fail("it did not end")
            self.look()
            time.sleep(0.02)
        return self.process.returncode, self.process.communicate()[0]

    def survivors(self) -> list[str]:
        """What still runs after a while."""
        until = time.monotonic() + PATIENCE
        while (left := [one for one in self.seen if alive(one)]) and time.monotonic() < until:
            time.sleep(0.1)
        names = [f"{one.pid}: {' '.join(one.cmdline())}" for one in left]
        for one in left:  # the test's own duty, too
            one.kill()
        return names


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def training(folder: Path, **train: object) -> list[str]:
    recipe = recipe_file(folder, image_folder(folder / "images"), workers=2, **train)
    return ["quantize", str(recipe), "--runs", str(folder / "runs"), "--name", "run"]


def evaluation(folder: Path) -> list[str]:
    """Of a set so large that it does not end by itself before it is disturbed."""
    images = image_folder(folder / "images", per_class=400)
    save_checkpoint(care(4), folder / "four.safetensors", {})
    return [
        "accuracy", str(folder / "four.safetensors"), "--data", str(images), "--res", "256",
        "--batch", "8", "--set", "workers=2",
    ]  # fmt: skip


def two(now: set[psutil.Process]) -> bool:
    return len(now) >= 2


@pytest.mark.parametrize("verb", [training, evaluation])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_the_main_process_leaves_nothing(
    verb: Callable[[Path], list[str]], signum: signal.Signals, tmp_path: Path
) -> None:
    arguments = training(tmp_path, **ENDLESS) if verb is training else evaluation(tmp_path)
    watched = Watched(*arguments)
    watched.until(two)
    time.sleep(0.5)  # somewhere in its work
    os.kill(watched.process.pid, signum)
    code, _ = watched.end()
    assert code != 0
    assert watched.survivors() == []


def test_a_worker_that_dies_takes_the_others_along(tmp_path: Path) -> None:
    watched = Watched(*training(tmp_path, **ENDLESS))
    victim = min(watched.until(two), key=lambda process: process.pid)
    time.sleep(0.5)
    victim.kill()
    code, said = watched.end()
    assert code == 2 and "decoding process died" in said, said
    assert watched.survivors() == []


def test_an_error_in_a_worker_leaves_nothing(tmp_path: Path) -> None:
    arguments = training(tmp_path, **ENDLESS)
    (tmp_path / "images" / "train" / "red" / "3.png").write_bytes(b"broken")
    watched = Watched(*arguments)
    code, said = watched.end()
    assert code == 2 and "3.png" in said, said
    assert watched.seen and watched.survivors() == []


def test_an_error_in_the_main_process_leaves_nothing(tmp_path: Path) -> None:
    broken = {"learning_rate": 1e30, "clip_grad_norm": None, "ema_decay": None}
    watched = Watched(*training(tmp_path, **ENDLESS, **broken))
    code, said = watched.end()
    assert code == 2 and "TrainingError" in said, said
    assert watched.seen and watched.survivors() == []


def test_a_run_that_ends_well_leaves_nothing(tmp_path: Path) -> None:
    watched = Watched(*training(tmp_path, epochs=2))
    code, said = watched.end()
    assert code == 0, said
    assert watched.seen and watched.survivors() == []
