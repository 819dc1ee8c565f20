"""Which planted bugs the tests notice: ``make mutants``.

``mutants.yaml`` lists plausible bugs as data. Each is planted alone in a copy of the repository,
and the tests meant to catch it run there (``forked_tests.py``); a bug that they do not notice
survived, and is named. One bug takes as long as its tests: some seconds. Stopped, it goes on where
it was, as long as no file has changed; what is finished is kept in ``runs/mutants.json``.
"""

import compileall
import json
import os
import py_compile
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Annotated, Any

import pytest
import typer
import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from care_compress.files import fingerprint, sha256_file, write_text

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".yaml")
RUNNER = Path(__file__).with_name("forked_tests.py")
STORE = ROOT / "runs" / "mutants.json"
TIMEOUT = 900  # seconds; a test that a bug hangs has noticed it


class Mutant(BaseModel):
    """One plausible bug: `old` stands in `file` once, and `new` takes its place."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    file: str
    old: str
    new: str
    tests: str  # arguments of pytest

    def plant(self, root: Path) -> None:
        """Put the bug into a copy of the repository."""
        path = root / "care_compress" / self.file
        text = path.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise SystemExit(
                f"{self.name}: its text stands {text.count(self.old)} times in {self.file}, not "
                f"once. Fix: write it in {LIST.name} as the code is now"
            )
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")


@dataclass(frozen=True)
class Outcome:
    """What became of one bug."""

    mutant: Mutant
    killed: bool
    seconds: float


class Copy:
    """A copy of what git tracks, and the process that runs tests there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in tracked():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
        # Read instead of compiled by every run; a bug's file is seen to be another by its text, not
        # by a time in whole seconds.
        by_text = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(root / "care_compress", quiet=1, invalidation_mode=by_text)
        # The copy comes before the package that is installed, in child processes, too.
        env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
        self._runner = subprocess.Popen(
            [sys.executable, str(RUNNER)],
            cwd=root,
            env=env | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def complaint(self, tests: str) -> str | None:
        """None if these tests pass; what pytest said last if not."""
        assert self._runner.stdin is not None and self._runner.stdout is not None
        arguments = ["-x", "-q", "-p", "no:cacheprovider", *shlex.split(tests)]
        print(json.dumps([arguments, TIMEOUT]), file=self._runner.stdin, flush=True)
        answer = self._runner.stdout.readline()
        if not answer:
            raise SystemExit(f"{RUNNER.name} died over {tests}")
        status, said = json.loads(answer)
        if status is None:
            return "took too long"
        if status == pytest.ExitCode.NO_TESTS_COLLECTED:
            raise SystemExit(f"no test is chosen by {tests}")
        failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return None if status == 0 else (failed or [said[-200:]])[0]

    def close(self) -> None:
        """End the process, which reads its orders from here."""
        self._runner.communicate()


class Finished:
    """What an earlier run of the same files has found, and what this one adds."""

    def __init__(self, files: str) -> None:
        found = json.loads(STORE.read_text(encoding="utf-8")) if STORE.is_file() else {}
        self.content = found if found.get("files") == files else {"files": files}
        self.lock = Lock()

    def of(self, key: str, make: Callable[[], Any]) -> Any:
        """What was found under this key, or what `make` finds now."""
        if key not in self.content:
            made = make()
            with self.lock:
                self.content[key] = made
                write_text(STORE, json.dumps(self.content, indent=1) + "\n")
        return self.content[key]


def main(
    only: Annotated[
        list[str] | None, typer.Argument(help="names of mutants; all by default")
    ] = None,
    workers: Annotated[int, typer.Option(help="processes beside each other")] = 2,
) -> None:
    """Plant every bug in turn and name those that no test noticed."""
    console = Console()
    mutants = read_mutants()
    if only:
        unknown = set(only) - {mutant.name for mutant in mutants}
        if unknown:
            raise SystemExit(f"no mutant is called {', '.join(sorted(unknown))}; see {LIST.name}")
        mutants = [mutant for mutant in mutants if mutant.name in only]
    with copies(workers) as free:
        selections = together({mutant.tests for mutant in mutants})
        finished = Finished(digest_of_files())

        def sound(tests: str) -> str | None:
            copy = free.get()
            try:
                said: str | None = finished.of(
                    f"without any bug: {tests}", lambda: copy.complaint(tests)
                )
                return said
            finally:
                free.put(copy)

        with ThreadPoolExecutor(workers) as pool:
            for tests, said in zip(selections, pool.map(sound, selections), strict=True):
                if said is not None:
                    raise SystemExit(f"{tests} fails without any bug: {said}")

        def plant(mutant: Mutant) -> list[Any]:
            copy = free.get()
            began = time.monotonic()
            kept = (copy.root / "care_compress" / mutant.file).read_bytes()
            try:
                mutant.plant(copy.root)
                killed = copy.complaint(mutant.tests) is not None
            finally:
                (copy.root / "care_compress" / mutant.file).write_bytes(kept)
                free.put(copy)
            return [killed, time.monotonic() - began]

        def tried(mutant: Mutant) -> Outcome:
            killed, seconds = finished.of(mutant.model_dump_json(), lambda: plant(mutant))
            return Outcome(mutant, killed, seconds)

        with ThreadPoolExecutor(workers) as pool:
            outcomes = list(
                track(pool.map(tried, mutants), "planting", len(mutants), console=console)
            )
    show(outcomes, console)
    raise SystemExit(any(not outcome.killed for outcome in outcomes))


def read_mutants() -> list[Mutant]:
    """The list, each name once."""
    mutants = TypeAdapter(list[Mutant]).validate_python(yaml.safe_load(LIST.read_text()))
    names = [mutant.name for mutant in mutants]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SystemExit(f"{LIST.name} has two mutants called {', '.join(sorted(twice))}")
    return mutants


def together(selections: Iterable[str]) -> list[str]:
    """Choose the same tests (``FILE``, ``FILE::TEST``, ``FILE -k WORDS``), each file in one run."""
    chosen: dict[str, set[str]] = {}
    for tests in selections:
        path, *words = shlex.split(tests)
        file, _, test = path.partition("::")
        chosen.setdefault(file, set()).add(words[-1] if words else test.partition("[")[0])
    return [
        file if "" in names else shlex.join([file, "-k", " or ".join(sorted(names))])
        for file, names in sorted(chosen.items())
    ]


def tracked() -> list[str]:
    """Files that git tracks, or would."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.split("\0") if (ROOT / name).is_file()]


def digest_of_files() -> str:
    """Digest of all code and tests: what was noticed before a change may not be after it."""
    code = [name for name in sorted(tracked()) if name.endswith(".py")]
    return fingerprint({name: sha256_file(ROOT / name) for name in code})


@contextmanager
def copies(count: int) -> Iterator[SimpleQueue[Copy]]:
    """As many copies as bugs are planted at once, in a queue of those that are free."""
    free: SimpleQueue[Copy] = SimpleQueue()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        for number in range(count):
            copy = Copy(Path(folder) / str(number))
            opened.callback(copy.close)
            free.put(copy)
        yield free


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """By file, and every survivor by name."""
    table = Table(title="Planted bugs", title_justify="left")
    for column in ("file", "planted", "killed", "seconds"):
        table.add_column(column, justify="left" if column == "file" else "right")
    for file in sorted({outcome.mutant.file for outcome in outcomes}):
        own = [outcome for outcome in outcomes if outcome.mutant.file == file]
        killed = sum(outcome.killed for outcome in own)
        seconds = sum(outcome.seconds for outcome in own)
        table.add_row(file, str(len(own)), str(killed), f"{seconds:.0f}")
    console.print(table)
    survivors = [outcome for outcome in outcomes if not outcome.killed]
    for outcome in survivors:
        console.print(f"survived: {outcome.mutant.name} ({outcome.mutant.tests})", soft_wrap=True)
    console.print(f"{len(outcomes) - len(survivors)} of {len(outcomes)} planted bugs were noticed")


if __name__ == "__main__":
    typer.run(main)
