"""A labelled image set as a list: packed names, labels, classes, how it is divided, how read.

A million names are one bytes blob and one array here, not a million Python objects.
"""

import hashlib
import io
import json
import os
import struct
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from care_compress.data.checks import digest_of
from care_compress.errors import BadImageError, DataError
from care_compress.files import read_text
from care_compress.recipe.sections import DataSection

Split = Literal["train", "val"]

# What the parts of a data set are called; the first one present is taken.
SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "val": ("val", "validation", "test"),
}
PART_NAMES = frozenset(name for names in SPLIT_NAMES.values() for name in names)
MOST_LIST_BYTES = 1 << 24  # of a list of class names
# No image that Pillow would decode takes more; what claims to would fill the memory.
MOST_BYTES = 1 << 29
# Nothing else is tried: Pillow would hand PostScript under a .jpg name to an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF's tag, and its values that lie on a side
BAD_IMAGE_FIX = "replace or remove it, or set data.skip_bad_images=true"


class PackedNames(Sequence[bytes]):
    """Many names end to end in one blob."""

    def __init__(self, names: Sequence[bytes]) -> None:
        self.blob = b"".join(names)
        ends = accumulate(map(len, names), initial=0)
        self.bounds = np.fromiter(ends, np.int64, len(names) + 1)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]  # no slices needed
        at = range(len(self))[index]
        return self.blob[self.bounds[at] : self.bounds[at + 1]]


@dataclass(frozen=True)
class Listing:
    """The names and labels of one split; `classes[label]` is what a label means."""

    names: PackedNames
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def take(self, rows: NDArray[np.int64]) -> "Listing":
        """Only these rows, in this order."""
        names = PackedNames([self.names[row] for row in rows])
        return Listing(names, self.labels[rows], self.classes)

    def fingerprint(self) -> str:
        """Hex digest of names, labels and classes."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update(self.labels.astype("<i8").tobytes())
        digest.update(self.names.bounds.astype("<i8").tobytes())
        digest.update(self.names.blob)
        return digest.hexdigest()


class EncodedSamples(ABC):
    """`Samples` over a `Listing` whose images are stored encoded; a source adds the bytes."""

    in_memory = False

    def __init__(self, source: str, listing: Listing) -> None:
        if not len(listing.names):
            raise DataError(f"{source} holds no images for this split.", "check data.source")
        self.source = source
        self.listing = listing
        self.classes = listing.classes
        self.labels = listing.labels

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The stored bytes of one image; `OSError` if they cannot be read."""

    def __len__(self) -> int:
        return len(self.listing.names)

    def name(self, index: int) -> str:
        """The name inside the source, such as ``val/cat/12.jpg``."""
        return self.listing.names[index].decode("utf-8", "backslashreplace")

    def image(self, index: int) -> Image.Image:
        """The image as stored, in any mode; `BadImageError` if it cannot be decoded."""
        return decode(*self._stored(index))

    def hashed(self, index: int) -> tuple[Image.Image, int]:
        """`image`, and a digest of the bytes it is stored as: equal bytes, equal digest."""
        stored, name = self._stored(index)
        return decode(stored, name), digest_of(stored)

    def size(self, index: int, upright: bool) -> tuple[int, int]:
        """Width and height from the head of the image; `upright`: as EXIF turns it."""
        return size_of(*self._stored(index), upright)

    def _stored(self, index: int) -> tuple[bytes, str]:
        """The stored bytes, and the full name for errors."""
        name = f"{self.source}: {self.name(index)}"
        try:
            return self.encoded(index), name
        except OSError as error:
            raise BadImageError(
                f"{name} cannot be read ({error.strerror or error}).", BAD_IMAGE_FIX
            ) from error

    def content(self) -> NDArray[np.uint64]:
        """One number per image that changes with its bytes, as far as one is to be had cheaply."""
        return np.zeros(0, np.uint64)

    def fingerprint(self) -> str:
        """Hex digest of the list of names, labels and classes."""
        return self.listing.fingerprint()

    def content_digest(self) -> str:
        """Hex digest of the list and of the images' `content`."""
        content = self.content().astype("<u8").tobytes()
        return hashlib.sha256(self.fingerprint().encode() + content).hexdigest()


def decode(encoded: bytes, name: str) -> Image.Image:
    """The first frame, fully decoded, in the mode it is stored in, or a `BadImageError`."""
    with _named_errors(encoded, name):
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        with _libtiff_silent() if image.format == "TIFF" else nullcontext():
            image.load()
    return image


def size_of(encoded: bytes, name: str, upright: bool) -> tuple[int, int]:
    """Width and height without decoding, `upright` as EXIF turns it, or a `BadImageError`."""
    with _named_errors(encoded, name):
        image = Image.open(io.BytesIO(encoded), formats=FORMATS)
    width, height = image.size
    # What is unreadable says nothing, as in `transforms.upright`.
    with suppress(SyntaxError, ValueError, TypeError, KeyError, OSError, struct.error):
        if upright and image.getexif().get(ORIENTATION) in TURNED:
            return height, width
    return width, height


