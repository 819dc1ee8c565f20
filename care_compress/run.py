"""The run directory: every file a run leaves behind goes through this one door.

Files appear whole or not at all (temporary name, flush, rename). `manifest.json` records what went
into a run; one process at a time holds a run.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from care_compress.errors import RunError
from care_compress.figures import json_text
from care_compress.files import read_json
from care_compress.recipe import Recipe


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place only if the block succeeds."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    except OSError as error:
        raise _not_writable(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        # mkstemp makes files private; a result is as readable as the umask allows.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise _not_writable(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _not_writable(path: Path, error: OSError) -> RunError:
    return RunError(
        f"cannot write {path}: {error.strerror}.",
        "make room there, or choose another place (--runs, --json)",
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256_file(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(value: object) -> str:
    """Hex digest of plain data; equal data, equal digest, on any machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Hex digest of named tensors: names, shapes, types and values."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype};".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Run:
    """One run directory, held by one process at a time."""

    def __init__(self, root: Path, name: str) -> None:
        self.path = root / name
        self.name = name
        self._manifest: dict[str, Any] = {}

    @contextlib.contextmanager
    def open(self, recipe: Recipe, machine: Mapping[str, Any]) -> Iterator["Run"]:
        """Lock the directory, record the recipe and the machine, release on the way out."""
        with self._locked():
            for leftover in self.path.rglob(".*.tmp"):
                leftover.unlink()  # of a process that was killed while it wrote
            resolved = recipe.model_dump(mode="json")
            write_text(self.path / "recipe.yaml", yaml.safe_dump(resolved, sort_keys=False))
            self._manifest = {
                "run": self.name,
                "started": _now(),
                "recipe": resolved,
                "seed": recipe.seed,
                "git_revision": git_revision(),
                "machine": dict(machine),
                "inputs": {},
                "outputs": {},
            }
            # Until this run is through there are no results: old ones would pass for its own.
            (self.path / "results.json").unlink(missing_ok=True)
            self._write_manifest()
            yield self
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
                raise RunError(
                    f"another process is working in {self.path}.",
                    "wait for it, or give this run another --name",
                ) from None
            yield

    def record_input(self, name: str, value: object) -> None:
        """Note what went in (a digest, a data set's description)."""
        self._manifest["inputs"][name] = value
        self._write_manifest()

    def record_output(self, path: Path) -> None:
        """Note a file that came out, with its digest."""
        self._manifest["outputs"][str(path.relative_to(self.path))] = sha256_file(path)
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


def git_revision() -> str | None:
    """The checkout's commit, with ``+changes`` if the tree differs from it; None outside git."""
    here = Path(__file__).resolve().parent
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        status = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if status.strip() else "")
