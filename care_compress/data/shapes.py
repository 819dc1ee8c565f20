"""``builtin:shapes``: 24,000 drawn images in 40 classes that need no download.

A class is what the largest patterned form shows: its outline, its texture and its tint, such as
``barred-red-triangle``. Each cue is graded (corners are rounded, stars fill up, light is
coloured), smaller forms of other classes stand around, a bar lies across; so that many answers
are close calls and a network that lost precision gives other ones. Every class is invariant
under a horizontal flip. Labels go round the classes, so the first n images of a split are balanced.

Drawn splits are kept in $XDG_CACHE_HOME/care-compress (else ~/.cache/care-compress) and mapped
into memory from there. A file is the plain .npy array followed by the SHA-256 of its pixels: one
file, so that one rename publishes both.
"""

import fcntl
import hashlib
import io
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from care_compress.data.checks import digest_of
from care_compress.data.listing import Split
from care_compress.data.shapes_render import CLASSES, SIZE, render
from care_compress.errors import DataError
from care_compress.files import cache_folder, replacing

Pixels = NDArray[np.uint8]
Draw = Callable[[range], Pixels]

# Part of every file name and image name: raise it with any change of the drawn bits.
VERSION = "v1"
COUNTS = {"train": 20_000, "val": 4_000}
CHUNK = 32  # images per call: a field of 32 images still fits the CPU's cache
THREADS = 2  # NumPy releases the lock inside its loops, so threads share the work as processes do
DIGEST_BYTES = hashlib.sha256().digest_size
LEFTOVER_SECONDS = 3600

log = logging.getLogger(__name__)


class Shapes:
    """One split as `Samples`; the pixels are drawn on first use and then mapped from the cache."""

    classes = CLASSES
    in_memory = True

    def __init__(self, split: Split, seed: int = 0) -> None:
        if not 0 <= seed < 2**64:
            raise DataError(f"the seed of builtin:shapes is {seed}.", "use 0 or more, below 2**64")
        self.split = split
        self.seed = seed
        self.labels: NDArray[np.int64] = np.arange(COUNTS[split], dtype=np.int64) % len(CLASSES)
        self._series = f"shapes-{VERSION}-seed{seed}"
        self._path = cache_folder() / f"{self._series}-{split}.npy"
        self._pixels: Pixels | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the pixels: a worker process maps the same file again."""
        return {**self.__dict__, "_pixels": None}

    @property
    def pixels(self) -> Pixels:
        """All images (N, SIZE, SIZE, 3), read-only."""
        if self._pixels is None:
            shape = (len(self), SIZE, SIZE, 3)
            self._pixels = cached(self._path, shape, partial(render, self.seed, self.split))
        return self._pixels

    def name(self, index: int) -> str:
        """Such as ``shapes-v1-seed0/val/00012``."""
        return f"{self._series}/{self.split}/{range(len(self))[index]:05d}"

    def image(self, index: int) -> Image.Image:
        """The image as RGB."""
        return Image.fromarray(np.array(self.pixels[index]))

    def hashed(self, index: int) -> tuple[Image.Image, int]:
        """`image`, and a digest of its pixels."""
        return self.image(index), digest_of(self.pixels[index].tobytes())

    def fingerprint(self) -> str:
        """Hex digest of the list of names, labels and classes."""
        digest = hashlib.sha256("\n".join(self.classes).encode())
        for index, label in enumerate(self.labels.tolist()):
            digest.update(f"\n{self.name(index)}\t{label}".encode())
        return digest.hexdigest()

    def content_digest(self) -> str:
        """The fingerprint: the version in the names stands for the bits."""
        return self.fingerprint()


def cached(path: Path, shape: tuple[int, ...], draw: Draw) -> Pixels:
    """The images (N, H, W, 3) at ``path``, read-only; drawn first where absent or damaged."""
    try:
        pixels = _open(path, shape)
        if pixels is None:
            _write(path, shape, draw)
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
                start = file.read(len(header))
                pixels = np.memmap(file, np.uint8, mode="r", offset=file.tell(), shape=shape)
                file.seek(-DIGEST_BYTES, os.SEEK_END)
                if (start, file.read()) == (header, hashlib.sha256(pixels.data).digest()):
                    return pixels
    except FileNotFoundError:
        return None
    log.warning("%s is damaged and will be rendered again", path)
    return None


def _header(shape: tuple[int, ...]) -> bytes:
    """What a .npy file of uint8 images starts with."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    return header.getvalue()


def _write(path: Path, shape: tuple[int, ...], draw: Draw) -> None:
    """Draw into a temporary file and rename it: another process sees all of it or nothing.

    Two processes may do so at once; they write the same bytes, so the later rename is harmless.
    Plain writes, not a writable map: on a full disk a map kills the process with SIGBUS.
    """
    print(f"drawing {shape[0]:,} images into {path} (once)", file=sys.stderr)
    _sweep(path)
    chunks = (range(i, min(i + CHUNK, shape[0])) for i in range(0, shape[0], CHUNK))
    digest = hashlib.sha256()
    with replacing(path) as temporary, temporary.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # tells `_sweep` that somebody is at work
        file.write(_header(shape))
        pool = ThreadPoolExecutor(THREADS)
        try:
            for pixels in pool.map(draw, chunks):
                digest.update(pixels.data)
                file.write(pixels.data)
        finally:
            pool.shutdown(cancel_futures=True)  # after an interrupt, do not draw the rest first
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
