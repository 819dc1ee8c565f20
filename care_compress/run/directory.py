"""The run directory: every file a run leaves behind goes through this one door.

Files appear whole or not at all (temporary name, flush, rename). `manifest.json` records what went
into a run and what each of its stages left; one process at a time holds a run.
"""

import contextlib
import fcntl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from care_compress.errors import BusyRunError, DamagedRunError, RunError, Stopped
from care_compress.files import json_text, not_writable, read_json, sha256_file, sweep, write_text
from care_compress.machine import git_revision
from care_compress.recipe.layers import commented
from care_compress.recipe.recipe import Recipe

TARGETS_FOLDER = "targets"  # in a run: the targets of its user's own
REPAIR = "--repair (make: REPAIR=1) makes it again"


@dataclass
class Notes:
    """What went in and what came out while a stage was at work."""

    inputs: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)  # file to sha256


class Run:
    """One run directory, held by one process at a time."""

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / name
        self.name = name
        self._manifest: dict[str, Any] = {}
        self._notes: list[Notes] = []  # of the stages under way

    @contextlib.contextmanager
    def open(
        self, recipe: Recipe, machine: Mapping[str, Any], repair: bool = False
    ) -> Iterator["Run"]:
        """Lock the directory, record the recipe and the machine, release on the way out.

        What earlier stages left stays known. `repair` begins anew where that cannot be read.
        """
        with self._locked():
            path = self.path / "manifest.json"
            stages: dict[str, Any] = {}
            try:
                stages = dict(read_json(path).get("stages", {}))
            except FileNotFoundError:
                pass  # a new run
            except (OSError, ValueError, TypeError, AttributeError) as error:
                if not repair:
                    raise DamagedRunError(f"{path} cannot be read: {error}.", REPAIR) from error
            sweep(self.path)
            resolved = recipe.model_dump(mode="json")
            self._manifest = {
                "run": self.name,
                "started": _now(),
                "recipe": resolved,
                "seed": recipe.seed,
                "git_revision": git_revision(),
                "machine": dict(machine),
                "inputs": {},
                "outputs": {},
                "stages": stages,
            }
            try:
                # Until this run is through there are no results: old ones would pass for its own.
                (self.path / "results.json").unlink(missing_ok=True)
            except OSError as error:
                raise not_writable(self.path, error) from error
            write_text(self.path / "recipe.yaml", commented(resolved, recipe.name, recipe.origins))
            self._write_manifest()
            try:
                yield self
            except Stopped as stopped:
                stopped.hint = "the same command goes on"
                raise
            self._manifest["finished"] = _now()
            self._write_manifest()

    @contextlib.contextmanager
    def reopen(self) -> Iterator["Run"]:
        """Lock a finished run to replace some of its files."""
        with self._locked():
            path = self.path / "manifest.json"
            try:
                self._manifest = read_json(path)
            except (OSError, ValueError) as error:
                raise RunError(f"{path} cannot be read: {error}.", "make the run again") from error
            yield self

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise RunError(
                f"cannot use {self.path}: {error.strerror}.", "choose another --runs directory"
            ) from error
        with lock:
            try:
                # lockf, not flock: decoding workers would inherit a flock and hold it for seconds
                # after their parent was killed, when the same command should go on.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise BusyRunError(
                    f"another process is working in {self.path}.",
                    "wait for it, or give this run another --name",
                ) from None
            yield

    def record_input(self, name: str, value: object) -> None:
        """Note what went in (a digest, a data set's description)."""
        for notes in (self._manifest, *map(vars, self._notes)):
            notes["inputs"][name] = value
        self._write_manifest()

    def record_output(self, path: Path) -> None:
        """Note a file that came out, with its digest."""
        name, digest = str(path.relative_to(self.path)), sha256_file(path)
        for notes in (self._manifest, *map(vars, self._notes)):
            notes["outputs"][name] = digest
        self._write_manifest()

    @contextlib.contextmanager
    def noting(self) -> Iterator[Notes]:
        """Collect what goes in and comes out while the block runs."""
        notes = Notes()
        self._notes.append(notes)
        try:
            yield notes
        finally:
            self._notes.pop()

    def stage(self, name: str) -> dict[str, Any] | None:
        """Return what an earlier process recorded of a stage that came to its end."""
        found: dict[str, Any] | None = self._manifest.setdefault("stages", {}).get(name)
        return found

    def forget_stage(self, name: str) -> None:
        """Drop the record of a stage that writes its files anew: it would be wrong of them."""
        if self.stage(name) is not None:
            del self._manifest["stages"][name]
            self._write_manifest()

    def record_stage(self, name: str, record: Mapping[str, Any]) -> None:
        """Note a stage that came to its end, now or earlier; its files are this run's."""
        self._manifest["inputs"].update(record["inputs"])
        self._manifest["outputs"].update(record["outputs"])
        self._manifest.setdefault("stages", {})[name] = dict(record)
        self._write_manifest()

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write one JSON result and record it."""
        path = self.path / name
        write_text(path, json_text(value))
        self.record_output(path)
        return path

    def _write_manifest(self) -> None:
        write_text(self.path / "manifest.json", json_text(self._manifest))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
