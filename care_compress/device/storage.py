"""Files that appear whole or not at all, and their digests."""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from care_compress.device.problems import DeployError


def digest_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces: a model may be larger than a board's free memory."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_whole(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to the disk, then rename: never half a file.

    A board that loses power while it writes keeps the file it had.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
    except OSError as error:
        raise DeployError(
            f"cannot write {path}: {error.strerror}.", "make room there, or unpack elsewhere"
        ) from error


def write_json_whole(path: Path, value: Any) -> None:
    """Write JSON in one piece; NaN is refused, because no other JSON reader takes it."""
    write_whole(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if there is none to be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
