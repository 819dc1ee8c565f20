"""Images that a Python program hands over: pairs of image and label, a dataset, a Hugging Face set.

They go by a name made of what they hold, ``given:1f0c...``, because a recipe is data: a run can
be resumed by whoever hands over the same images again, and by nobody else.
"""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from care_compress.data.checks import digest_of
from care_compress.data.hub import hub_samples
from care_compress.data.listing import (
    BAD_IMAGE_FIX,
    MOST_BYTES,
    PART_NAMES,
    SPLIT_NAMES,
    Listing,
    PackedNames,
    Split,
    choose_part,
    class_order,
    decode,
)
from care_compress.data.samples import Samples, spread_indices
from care_compress.errors import BadImageError, DataError
from care_compress.files import read_whole
from care_compress.recipe.sections import DataSection

LOOKED_AT = 64  # images of each part that its name is made of, beside all labels
FORMS = "give PIL images, uint8 arrays (HWC) or tensors (CHW), bytes of a file, or paths"

_given: dict[str, Callable[[DataSection, Split], Samples]] = {}


def give(data: Any) -> str:
    """Take the images and return the ``data.source`` that they go by in this process.

    `data` is a sequence of (image, label), a dataset with ``__len__`` and ``__getitem__`` that
    yields such pairs, a Hugging Face ``Dataset``, or a mapping of ``train`` and ``val`` to two.
    """
    # What comes undivided is a train part, which data.val_fraction divides.
    parts = dict(data) if isinstance(data, Mapping) else {"train": data}
    if strange := sorted(str(name) for name in parts if name not in PART_NAMES):
        raise DataError(
            f"data has a part called {strange[0]}.", "call the parts train and val (or test)"
        )
    if not parts:
        raise DataError("data holds no images.", "give train and val")
    for name, part in parts.items():
        if not (hasattr(part, "__len__") and hasattr(part, "__getitem__")):
            raise DataError(
                f"data ({name}) is {type(part).__name__}, which has no length or no places.",
                "give a list of (image, label), a dataset with __getitem__, or a folder",
            )
    tables = [type(part).__module__.startswith("datasets.") for part in parts.values()]
    if all(tables):

        def opener(section: DataSection, split: Split) -> Samples:
            return hub_samples(parts, section, split, "data")

    else:
        labelled = {name: _labelled(part, name) for name, part in parts.items()}

        def opener(section: DataSection, split: Split) -> Samples:
            return _open(labelled, section, split)

    name = _digest(parts, opener)
    _given[name] = opener
    return f"given:{name}"


def open_given(name: str, data: DataSection, split: Split) -> Samples:
    """One split of what was handed over under this name."""
    if name not in _given:
        raise DataError(
            f"the images of given:{name} were handed over by a Python program, not by this one.",
            "call care_compress.quantize with the same data first, or use a folder",
        )
    return _given[name](data, split)


