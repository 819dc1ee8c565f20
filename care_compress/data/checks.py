"""Images that are there twice: in the calibration and the validation set, or within the latter.

What is compared is a digest of the stored bytes, taken while an image is read anyway: eight bytes
for each, no second read and no second decode. An image saved again in another way is another one.
"""

import base64
import contextlib
import hashlib
from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from care_compress.console import CheckResult
from care_compress.data.samples import Samples

CHECK = "duplicate images"
SHARED = f"{CHECK} in calibration and validation"


def digest_of(stored: bytes) -> int:
    """Digest of stored bytes; two of a million images share one by chance at 3e-8."""
    return int.from_bytes(hashlib.blake2b(stored, digest_size=8).digest(), "little")


class Contents:
    """Digests of the images that a pass has read, by their index."""

    def __init__(self) -> None:
        self._indices = array("q")
        self._digests = array("Q")

    def __len__(self) -> int:
        return len(self._indices)

    def add(self, indices: Sequence[int], digests: Sequence[int]) -> None:
        """Take in one batch."""
        self._indices.extend(indices)
        self._digests.extend(digests)

    def take(self, others: Sequence["Contents"]) -> None:
        """Hold what all of these hold, each image once."""
        found = {i: d for one in others for i, d in zip(one._indices, one._digests, strict=True)}
        self._indices, self._digests = array("q", found.keys()), array("Q", found.values())

    def as_text(self) -> str:
        """Text for a file, so that a later run need not read all images again."""
        both = (self._indices.tobytes(), self._digests.tobytes())
        return "\n".join(base64.b64encode(part).decode() for part in both)

    @classmethod
    def of_text(cls, text: str) -> "Contents":
        """What `as_text` wrote; empty if it is damaged."""
        found = cls()
        with contextlib.suppress(ValueError):
            indices, digests = (base64.b64decode(line) for line in text.split("\n"))
            if len(indices) == len(digests):
                found._indices.frombytes(indices)
                found._digests.frombytes(digests)
        return found

    def sorted(self) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Indices and digests, equal digests side by side."""
        digests = np.array(self._digests, np.uint64)
        indices = np.array(self._indices, np.int64)
        order = np.lexsort((indices, digests))
        return indices[order], digests[order]


def overlap_checks(
    validation: Samples, seen: Contents, calibration: Sequence[tuple[str, int]] | None
) -> list[CheckResult]:
    """Look for validation images that are there twice, or in the calibration set too.

    `calibration` holds names and digests; it is empty in a float run, and None where not known.
    """
    if not len(seen):
        return [CheckResult(CHECK, "not measured", "the images were scored by an earlier run")]
    indices, digests = seen.sorted()
    found = [_within(validation, indices, digests)]
    if calibration is None:
        found.append(
            CheckResult(SHARED, "not measured", "calibration.json has no digests of files")
        )
    elif calibration:
        found.append(_shared(validation, indices, digests, calibration))
    return found


def _within(
    validation: Samples, indices: NDArray[np.int64], digests: NDArray[np.uint64]
) -> CheckResult:
    again = np.flatnonzero(digests[1:] == digests[:-1]) + 1
    check, total = f"{CHECK} in validation", f"{len(indices):,} validation images"
    if not len(again):
        return CheckResult(check, "fine", f"no two of {total} are the same file")
    labels = validation.labels[indices]
    parted = again[labels[again] != labels[again - 1]]
    pairs = [*parted, *np.setdiff1d(again, parted)]  # another class for the same file is worse
    items = tuple(
        f"{validation.name(int(indices[at]))} = {validation.name(int(indices[at - 1]))}"
        for at in pairs
    )
    also = f", {len(parted):,} of them under another class" if len(parted) else ""
    text = f"{len(again):,} of {total} are copies of others and count again{also}"
    return CheckResult(check, "warning", text, items)


def _shared(
    validation: Samples,
    indices: NDArray[np.int64],
    digests: NDArray[np.uint64],
    calibration: Sequence[tuple[str, int]],
) -> CheckResult:
    wanted = np.array([digest for _, digest in calibration], np.uint64)
    places = np.searchsorted(digests, wanted).clip(max=len(digests) - 1)
    items = tuple(
        f"{name} = {validation.name(int(indices[at]))}"
        for (name, digest), at in zip(calibration, places, strict=True)
        if digests[at] == digest
    )
    total = f"{len(calibration):,} calibration images"
    if not items:
        return CheckResult(
            SHARED, "fine", f"none of {total} is among the {len(indices):,} validated on"
        )
    text = f"{len(items):,} of {total} are validation images too: the ranges were made on them"
    return CheckResult(SHARED, "warning", text, items)


def coverage_check(classes: Sequence[str], counts: NDArray[np.int64]) -> CheckResult:
    """Look for classes that no image shows, given how many images show each."""
    empty = np.flatnonzero(counts == 0)
    check, total = "classes", f"{len(classes):,} classes"
    if not len(empty):
        return CheckResult(
            check, "fine", f"each of {total} has at least {counts.min():,} validation images"
        )
    text = f"{len(empty):,} of {total} have no validation image: the accuracy does not know them"
    return CheckResult(check, "warning", text, tuple(classes[int(label)] for label in empty))
