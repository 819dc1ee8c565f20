"""Image folders: ``train/<class>/...`` and ``val/<class>/...``, or class folders to be divided."""

import contextlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from care_compress.data.listing import (
    MOST_BYTES,
    PART_NAMES,
    EncodedSamples,
    Listing,
    PackedNames,
    Split,
    choose_part,
    class_order,
)
from care_compress.errors import DataError
from care_compress.files import read_whole
from care_compress.recipe.sections import DataSection

IMAGE_SUFFIXES = (b".jpg", b".jpeg", b".png", b".bmp", b".webp", b".gif", b".tif", b".tiff")
LAYOUT = "arrange the images as train/<class>/... and val/<class>/..., or <class>/... alone"


class FolderSamples(EncodedSamples):
    """One file per image under a directory."""

    def __init__(self, root: Path, listing: Listing) -> None:
        super().__init__(str(root), listing)
        self._root = os.fsencode(root)

    def encoded(self, index: int) -> bytes:
        """The file."""
        return read_whole(os.path.join(self._root, self.listing.names[index]), MOST_BYTES)

    def content(self) -> NDArray[np.uint64]:
        """Times of the last change; a missing file is 0 here and named when it is read."""
        times = np.zeros(len(self), np.uint64)
        for index, name in enumerate(self.listing.names):
            with contextlib.suppress(OSError):
                changed = os.stat(os.path.join(self._root, name)).st_mtime_ns
                times[index] = changed % 2**64  # a clock may have stood before 1970
        return times


def open_folder(root: Path, data: DataSection, split: Split) -> FolderSamples:
    """List one split of an image folder; no image is opened, no file is asked for its state."""
    source, base = str(root), os.fsencode(root)
    try:
        parts = _classes_of_parts(base)
        found = {name for classes in parts.values() for name in classes}
        if not found:
            raise DataError(f"{source} holds no folders with images.", LAYOUT)
        part = choose_part(parts.keys() - {""}, split, data, source)
        within = part.name or ""
        classes = class_order(found, data, source)
        listing = _list_classes(base, within, parts[within], classes)
    except OSError as error:
        raise DataError(f"{source} cannot be listed ({error}).", "check data.source") from error
    return FolderSamples(root, listing.take(part.rows(listing)))


def _classes_of_parts(base: bytes) -> dict[str, set[str]]:
    """Part name to the class folders in it; an undivided folder is the part ''."""
    top = _folders(base)
    # A class may be called train too (the vehicle): then there are no folders in it.
    parts = {name: _folders(os.path.join(base, name.encode())) for name in top & PART_NAMES}
    return {name: inner for name, inner in parts.items() if inner} or {"": top}


def _folders(path: bytes) -> set[str]:
    with os.scandir(path) as entries:
        names = [os.fsdecode(entry.name) for entry in entries if entry.is_dir()]
    return {name for name in names if is_visible(name)}


def is_visible(folder: str) -> bool:
    """Neither a hidden folder nor the one that macOS adds to archives."""
    return not folder.startswith(".") and folder != "__MACOSX"


def _list_classes(base: bytes, within: str, present: set[str], classes: tuple[str, ...]) -> Listing:
    """Images sorted by class, then by name."""
    names: list[bytes] = []
    counts = np.zeros(len(classes), np.int64)
    for label, name in enumerate(classes):
        if name in present:
            images = _images(base, os.fsencode(os.path.join(within, name)), frozenset())
            names += sorted(images)
            counts[label] = len(images)
    return Listing(PackedNames(names), np.repeat(np.arange(len(classes)), counts), classes)


def _images(base: bytes, folder: bytes, above: frozenset[tuple[int, int]]) -> list[bytes]:
    """Images in `folder` and below; `above` are the folders on the way here."""
    path = os.path.join(base, folder)
    state = os.stat(path)
    here = (state.st_dev, state.st_ino)
    if here in above:  # a link back up: its images are listed already
        return []
    images: list[bytes] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            name = folder + b"/" + entry.name
            if entry.name.lower().endswith(IMAGE_SUFFIXES):
                images.append(name)
            elif entry.is_dir():
                images += _images(base, name, above | {here})
    return images
