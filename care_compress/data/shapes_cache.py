"""Keeps rendered splits of ``builtin:shapes`` on disk, as memory-mapped .npy files.

The cache is $XDG_CACHE_HOME/care-compress (else ~/.cache/care-compress). A file is the plain
.npy array followed by the SHA-256 of its pixels: one file, so that one rename publishes both.
"""

import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from care_compress.errors import DataError

Pixels = NDArray[np.uint8]
Render = Callable[[range], Pixels]

CHUNK = 32  # images per call: a field of 32 images still fits the CPU's cache
THREADS = 2  # NumPy releases the lock inside its loops, so threads share the work as processes do
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
    """Map the file, or None where it is missing, cut short, or not what was written."""
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        return None
    except (ValueError, EOFError):
        log.warning("%s is damaged and will be rendered again", path)
        return None
    if isinstance(pixels, np.memmap) and pixels.shape == shape and pixels.dtype == np.uint8:
        with path.open("rb") as file:
            file.seek(pixels.offset + pixels.nbytes)
            stored = file.read()
        if stored == hashlib.sha256(pixels.data).digest():
            return pixels
    log.warning("%s is damaged and will be rendered again", path)
    return None


def _write(path: Path, shape: tuple[int, ...], render: Render) -> None:
    """Render into a temporary file and rename it: another process sees all of it or nothing.

    Two processes may do so at once; they write the same bytes, so the later rename is harmless.
    Plain writes, not a writable map: on a full disk a map kills the process with SIGBUS.
    """
    log.info("rendering %d images into %s", shape[0], path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            digest = hashlib.sha256()
            for pixels in _chunks(shape[0], render):
                digest.update(pixels.data)
                file.write(pixels.data)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _sweep(path: Path) -> None:
    """Remove what killed processes left; a file younger than an hour may still be in the making."""
    for leftover in path.parent.glob(f"{path.name}.*.tmp"):
        with suppress(FileNotFoundError):  # another process sweeps too
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()


def _chunks(count: int, render: Render) -> Iterator[Pixels]:
    """All images in order, a chunk at a time, drawn by a few threads."""
    ranges = (range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK))
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield from pool.map(render, ranges)
    finally:
        pool.shutdown(cancel_futures=True)  # after an interrupt, do not draw the rest first