@contextmanager
def _named_errors(encoded: bytes, name: str) -> Iterator[None]:
    """Raise `BadImageError` with the image's name for whatever Pillow raises."""
    if not encoded:
        raise BadImageError(f"{name} is empty (0 bytes).", BAD_IMAGE_FIX)
    try:
        # Pillow's warnings (odd EXIF, large image) name no file, so they help nobody.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Between Pillow's limit and twice that it only warns, and takes a gigabyte.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except MemoryError:
        raise
    except UnidentifiedImageError:
        reason = f"no {', '.join(FORMATS)} image"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        reason = f"refused as a decompression bomb ({error})"
    except Exception as error:  # broken bytes make Pillow's readers raise nearly anything
        reason = f"not decodable ({error})"
    else:
        return
    raise BadImageError(f"{name} is {reason}.", BAD_IMAGE_FIX)


@contextmanager
def _libtiff_silent() -> Iterator[None]:
    """Keep libtiff, which writes a line for each bad row of pixels, from the terminal."""
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@dataclass(frozen=True)
class Part:
    """Where the images of one split are."""

    split: Split
    name: str | None  # a named part of the source; None: the source is one undivided set
    val_fraction: float | None  # divide that part by this; None: take all of it

    def rows(self, listing: Listing) -> NDArray[np.int64]:
        """Which rows of `listing`, the images of the part, belong to the split.

        In a part to divide, an image's place follows from a hash of its name: the same on every
        machine and for every seed (else runs compared with each other would have trained on each
        other's validation images), and hardly moved by images that come or go. Every class with
        two images or more is in both splits.
        """
        if self.val_fraction is None:
            return np.arange(len(listing.names))
        draws = b"".join(hashlib.blake2b(n, digest_size=8).digest() for n in listing.names)
        by_class = np.lexsort((np.frombuffer(draws, "<u8"), listing.labels))
        labels = listing.labels[by_class]
        counts = np.bincount(labels, minlength=len(listing.classes))
        rank = np.arange(len(labels)) - (np.cumsum(counts) - counts)[labels]
        wanted = np.minimum(np.maximum(np.rint(counts * self.val_fraction), 1), counts - 1)
        validates = rank < wanted[labels]
        return np.sort(by_class[validates if self.split == "val" else ~validates])


def choose_part(found: Iterable[str], split: Split, data: DataSection, source: str) -> Part:
    """Which part of those `found` in a source holds `split`, or an error that names them."""
    present = set(found)
    parts = {
        each: next((name for name in names if name in present), None)
        for each, names in SPLIT_NAMES.items()
    }
    if data.val_fraction is None:
        if parts[split] is not None:
            return Part(split, parts[split], None)
        raise DataError(
            f"{source} has no {split} part, only {summary(present) or 'one undivided set'}.",
            "name its parts train and val, or set data.val_fraction to divide a single set",
        )
    if parts["val"] is not None:
        raise DataError(
            f"{source} has a {parts['val']} part, and data.val_fraction asks for another.",
            "leave out data.val_fraction",
        )
    return Part(split, parts["train"], data.val_fraction)


def class_order(found: Iterable[str], data: DataSection, source: str) -> tuple[str, ...]:
    """All classes in label order: the sorted names, or what the file data.classes says."""
    if data.classes is None:
        return tuple(sorted(found))
    classes = read_classes(Path(data.classes))
    unknown = set(found) - set(classes)
    if unknown:
        raise DataError(
            f"{source} has classes that {data.classes} does not name: {summary(unknown)}.",
            "add them to the file, or remove their images",
        )
    return classes


def read_classes(path: Path) -> tuple[str, ...]:
    """One class name per line."""
    try:
        text = read_text(path, MOST_LIST_BYTES)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the class list {path} cannot be read ({error}).", "correct data.classes"
        ) from error
    return class_names(text, str(path))


def class_names(text: str, path: str) -> tuple[str, ...]:
    """The lines of a class list; DataError where it names none, or one twice."""
    classes = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not classes:
        raise DataError(f"the class list {path} is empty.", "write one class name per line")
    repeated = {name for name, times in Counter(classes).items() if times > 1}
    if repeated:
        raise DataError(
            f"{path} names classes twice: {summary(repeated)}.", "name every class once"
        )
    return classes


def summary(names: Iterable[str], most: int = 5) -> str:
    """The first few names, sorted, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file descriptor for one read: forked workers share no file, and none stay open."""
    file = os.open(path, os.O_RDONLY)
    try:
        yield file
    finally:
        os.close(file)


def read_at(file: int, offset: int, size: int) -> bytes:
    """Exactly `size` bytes from `offset`; archives lie about both."""
    if offset < 0 or not 0 <= size <= MOST_BYTES:
        raise OSError(f"{size:,} bytes at {offset:,} cannot be read")
    content = os.pread(file, size, offset)
    if len(content) != size:
        raise OSError(f"the file ends before byte {offset + size}")
    return content
