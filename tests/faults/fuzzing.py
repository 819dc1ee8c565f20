"""What every fuzz test needs: a time limit that fires, a memory limit, and eyes on what is touched.

A case is one input given to the product through the door a user would use. It works or it ends in
a named error; `Cases.attempt` counts it and lets every other exception through to the test.
"""

import contextlib
import faulthandler
import os
import random
import resource
import signal
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch

from care_compress.console import one_line
from care_compress.device.problems import DeployError
from care_compress.errors import CareError

torch.set_num_threads(1)
# Caches of libraries, which are theirs and not the product's, stand where nothing is looked at.
os.environ["MPLCONFIGDIR"] = tempfile.gettempdir()

SECONDS = 20.0  # for one case; most take milliseconds
MEMORY = 6 << 30  # addresses above what the process holds when a module begins
LONGEST_LINE = 3000  # letters of what the command line says
# How many cases each file holds at least; together more than two thousand.
LEAST = {"recipes": 900, "checkpoints": 400, "images": 500, "archives": 420, "graphs": 220}
LEAST |= {"annotations": 1500}
Named = (CareError, DeployError)
Found = TypeVar("Found")


class TooLongError(BaseException):
    """A case that did not end; not an Exception, so that nothing on the way swallows it."""


class Cases:
    """Counts the cases of one file, and what became of them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.worked = 0
        self.refused = 0

    @property
    def count(self) -> int:
        return self.worked + self.refused

    def attempt(self, call: Callable[[], Found]) -> Found | str:
        """What the call gives, or the message of the named error it ends in."""
        try:
            with time_limit():
                found = call()
        except Named as error:
            self.refused += 1
            line = one_line(str(error))
            assert line and obeyed(line) == "", line[:500]
            return str(error)
        self.worked += 1
        return found

    def assert_enough(self) -> None:
        """After the last test of the file; a single test run alone has fewer."""
        print(f"{self.kind}: {self.count} cases, {self.worked} worked, {self.refused} refused")
        assert self.count >= LEAST[self.kind]
        assert self.worked and self.refused, "a fuzzer that finds only one of them is blind"


def obeyed(text: str) -> str:
    """The letters that a terminal would obey; none, in what the product prints on one line."""
    turning = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    kinds = {"Cc", "Cs", "Zl", "Zp"}
    return "".join(c for c in text if unicodedata.category(c) in kinds or c in turning)


@contextlib.contextmanager
def time_limit(seconds: float = SECONDS) -> Iterator[None]:
    """Raise in the middle of whatever runs; should it be stuck in C, show where and end."""

    def stop(_signal: int, _frame: object) -> None:
        raise TooLongError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    faulthandler.dump_traceback_later(3 * seconds, exit=True, file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def memory_limit(more: int = MEMORY) -> Iterator[None]:
    """What asks for more than this ends in a MemoryError, which no case may."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


# What code does to the machine, as Python's own audit events tell it.
_TOUCHING = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "os.link", "os.chmod"}
_TOUCHING |= {"os.truncate", "os.chown", "shutil.rmtree", "tempfile.mkstemp", "tempfile.mkdtemp"}
_STARTING = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.startfile"}
_STARTING |= {"pty.spawn", "ctypes.dlopen", "socket.connect", "marshal.loads"}
_heard: list[tuple[str, str]] | None = None


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _heard is None:
        return
    if event == "open":
        path, _, flags = arguments
        written = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if written and isinstance(path, str | bytes):
            _heard.append((event, os.fsdecode(path)))
    elif event in _TOUCHING:
        _heard.extend(
            (event, _absolute(a, arguments)) for a in arguments if isinstance(a, str | bytes)
        )
    elif event in _STARTING:
        _heard.append((event, str(arguments[:2])))


def _absolute(path: str | bytes, arguments: tuple[Any, ...]) -> str:
    """Where a name lies that is given beside the descriptor of its folder, as rmtree gives them."""
    folder = arguments[-1]
    beside = isinstance(folder, int) and os.path.exists(f"/proc/self/fd/{folder}/.")
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}") if beside else "", os.fsdecode(path))


sys.addaudithook(_listen)


@contextlib.contextmanager
def sealed(*allowed: Path, starts: bool = False) -> Iterator[None]:
    """Nothing is written outside these folders, no program is started, nothing is connected to."""
    global _heard
    _heard = heard = []
    try:
        yield
    finally:
        _heard = None
    roots = tuple(os.path.realpath(folder) + os.sep for folder in allowed)
    for event, what in heard:
        if event in _STARTING:
            assert starts or event in {"ctypes.dlopen", "marshal.loads"}, (event, what)
        else:
            inside = (os.path.realpath(what) + os.sep).startswith(roots)
            assert inside or what == os.devnull, f"{event} outside: {what}"


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder: name to size and time of change."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
    }


def damaged(content: bytes, rng: random.Random) -> bytes:
    """A copy with one kind of damage, as disks, networks and people do it."""
    kind = rng.randrange(6)
    place = rng.randrange(len(content) + 1)
    if kind == 0:
        return content[:place]
    if kind == 1:  # a few bits
        broken = bytearray(content)
        for _ in range(rng.choice((1, 1, 2, 8, 64))):
            if broken:
                broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
        return bytes(broken)
    if kind == 2:  # the beginning, where the headers are
        broken = bytearray(content)
        for _ in range(rng.choice((1, 2, 4))):
            broken[rng.randrange(min(len(broken), 128))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        return bytes(broken)
    if kind == 3:  # a part is lost
        return content[:place] + content[place + rng.randrange(1, 200) :]
    if kind == 4:  # a part is there twice, or is something else
        return content[:place] + rng.randbytes(rng.randrange(1, 64)) + content[place:]
    end = min(len(content), place + rng.randrange(1, 4096))
    return content[:place] + bytes(end - place) + content[end:]
