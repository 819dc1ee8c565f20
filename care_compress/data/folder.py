"""Image folders: ``train/<class>/...`` and ``val/<class>/...``, or class folders to be divided.

They are read on disk, or in place inside a zip: nothing is unpacked.
"""

import contextlib
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from care_compress.data.listing import (
    MOST_BYTES,
    PART_NAMES,
    EncodedSamples,
    Listing,
    PackedNames,
    Part,
    Split,
    choose_part,
    class_order,
    opened,
    read_at,
)
from care_compress.errors import DataError
from care_compress.files import read_whole
from care_compress.recipe.sections import DataSection

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
LOCAL_HEADER = struct.Struct("<26xHH")  # its last fields: the lengths of the name and the extras
ENCRYPTED = 0x1
# One entry: offset of its local header, sizes, checksum, compression method.
ENTRY = np.dtype([("at", "i8"), ("packed", "i8"), ("size", "i8"), ("crc", "u4"), ("method", "u2")])


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
    base = os.fsencode(root)
    names: list[bytes] = []
    try:
        top = _folders(base)
        # A class may be called train too (the vehicle): then there are no folders in it.
        inside = {name: _folders(os.path.join(base, name.encode())) for name in top & PART_NAMES}
        parts = {name: inner for name, inner in inside.items() if inner} or {"": top}
        part, classes = _part_and_classes(parts, split, data, str(root))
        within = part.name or ""
        counts = np.zeros(len(classes), np.int64)
        for label, name in enumerate(classes):
            if name in parts[within]:
                found = files_below(base, os.fsencode(os.path.join(within, name)), IMAGE_SUFFIXES)
                names += sorted(found)
                counts[label] = len(found)
    except OSError as error:
        raise DataError(f"{root} cannot be listed ({error}).", "check data.source") from error
    listing = Listing(PackedNames(names), np.repeat(np.arange(len(classes)), counts), classes)
    return FolderSamples(root, listing.take(part.rows(listing)))


def _part_and_classes(
    parts: Mapping[str, set[str]], split: Split, data: DataSection, source: str
) -> tuple[Part, tuple[str, ...]]:
    """The part to read and all classes; `parts` names class folders, '' is an undivided set."""
    found = {name for classes in parts.values() for name in classes}
    if not found:
        raise DataError(
            f"{source} holds no folders with images.",
            "arrange the images as train/<class>/... and val/<class>/..., or <class>/... alone",
        )
    return choose_part(parts.keys() - {""}, split, data, source), class_order(found, data, source)


def _folders(path: bytes) -> set[str]:
    with os.scandir(path) as entries:
        names = [os.fsdecode(entry.name) for entry in entries if entry.is_dir()]
    return {name for name in names if _is_visible(name)}


def _is_visible(folder: str) -> bool:
    """Neither a hidden folder nor the one that macOS adds to archives."""
    return not folder.startswith(".") and folder != "__MACOSX"


def files_below(
    base: bytes,
    folder: bytes,
    suffixes: tuple[str, ...],
    above: frozenset[tuple[int, int]] = frozenset(),
) -> list[bytes]:
    """Files with these suffixes in `folder` of `base` and below; `above` are those on the way."""
    path = os.path.join(base, folder)
    state = os.stat(path)
    here = (state.st_dev, state.st_ino)
    if here in above:  # a link back up: its files are listed already
        return []
    wanted = tuple(suffix.encode() for suffix in suffixes)
    files: list[bytes] = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            name = os.path.join(folder, entry.name)
            if entry.name.lower().endswith(wanted):
                files.append(name)
            elif entry.is_dir():
                files += files_below(base, name, suffixes, above | {here})
    return files


