"""WebDataset tar shards with random access: the tars are indexed once, then read in place.

webdataset itself reads shards in sequence only; a shuffle that resumes bit for bit needs any
image at any time. Its naming rules (what a shard pattern and a sample is) are taken from it.
"""

import contextlib
import json
import math
import os
import re
import tarfile
from collections.abc import Iterator
from glob import glob
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from care_compress.data.listing import (
    PART_NAMES,
    EncodedSamples,
    Listing,
    PackedNames,
    Split,
    choose_part,
    opened,
    read_at,
    read_classes,
    summary,
)
from care_compress.errors import DataError
from care_compress.recipe.sections import DataSection

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "webp"})
LABEL_KEYS = ("cls", "label")  # of a .json
MOST_SHARDS = 100_000
MOST_CLASSES = 1_000_000  # a label of a billion would be a billion names
MOST_LABEL_BYTES = 1 << 20  # of a .cls or .json
# One image: which shard, where in it.
ENTRY = np.dtype([("shard", "i4"), ("at", "i8"), ("size", "i8")])


class ShardSamples(EncodedSamples):
    """Images inside tar shards."""

    def __init__(
        self, source: str, listing: Listing, shards: list[Path], entries: NDArray[np.void]
    ) -> None:
        super().__init__(source, listing)
        self._shards = shards
        self._entries = entries

    def encoded(self, index: int) -> bytes:
        """The image file of the sample."""
        entry = self._entries[index]
        with opened(self._shards[entry["shard"]]) as file:
            return read_at(file, int(entry["at"]), int(entry["size"]))

    def content(self) -> NDArray[np.uint64]:
        """The sizes of the image files."""
        return self._entries["size"].astype(np.uint64)


def open_shards(pattern: str, data: DataSection, split: Split) -> ShardSamples:
    """Index the shards of one split; ``train`` or ``val`` in a shard's name says which it is in."""
    source = f"wds:{pattern}"
    by_part: dict[str, list[Path]] = {}
    for shard in find_shards(pattern):
        # train of train-000.tar, set-train-000.tar or train/000.tar; '' where nothing says.
        words = [shard.parent.name.lower(), *re.split(r"[^a-z]+", shard.name.lower())]
        named = next((word for word in reversed(words) if word in PART_NAMES), "")
        by_part.setdefault(named, []).append(shard)
    part = choose_part(by_part.keys() - {""}, split, data, source)
    shards = by_part[part.name or ""]
    samples = [
        (number, sample) for number, shard in enumerate(shards) for sample in _samples(shard)
    ]
    labels = np.array([sample.label for _, sample in samples], np.int64)
    highest = int(labels.max(initial=-1))
    if highest >= MOST_CLASSES:
        raise DataError(f"{source} has a label of {highest:,}.", "number the classes from 0")
    # Names for the numbers: data.classes, classes.txt beside the shards, or the numbers.
    beside = shards[0].parent / "classes.txt"
    names = Path(data.classes) if data.classes else beside if beside.is_file() else None
    classes = read_classes(names) if names else tuple(map(str, range(highest + 1)))
    if labels.min(initial=0) < 0 or highest >= len(classes):
        raise DataError(
            f"{source} has labels from {labels.min()} to {highest}, "
            f"{names or 'the data'} names {len(classes)} classes.",
            "number the classes from 0, and name every one of them in data.classes",
        )
    whole = Listing(
        PackedNames([s.name.encode("utf-8", "surrogateescape") for _, s in samples]),
        labels,
        classes,
    )
    entries = np.array([(number, s.at, s.size) for number, s in samples], ENTRY)
    rows = part.rows(whole)
    return ShardSamples(source, whole.take(rows), shards, entries[rows])


def find_shards(pattern: str) -> list[Path]:
    """Local tars of a directory, or of a pattern with {000..003}, {a,b}, * and ?."""
    from braceexpand import braceexpand
    from webdataset.shardlists import expand_urls  # imports for a second, so only where needed

    counted = re.findall(r"\{(-?\d{1,9})\.\.(-?\d{1,9})\}", pattern)
    spans = [abs(int(last) - int(first)) + 1 for first, last in counted]
    if math.prod(spans) > MOST_SHARDS or re.search(r"\d{10}", pattern):
        raise DataError(f"wds:{pattern} means more than {MOST_SHARDS:,} shards.", "name fewer")
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(
            f"wds:{pattern} is not on this machine.",
            "mount or download the shards, or use an hf: source",
        )
    if os.path.isdir(pattern):
        found = sorted(Path(pattern).glob("*.tar")) or sorted(Path(pattern).glob("*/*.tar"))
    else:
        try:
            for each in pattern.split("::"):
                if next(islice(braceexpand(each), MOST_SHARDS, None), None) is not None:
                    raise ValueError(f"it means more than {MOST_SHARDS:,} shards")
            expanded = expand_urls(pattern)
        # Unbalanced braces, or a variable that is not set.
        except (ValueError, AssertionError, RecursionError) as error:
            raise DataError(
                f"wds:{pattern} is no shard pattern ({error}).", "write, say, train-{000..099}.tar"
            ) from error
        found = [Path(path) for each in expanded for path in sorted(glob(each)) or [each]]
    missing = [str(path) for path in found if not os.path.isfile(path)]
    if missing:
        raise DataError(f"there is no shard {summary(missing)}.", "correct data.source")
    if not found:
        raise DataError(f"wds:{pattern} has no .tar files.", "correct data.source")
    return found


class _Sample(NamedTuple):
    """One image in a shard."""

    name: str
    label: int
    at: int
    size: int


def _samples(shard: Path) -> Iterator[_Sample]:
    """The samples of a shard: neighbouring files whose names differ in the extension alone."""
    from webdataset.tariterators import base_plus_ext

    def files(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # else every entry stays in memory
            base, extension = base_plus_ext(member.name)
            if base is not None and member.isreg():
                yield base, extension.lower(), member

    try:
        with tarfile.open(shard, "r:") as tar:
            for _, neighbours in groupby(files(tar), key=itemgetter(0)):
                group: dict[str, tarfile.TarInfo] = {}
                for _, extension, member in neighbours:
                    group.setdefault(extension, member)
                image = next((group[each] for each in group if each in IMAGE_EXTENSIONS), None)
                if image is not None:
                    label = _label(tar, group, f"{shard}: {image.name}")
                    name = f"{shard.name}/{image.name}"
                    yield _Sample(name, label, image.offset_data, image.size)
    # The headers of a damaged tar hold numbers that are none, and sizes that lead anywhere.
    except (OSError, tarfile.TarError, ValueError, OverflowError, EOFError) as error:
        raise DataError(
            f"{shard} cannot be read as a tar ({error}).",
            "shards must be complete and not compressed: fetch it again, or gunzip it",
        ) from error


def _label(tar: tarfile.TarFile, group: dict[str, tarfile.TarInfo], image: str) -> int:
    """The class number in the .cls or .json beside an image."""
    content = None
    if label_file := group.get("cls") or group.get("json"):
        file = tar.extractfile(label_file)
        assert file is not None, "only regular files are grouped"
        # The text of a .cls, a number, is JSON too.
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(file.read(MOST_LABEL_BYTES))
    if isinstance(content, dict):
        content = next((content[key] for key in LABEL_KEYS if key in content), None)
    if isinstance(content, int) and not isinstance(content, bool) and abs(content) < 2**31:
        return content
    raise DataError(
        f"{image} has no label.",
        "put a .cls file with the class number, or a .json with cls or label, beside it",
    )
