"""Masks from files: images of indices, one per pixel, as classes and `IGNORED`."""

import hashlib

import numpy as np
from numpy.typing import NDArray

from care_compress.data.annotations import IGNORED, AnnotatedImages, Mask, check_some
from care_compress.data.layout import ARRANGE, check_part, find_parts, rows_of
from care_compress.data.listing import EncodedSamples, Split, choose_part, summary
from care_compress.data.tree import Tree
from care_compress.errors import DataError
from care_compress.recipe.sections import DataSection

MODES = ("1", "L", "P", "I;16", "I;16B", "I")  # of images that hold one number per pixel
# Filters of other formats change numbers, and a changed number is another class.
LOSSLESS = ("PNG", "TIFF", "BMP", "GIF")


class MaskSamples(AnnotatedImages):
    """Images and, in the same order, the images of their indices."""

    def __init__(
        self,
        images: EncodedSamples,
        masks: EncodedSamples,
        classes: tuple[str, ...],
        data: DataSection,
        version: str = "",
    ) -> None:
        """`version` stands for the masks' bytes where a source knows one."""
        super().__init__(images, classes)
        if len(classes) > IGNORED:
            raise DataError(
                f"{self.source} has {len(classes)} classes, a mask tells {IGNORED} apart.",
                "join classes, or list fewer",
            )
        self.masks = masks
        self._ignore = data.ignore_index
        self._version = version
        self._meaning, self._known = _meanings(len(classes), data.ignore_index)
        self._seen = check_some(self, images, data)

    def annotation(self, index: int) -> Mask:
        """The mask of one image, at the image's own size."""
        name = f"{self.masks.source}: {self.masks.name(index)}"
        image = self.masks.image(index)
        if image.mode not in MODES or image.format not in LOSSLESS:
            raise DataError(
                f"{name} is a {image.format} image of mode {image.mode}, not one of indices.",
                "save masks as PNG with one class index per pixel (grey or a palette)",
            )
        indices = np.asarray(image)
        if indices.dtype != np.uint8:  # True and False, or 16 bits
            wide = indices.astype(np.int64)
            if (beyond := (wide < 0) | (wide > 255)).any():
                raise self._unknown(name, np.unique(wide[beyond]))
            indices = wide.astype(np.uint8)
        if not (known := self._known[indices]).all():
            raise self._unknown(name, np.unique(indices[~known]).astype(np.int64))
        mask: Mask = self._meaning[indices]
        return mask

    def _unknown(self, name: str, found: NDArray[np.int64]) -> DataError:
        first = int(found[0])
        several = "indices" if len(found) > 1 else "index"
        numbers = ", ".join(map(str, found[:5])) + (" and more" if len(found) > 5 else "")
        start = 1 if self._ignore == 0 else 0
        ignored = "none is ignored" if self._ignore is None else f"{self._ignore} is ignored"
        return DataError(
            f"{name} has the {several} {numbers}; the {len(self.classes)} classes are "
            f"{start} to {len(self.classes) - 1 + start}, {ignored}.",
            f"set data.ignore_index={min(first, 255)} if its pixels count for nothing, "
            "or name its class in the list of classes",
        )

    def fingerprint(self) -> str:
        """Hex digest of both lists, the classes, and the masks that were looked at."""
        parts = (self.images.fingerprint(), self.masks.fingerprint(), self._seen)
        return _digest(*parts, *self.classes, str(self._ignore))

    def content_digest(self) -> str:
        """Hex digest that also changes with images and masks under the same names."""
        contents = (self.images.content_digest(), self.masks.content_digest())
        return _digest(self.fingerprint(), *contents, self._version)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "backslashreplace")).hexdigest()


def _meanings(classes: int, ignore: int | None) -> tuple[Mask, NDArray[np.bool_]]:
    """What each index of a file means, and whether it means anything."""
    start = 1 if ignore == 0 else 0
    meaning = np.full(256, IGNORED, np.uint8)
    meaning[start : start + classes] = np.arange(classes)
    known = np.zeros(256, bool)
    known[start : start + classes] = True
    if ignore is not None:
        meaning[ignore], known[ignore] = IGNORED, True
    return meaning, known


def open_masks(tree: Tree, data: DataSection, split: Split) -> MaskSamples:
    """One split of images and masks under one name."""
    parts = find_parts(tree, "masks")
    classes = classes_of_masks(tree.classes(data), tree.source)
    part = choose_part(parts.keys() - {""}, split, data, tree.source)
    named = parts.get(part.name or "")
    if named is None:
        raise DataError(f"{tree.source} has no images to divide.", ARRANGE["masks"])
    check_part(named, tree.source, "masks")
    if bare := named.images.keys() - named.annotations.keys():
        raise DataError(
            f"{tree.source} has images without a mask: "
            f"{summary(named.images[stem] for stem in bare)}.",
            "draw their masks, or remove them; both have one name but for the suffix",
        )
    stems = sorted(named.images)
    rows = rows_of(part, [named.images[stem] for stem in stems], tree.source, "masks")
    images = tree.files([named.images[stems[row]] for row in rows])
    masks = tree.files([named.annotations[stems[row]] for row in rows])
    return MaskSamples(images, masks, classes, data)


def classes_of_masks(names: tuple[str, ...] | None, source: str) -> tuple[str, ...]:
    """The names of the classes; a mask holds numbers alone, so somebody has to say them."""
    if names is None:
        raise DataError(
            f"{source} does not name its classes.",
            "write classes.txt beside its folders, one name per line in the order of the "
            "indices, or set data.classes to such a file",
        )
    return names