class ZipSamples(EncodedSamples):
    """Images inside a zip, found through a table so that no process reads its directory again."""

    def __init__(self, path: Path, listing: Listing, entries: NDArray[np.void]) -> None:
        super().__init__(str(path), listing)
        self._path = path
        self._entries = entries

    def encoded(self, index: int) -> bytes:
        """The entry, unpacked and held against its checksum."""
        entry = self._entries[index]
        at, size = int(entry["at"]), int(entry["size"])
        with opened(self._path) as file:
            header = read_at(file, at, LOCAL_HEADER.size)
            start = at + LOCAL_HEADER.size + sum(LOCAL_HEADER.unpack(header))
            content = read_at(file, start, int(entry["packed"]))
        if size > MOST_BYTES:
            raise OSError(f"the zip promises {size:,} bytes, more than {MOST_BYTES:,}")
        if entry["method"] == zipfile.ZIP_DEFLATED:
            try:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
            except zlib.error as error:
                raise OSError(f"damaged in the zip: {error}") from error
        if len(content) != size or zlib.crc32(content) != entry["crc"]:
            raise OSError("damaged in the zip: the checksum differs")
        return content

    def content(self) -> NDArray[np.uint64]:
        """The checksums in the zip's directory."""
        return self._entries["crc"].astype(np.uint64)


def open_zip(path: Path, data: DataSection, split: Split) -> ZipSamples:
    """List one split of a zipped image folder from the zip's directory alone."""
    images, folders = files_and_folders(path, IMAGE_SUFFIXES)
    everything = (*images, *folders)
    # A single folder around everything is left out, unless it is a part itself.
    outermost = {name.split("/", 1)[0] for name in everything}
    around = {name.split("/", 1)[0] for name in images if name.count("/") > 1}
    wrapped = len(outermost) == 1 and around == outermost and not around & PART_NAMES
    top = f"{around.pop()}/" if wrapped else ""
    heads = {tuple(name.removeprefix(top).split("/", 2)[:-1]) for name in everything}
    parts: dict[str, set[str]] = {}
    for head in heads:
        if len(head) == 2 and head[0] in PART_NAMES:
            parts.setdefault(head[0], set()).add(head[1])
    parts = parts or {"": {head[0] for head in heads if head}}
    part, classes = _part_and_classes(parts, split, data, str(path))
    start = top + (f"{part.name}/" if part.name else "")
    label_of = {name: label for label, name in enumerate(classes)}
    chosen = sorted(
        (label_of[rest.split("/", 1)[0]], name.removeprefix(top), name)
        for name in images
        if name.startswith(start) and "/" in (rest := name.removeprefix(start))
    )
    whole = Listing(
        PackedNames([name.encode("utf-8", "surrogateescape") for _, name, _ in chosen]),
        np.array([label for label, _, _ in chosen], np.int64),
        classes,
    )
    table = entry_table(path, [images[name] for _, _, name in chosen])
    rows = part.rows(whole)
    return ZipSamples(path, whole.take(rows), table[rows])


def files_and_folders(
    path: Path, suffixes: tuple[str, ...]
) -> tuple[dict[str, zipfile.ZipInfo], list[str]]:
    """Name to entry of every file with these suffixes, and the folders with an entry of their own.

    Of entries with one name the last counts, as in any zip. A folder without images is a class all
    the same, as it is on disk: who unpacks a set in part keeps the numbers of its classes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    # A directory that lies about lengths and encodings surfaces as any of these.
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise DataError(f"{path} cannot be read as a zip ({error}).", "fetch it again") from error
    files, found = {}, []
    for info in infos:
        *folders, file = info.filename.split("/")
        if not all(map(_is_visible, folders)):
            continue
        if info.is_dir():
            found.append(info.filename)
        elif file.lower().endswith(suffixes) and not file.startswith("."):
            files[info.filename] = info
    return files, found


def entry_table(path: Path, infos: Sequence[zipfile.ZipInfo]) -> NDArray[np.void]:
    """Where these entries of the zip are; DataError for what is not unpacked."""
    return np.array([_entry(info, str(path)) for info in infos], ENTRY)


def _entry(info: zipfile.ZipInfo, source: str) -> tuple[int, int, int, int, int]:
    if info.flag_bits & ENCRYPTED:
        raise DataError(f"{source}: {info.filename} is encrypted.", "zip it without a password")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{source}: {info.filename} is compressed with method {info.compress_type}.",
            "zip it with deflate or stored (images gain nothing from compression)",
        )
    sizes = (info.compress_size, info.file_size)
    if max(*sizes, info.header_offset) >= 2**63:  # of a directory that lies
        raise DataError(f"{source}: {info.filename} has no possible size.", "fetch it again")
    return (info.header_offset, *sizes, info.CRC, info.compress_type)
