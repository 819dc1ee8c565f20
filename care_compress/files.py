"""Reading what somebody else wrote, and writing what nobody should find half written.

Read are only files, and only so much of them: a pipe under a file's name would be waited on for
ever, ``/dev/zero`` has no end, and a sparse file of terabytes costs its author nothing. Written
files appear whole or not at all (temporary name, flush, rename).
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from care_compress.errors import RunError

MOST_JSON = 1 << 28  # bytes; the evidence of the largest run is some thousandth of it


def read_whole(path: str | bytes | Path, most: int) -> bytes:
    """All bytes of a regular file; `OSError` where it is none or holds more than `most`."""
    # Without O_NONBLOCK a pipe is waited on before it can be asked what it is.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(handle, "rb") as file:
        state = os.fstat(handle)
        if not stat.S_ISREG(state.st_mode):
            raise OSError("it is no regular file")
        if state.st_size > most:
            raise OSError(f"it has {state.st_size:,} bytes, more than {most:,}")
        return file.read()


def read_text(path: Path, most: int) -> str:
    """All of a UTF-8 file; `OSError` or `ValueError` where it cannot be read."""
    return read_whole(path, most).decode("utf-8")


def read_json(path: Path) -> Any:
    """The value in a JSON file; `OSError` or `ValueError` where there is none to be read."""
    try:
        return json.loads(read_text(path, MOST_JSON))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_text(value: object, indent: int = 2) -> str:
    """The text of a JSON file; `RunError` names the first figure that is none.

    Python writes NaN where JSON has none, and other programs refuse the whole file or, worse, read
    0. So a result is a number, or nothing with a reason.
    """
    try:
        return json.dumps(value, indent=indent, allow_nan=False) + "\n"
    except ValueError as error:
        place = next(not_finite(value), None)
        if place is None:
            raise
        raise RunError(
            f"{place} came out as no number, and a result that holds one is worth nothing.",
            "check the images and the checkpoint; if they are sound, please report it",
        ) from error


def not_finite(value: Any, at: str = "") -> Iterator[str]:
    """Yield where a NaN or an infinity stands in nested plain data: ``candidates.ptq.drop``."""
    if isinstance(value, float) and not math.isfinite(value):
        yield at
    inner: dict[Any, Any] = value if isinstance(value, dict) else {}
    if isinstance(value, list | tuple):
        inner = dict(enumerate(value))
    for key, one in inner.items():
        yield from not_finite(one, f"{at}.{key}".lstrip("."))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it into place only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        os.close(handle)
        yield temporary
        _flush(temporary)
        # mkstemp makes files private; a result is as readable as the umask allows.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
        _flush(path.parent)  # the new name, too, has to outlive a power cut
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Replace a file of a run as `replacing` does, and say in a user's words what fails."""
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise not_writable(path, error) from error


@contextlib.contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A folder beside `path` for what is on its way there; the next run sweeps a killed one's."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
        ) as folder:
            yield Path(folder)
    except OSError as error:
        raise not_writable(path, error) from error


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep(folder: Path) -> None:
    """Remove what a process left that was killed while it wrote."""
    for leftover in list(folder.rglob(".*.tmp")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def not_writable(path: Path, error: OSError) -> RunError:
    """The error of a disk, in a user's words."""
    return RunError(
        f"cannot write {path}: {error.strerror}.",
        "make room there, or choose another place (--runs, --json)",
    )


def cache_folder() -> Path:
    """Where what can be made again is kept; as XDG asks, a relative $XDG_CACHE_HOME is ignored."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "care-compress"
    return Path(os.path.expanduser("~")) / ".cache" / "care-compress"


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


def size_of(path: Path) -> int:
    """Bytes of a model; OpenVINO's is two files."""
    return sum(part.stat().st_size for part in model_files(path))


def digest_of(path: Path) -> str:
    """Digest of a model; of OpenVINO's two files together."""
    digests = [sha256_file(part) for part in model_files(path)]
    return digests[0] if len(digests) == 1 else fingerprint(digests)


def model_files(path: Path) -> tuple[Path, ...]:
    """The files of a model; OpenVINO's weights lie beside its graph."""
    return (path, path.with_suffix(".bin")) if path.suffix == ".xml" else (path,)