class GivenSamples:
    """`Samples` over objects of a program; decoded when asked for, as a file would be."""

    def __init__(self, part: Sequence[Any], listing: Listing, rows: NDArray[np.int64]) -> None:
        self.listing = listing
        self.classes, self.labels = listing.classes, listing.labels
        # A dataset may read files; what lies in a list costs nothing to reach.
        self.in_memory = isinstance(part, list | tuple) and not isinstance(
            part[0][0], str | bytes | os.PathLike
        )
        self._part = part
        self._rows = rows

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Its part and place there: ``train/12``."""
        return self.listing.names[index].decode()

    def image(self, index: int) -> Image.Image:
        """The image as it was handed over."""
        return self.hashed(index)[0]

    def hashed(self, index: int) -> tuple[Image.Image, int]:
        """`image`, and a digest of its pixels or of the bytes of its file."""
        name = f"given: {self.name(index)}"
        try:
            value = self._part[int(self._rows[index])][0]
            if isinstance(value, str | os.PathLike):
                value = read_whole(Path(value), MOST_BYTES)
        except (OSError, LookupError, ValueError) as error:
            raise BadImageError(f"{name} cannot be read ({error}).", BAD_IMAGE_FIX) from error
        if isinstance(value, bytes):
            return decode(value, name), digest_of(value)
        image = _as_image(value, name)
        return image, digest_of(f"{image.mode} {image.size}".encode() + image.tobytes())

    def fingerprint(self) -> str:
        """Hex digest of the list of names, labels and classes."""
        return self.listing.fingerprint()

    def content_digest(self) -> str:
        """The same; what the images hold is in the name of the source."""
        return self.fingerprint()


def _as_image(value: object, name: str) -> Image.Image:
    """Pixels as an image; refuse what is no longer pixels."""
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, torch.Tensor):
        value = value.permute(1, 2, 0).numpy() if value.dim() == 3 else value.numpy()
    if not isinstance(value, np.ndarray):
        raise DataError(f"{name} is {type(value).__name__}, no image.", FORMS)
    if value.dtype != np.uint8:
        raise DataError(
            f"{name} holds {value.dtype}, not pixels of 0 to 255.",
            f"leave resizing and normalising to the recipe: {FORMS}",
        )
    if value.ndim == 3 and value.shape[2] == 1:
        value = value[:, :, 0]
    if value.ndim != 2 and not (value.ndim == 3 and value.shape[2] in (3, 4)):
        raise DataError(f"{name} has the shape {value.shape}.", FORMS)
    return Image.fromarray(np.ascontiguousarray(value))


def _labelled(part: Any, name: str) -> tuple[Sequence[Any], list[Any], list[str] | None]:
    """A part, the label of each of its images, and the names of its classes if it says them."""
    try:
        size = len(part)
        # As torchvision calls them: reading labels off the pairs would decode every image.
        labels = getattr(part, "targets", None)
        labels = list(labels) if labels is not None else [part[i][1] for i in range(size)]
    except (TypeError, LookupError, ValueError) as error:
        raise DataError(
            f"data ({name}) is no sequence of (image, label): {error}.", "give pairs"
        ) from error
    if not size or len(labels) != size:
        raise DataError(f"data ({name}) has {size} images and {len(labels)} labels.", "check it")
    plain = [label if isinstance(label, str) else int(label) for label in labels]
    if len({type(label) for label in plain}) > 1:
        raise DataError(f"data ({name}) has numbers and names as labels.", "use one of them")
    return part, plain, getattr(part, "classes", None)


def _open(
    labelled: Mapping[str, tuple[Sequence[Any], list[Any], list[str] | None]],
    data: DataSection,
    split: Split,
) -> GivenSamples:
    chosen = choose_part(labelled, split, data, "data")
    name = chosen.name or "train"
    if name not in labelled:
        raise DataError(
            "data has no train part to divide.", "give train, or leave out val_fraction"
        )
    part, labels, classes = labelled[name]
    every = [label for _, those, _ in labelled.values() for label in those]
    if isinstance(labels[0], str):
        order = class_order(set(every), data, "data")
        numbers = np.array([order.index(label) for label in labels], np.int64)
    else:
        most = max(every)
        names = [str(one) for one in classes or range(most + 1)]
        if min(every) < 0 or most >= len(names):
            raise DataError(
                f"data has labels from {min(every)} to {most} and {len(names)} classes.",
                "count labels from 0",
            )
        order = class_order(names, data, "data") if data.classes else tuple(names)
        numbers = np.array(labels, np.int64)
    listed = [f"{name}/{row}".encode() for row in range(len(labels))]
    whole = Listing(PackedNames(listed), numbers, order)
    rows = chosen.rows(whole)
    return GivenSamples(part, whole.take(rows), rows)


def _digest(parts: Mapping[str, Any], opener: Callable[[DataSection, Split], Samples]) -> str:
    """A name made of all labels and of some images of every part."""
    digest, section = hashlib.sha256(), DataSection(source="given:")
    splits: tuple[Split, ...] = ("train", "val")
    for split in splits:
        if not set(SPLIT_NAMES[split]) & set(parts):
            continue
        samples = opener(section, split)
        digest.update(samples.fingerprint().encode())
        for index in spread_indices(len(samples), LOOKED_AT):
            digest.update(samples.hashed(index)[1].to_bytes(8, "little"))
    return digest.hexdigest()[:16]
