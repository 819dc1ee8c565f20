"""Which image belongs to which annotation, and to which part of the set, by names alone.

    images/train/**      annotations/train/**       and the same of val (training, validation, test)
    images/**            annotations/**             undivided: data.val_fraction divides it
    JPEGImages/*         Annotations/*.xml or SegmentationClass/*.png, parts in ImageSets/*/val.txt

An annotation has the name of its image with another suffix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from care_compress.data.annotations import Kind
from care_compress.data.folder import IMAGE_SUFFIXES
from care_compress.data.listing import Listing, PackedNames, Part, summary
from care_compress.data.tree import Tree
from care_compress.errors import DataError

# What a part is called here and there, and what the rest of the product calls it.
PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "validation": "val",
    "test": "test",
}
SUFFIX: Mapping[Kind, str] = {"masks": ".png", "boxes": ".xml"}
# Of Pascal VOC's own layout: where the annotations are, and the lists of its parts.
VOC: Mapping[Kind, tuple[str, str]] = {
    "masks": ("SegmentationClass/", "ImageSets/Segmentation/"),
    "boxes": ("Annotations/", "ImageSets/Main/"),
}
ARRANGE: Mapping[Kind, str] = {
    "masks": "arrange it as images/train/a.jpg and annotations/train/a.png, and the same of val",
    "boxes": "arrange it as images/train/a.jpg and annotations/train/a.xml (Pascal VOC), or write "
    "annotations/instances_train.json (COCO); and the same of val",
}


@dataclass(frozen=True)
class Named:
    """The images and annotations of a part, both by what they have in common: their stem."""

    images: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)

    def put(self, where: dict[str, str], stem: str, name: str, source: str) -> None:
        """Add a file; DataError where its stem is taken."""
        if stem in where:
            raise DataError(
                f"{source} has both {where[stem]} and {name}.", "keep one, or rename one"
            )
        where[stem] = name


def find_parts(tree: Tree, kind: Kind) -> dict[str, Named]:
    """The parts of the set by name; '' is an undivided set."""
    if any(name.startswith("JPEGImages/") for name in tree.names):
        return _voc_parts(tree, kind)
    divided: dict[str, Named] = {}
    undivided = Named()
    for name in tree.names:
        head, _, rest = name.partition("/")
        suffixes = {"images": IMAGE_SUFFIXES, "annotations": (SUFFIX[kind],)}.get(head)
        if suffixes is None or not rest.lower().endswith(suffixes):
            continue
        first, _, below = rest.partition("/")
        part = PARTS.get(first) if below else None
        # A set in parts may have more beside them, as ADE20K's images of a release.
        named = divided.setdefault(part, Named()) if part else undivided
        stem = (below if part else rest).rpartition(".")[0]
        where = named.images if head == "images" else named.annotations
        named.put(where, stem, name, tree.source)
    # Images for a contest come without their answers.
    if "test" in divided and not divided["test"].annotations:
        del divided["test"]
    if divided:
        return divided
    if not undivided.images or not undivided.annotations:
        what = "images" if not undivided.images else f"annotations ({SUFFIX[kind]})"
        raise DataError(f"{tree.source} has no {what} in the folder for them.", ARRANGE[kind])
    return {"": undivided}


def _voc_parts(tree: Tree, kind: Kind) -> dict[str, Named]:
    """The parts that the lists of a set in Pascal VOC's own layout name."""
    folder, lists = VOC[kind]
    whole = Named()
    for name in tree.names:
        if name.startswith("JPEGImages/") and name.lower().endswith(IMAGE_SUFFIXES):
            stem = name.removeprefix("JPEGImages/").rpartition(".")[0]
            whole.put(whole.images, stem, name, tree.source)
        elif name.startswith(folder) and name.lower().endswith(SUFFIX[kind]):
            stem = name.removeprefix(folder).rpartition(".")[0]
            whole.put(whole.annotations, stem, name, tree.source)
    if not whole.annotations:
        raise DataError(f"{tree.source} has no {folder}*{SUFFIX[kind]}.", ARRANGE[kind])
    parts: dict[str, Named] = {}
    for name in tree.names:
        part = PARTS.get(name.removeprefix(lists).removesuffix(".txt"))
        if part is None or not name.startswith(lists):
            continue
        stems = [line.split()[0] for line in tree.text(name).splitlines() if line.strip()]
        if absent := [stem for stem in stems if stem not in whole.images]:
            raise DataError(
                f"{tree.source}: {name} names images that are not there: {summary(absent)}.",
                "remove them from the list, or fetch the images",
            )
        parts[part] = Named(
            {stem: whole.images[stem] for stem in stems},
            {stem: whole.annotations[stem] for stem in stems if stem in whole.annotations},
        )
    return parts or {"": whole}


def check_part(named: Named, source: str, kind: Kind) -> None:
    """Raise DataError if an annotation has no image, or no image an annotation."""
    if not named.annotations:
        raise DataError(f"{source} has no annotations ({SUFFIX[kind]}).", ARRANGE[kind])
    if lonely := named.annotations.keys() - named.images.keys():
        raise DataError(
            f"{source} has annotations without an image: "
            f"{summary(named.annotations[stem] for stem in lonely)}.",
            "remove them, or fetch their images; both have one name but for the suffix",
        )


def rows_of(part: Part, names: Sequence[str], source: str, kind: Kind) -> list[int]:
    """Which of the images of a part belong to the split; DataError if none does."""
    packed = PackedNames([name.encode("utf-8", "surrogateescape") for name in names])
    # One class for all: how often a class is seen is no matter of whole images here.
    chosen = part.rows(Listing(packed, np.zeros(len(names), np.int64), ("",)))
    rows: list[int] = chosen.tolist()
    if not rows:
        raise DataError(f"{source} holds no images for this split.", ARRANGE[kind])
    return rows
