"""Keeps rendered splits of ``builtin:shapes`` on disk, as memory-mapped .npy files.

The cache is $XDG_CACHE_HOME/care-compress (else ~/.cache/care-compress). A file is the plain
.npy array followed by the SHA-256 of its pixels: one file, so that one rename publishes both.
"""

import fcntl
import hashlib
import io
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from care_compress.errors import DataError
from care_compress.files import replacing

Pixels = NDArray[np.uint8]
Render = Callable[[range], Pixels]

CHUNK = 32  # images per call: a field of 32 images still fits the CPU's cache
THREADS = 2  # NumPy releases the lock inside its loops, so threads share the work as processes do
DIGEST_BYTES = hashlib.sha256().digest_size
LEFTOVER_SECONDS = 3600

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where rendered images are kept; as XDG asks, a relative $XDG_CACHE_HOME is ignored."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "care-compress"
    return Path(os.path.expanduser("~")) / ".cache" / "care-compress"


def cached(path: Path, shape: tuple[int, ...], render: Render) -> Pixels:
    """The images (N, H, W, 3) at ``path``, read-only; rendered first where absent or damaged."""
    try:
        pixels = _open(path, shape)
        if pixels is None:
            _write(path, shape, render)
            pixels = _open(path, shape)
    except OSError as error:
        raise DataError(
            f"cannot keep the built-in images at {path}: {error.strerror or error}.",
            "set XDG_CACHE_HOME to a writable folder with 400 MB free",
        ) from error
    assert pixels is not None, f"{path} is damaged right after it was written"
    return pixels


def _open(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """Map the file, or None where it is missing, cut short, or not what was written.

    The header is compared, not parsed: NumPy's parser fails in many ways on damaged text.
    """
    header = _header(shape)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == len(header) + math.prod(shape) + DIGEST_BYTES:
                start, pixels = file.read(len(header)), _map(file, shape)
                file.seek(-DIGEST_BYTES, os.SEEK_END)
                if (start, file.read()) == (header, hashlib.sha256(pixels.data).digest()):
                    return pixels
    except FileNotFoundError:
        return None
    log.warning("%s is damaged and will be rendered again", path)
    return None


def _map(file: BinaryIO, shape: tuple[int, ...]) -> Pixels:
    return np.memmap(file, np.uint8, mode="r", offset=file.tell(), shape=shape)


def _header(shape: tuple[int, ...]) -> bytes:
    """What a .npy file of uint8 images starts with."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


def _write(path: Path, shape: tuple[int, ...], render: Render) -> None:
    """Render into a temporary file and rename it: another process sees all of it or nothing.

    Two processes may do so at once; they write the same bytes, so the later rename is harmless.
    Plain writes, not a writable map: on a full disk a map kills the process with SIGBUS.
    """
    print(f"drawing {shape[0]:,} images into {path} (once)", file=sys.stderr)
    _sweep(path)
    with replacing(path) as temporary, temporary.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # tells `_sweep` that somebody is at work
        file.write(_header(shape))
        digest = hashlib.sha256()
        with closing(_chunks(shape[0], render)) as chunks:
            for pixels in chunks:
                digest.update(pixels.data)
                file.write(pixels.data)
        file.write(digest.digest())


def _sweep(path: Path) -> None:
    """Remove what killed processes left: files of more than an hour that nobody holds.

    Either way, because a clock may jump: a file can be older, or of a later hour, than it says.
    """
    for leftover in path.parent.glob(f"*{path.name}.*.tmp"):
        # Another process sweeps too, or is at work on it.
        with suppress(FileNotFoundError, BlockingIOError), leftover.open("rb") as file:
            if abs(time.time() - leftover.stat().st_mtime) > LEFTOVER_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()


def _chunks(count: int, render: Render) -> Generator[Pixels]:
    """All images in order, a chunk at a time, drawn by a few threads."""
    ranges = (range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK))
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield from pool.map(render, ranges)
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt, do not draw the rest first
