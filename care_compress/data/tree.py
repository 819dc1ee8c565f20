"""The files of an annotated set by their names, in a folder or in place inside a zip.

Which of them are images and which are their annotations is found out by `layout`.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from care_compress.data.folder import (
    IMAGE_SUFFIXES,
    FolderSamples,
    ZipSamples,
    entry_table,
    files_and_folders,
    files_below,
)
from care_compress.data.listing import (
    MOST_LIST_BYTES,
    EncodedSamples,
    Listing,
    PackedNames,
    class_names,
    read_classes,
)
from care_compress.errors import DataError
from care_compress.recipe.sections import DataSection

SUFFIXES = (*IMAGE_SUFFIXES, ".xml", ".json", ".txt")
CLASS_LIST = "classes.txt"


class Tree(ABC):
    """Named files; a single folder around all of them is left out of the names."""

    def __init__(self, source: str, found: Sequence[str]) -> None:
        self.source = source
        self.top = _around(found)
        self.names = sorted(name.removeprefix(self.top) for name in found)

    @abstractmethod
    def files(self, names: Sequence[str]) -> EncodedSamples:
        """These files (at least one) as stored bytes, in this order."""

    def read(self, name: str) -> bytes:
        """One file; DataError if it cannot be read."""
        try:
            return self.files([name]).encoded(0)
        except OSError as error:
            raise DataError(
                f"{self.source}: {name} cannot be read ({error.strerror or error}).",
                "fetch it again",
            ) from error

    def text(self, name: str) -> str:
        """One small text file."""
        content = self.read(name)
        try:
            if len(content) > MOST_LIST_BYTES:
                raise ValueError(f"it has {len(content):,} bytes")
            return content.decode("utf-8-sig")
        except ValueError as error:
            raise DataError(
                f"{self.source}: {name} is no list of names ({error}).", "write it as UTF-8 text"
            ) from error

    def classes(self, data: DataSection) -> tuple[str, ...] | None:
        """The names that data.classes or the set's own list gives the classes, in order."""
        if data.classes is not None:
            return read_classes(Path(data.classes))
        if CLASS_LIST in self.names:
            return class_names(self.text(CLASS_LIST), f"{self.source}: {CLASS_LIST}")
        return None


def _around(found: Sequence[str]) -> str:
    """The folders that hold everything, down to the first that holds something beside another."""
    common = os.path.commonprefix([name.split("/")[:-1] for name in found])
    # What is called images, or the like, is a part of the layout, whatever stands beside it.
    outer = []
    for folder in common:
        if folder.lower() in ("images", "annotations", "jpegimages"):
            break
        outer.append(folder + "/")
    return "".join(outer)


def _listing(names: Sequence[str]) -> Listing:
    packed = PackedNames([name.encode("utf-8", "surrogateescape") for name in names])
    return Listing(packed, np.zeros(len(names), np.int64), ())


class FolderTree(Tree):
    """The files below a folder."""

    def __init__(self, root: Path) -> None:
        try:
            found = files_below(os.fsencode(root), b"", SUFFIXES)
        except OSError as error:
            raise DataError(f"{root} cannot be listed ({error}).", "check data.source") from error
        super().__init__(str(root), [os.fsdecode(name) for name in found])
        self._root = root / self.top

    def files(self, names: Sequence[str]) -> FolderSamples:
        """One file for each name."""
        return FolderSamples(self._root, _listing(names))


class ZipTree(Tree):
    """The entries of a zip."""

    def __init__(self, path: Path) -> None:
        self._entries, _ = files_and_folders(path, SUFFIXES)
        super().__init__(str(path), list(self._entries))
        self._path = path

    def files(self, names: Sequence[str]) -> ZipSamples:
        """One entry for each name."""
        table = entry_table(self._path, [self._entries[self.top + name] for name in names])
        return ZipSamples(self._path, _listing(names), table)
