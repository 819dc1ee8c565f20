"""Zips of image folders, read in place: nothing is unpacked."""

import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from care_compress.data.folder import IMAGE_SUFFIXES, LAYOUT, is_visible
from care_compress.data.listing import (
    MOST_BYTES,
    PART_NAMES,
    EncodedSamples,
    Listing,
    PackedNames,
    Split,
    choose_part,
    class_order,
    opened,
    read_at,
)
from care_compress.errors import DataError
from care_compress.recipe.sections import DataSection

LOCAL_HEADER = struct.Struct("<26xHH")  # its last fields: the lengths of the name and the extras
ENCRYPTED = 0x1
SUFFIXES = tuple(suffix.decode() for suffix in IMAGE_SUFFIXES)
# One entry: offset of its local header, sizes, checksum, compression method.
ENTRY = np.dtype([("at", "i8"), ("packed", "i8"), ("size", "i8"), ("crc", "u4"), ("method", "u2")])


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
    source = str(path)
    infos, folders = _images_and_folders(path)
    top = _common_top(infos, folders)
    inside = [name.removeprefix(top) for name in (*infos, *folders) if name.startswith(top)]
    parts = _classes_of_parts(inside)
    found = {name for classes in parts.values() for name in classes}
    if not found:
        raise DataError(f"{source} holds no folders with images.", LAYOUT)
    part = choose_part(parts.keys() - {""}, split, data, source)
    within = f"{part.name}/" if part.name else ""
    classes = class_order(found, data, source)
    label_of = {name: label for label, name in enumerate(classes)}
    chosen = sorted(
        (label_of[rest.split("/", 1)[0]], name.removeprefix(top), name)
        for name in infos
        if name.startswith(top + within) and "/" in (rest := name[len(top) + len(within) :])
    )
    whole = Listing(
        PackedNames([name.encode("utf-8", "surrogateescape") for _, name, _ in chosen]),
        np.array([label for label, _, _ in chosen], np.int64),
        classes,
    )
    table = np.array([_entry(infos[name], source) for _, _, name in chosen], ENTRY)
    rows = part.rows(whole)
    return ZipSamples(path, whole.take(rows), table[rows])


def _images_and_folders(path: Path) -> tuple[dict[str, zipfile.ZipInfo], list[str]]:
    """Name to entry of every image, and the folders that have an entry of their own.

    Of entries with one name the last counts, as in any zip. A folder without images is a class all
    the same, as it is on disk: who unpacks a set in part keeps the numbers of its classes.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    # A directory that lies about lengths and encodings surfaces as any of these.
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise DataError(f"{path} cannot be read as a zip ({error}).", "fetch it again") from error
    images, found = {}, []
    for info in infos:
        *folders, file = info.filename.split("/")
        if not all(map(is_visible, folders)):
            continue
        if info.is_dir():
            found.append(info.filename)
        elif file.lower().endswith(SUFFIXES) and not file.startswith("."):
            images[info.filename] = info
    return images, found


def _common_top(images: Iterable[str], folders: Iterable[str]) -> str:
    """The folder around everything, with its slash, or ''."""
    tops = {name.split("/", 1)[0] for name in images if name.count("/") > 1}
    everything = {name.split("/", 1)[0] for name in (*images, *folders)}
    if len(everything) == 1 and tops == everything and not tops & PART_NAMES:
        return f"{tops.pop()}/"
    return ""


def _classes_of_parts(names: Iterable[str]) -> dict[str, set[str]]:
    """Part name to the class folders in it; an undivided folder is the part ''."""
    heads = {tuple(name.split("/", 2)[:-1]) for name in names}
    parts: dict[str, set[str]] = {}
    for head in heads:
        if len(head) == 2 and head[0] in PART_NAMES:
            parts.setdefault(head[0], set()).add(head[1])
    return parts or {"": {head[0] for head in heads if head}}


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
