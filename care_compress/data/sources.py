"""The front door of the data room: a recipe's data section to `Samples`."""

import os
from pathlib import Path

from care_compress.data.annotations import AnnotatedSamples, Kind
from care_compress.data.coco import find_json, open_coco
from care_compress.data.folder import open_folder, open_zip
from care_compress.data.given import open_given
from care_compress.data.hub import open_hub
from care_compress.data.hub_annotated import open_annotated_hub
from care_compress.data.listing import Split, summary
from care_compress.data.masks import open_masks
from care_compress.data.samples import Samples
from care_compress.data.scenes import Scenes
from care_compress.data.shapes import Shapes
from care_compress.data.shards import open_shards
from care_compress.data.tree import FolderTree, ZipTree
from care_compress.data.voc import open_voc
from care_compress.errors import DataError
from care_compress.recipe.sections import DataSection

FORMS = "builtin:shapes, an image folder, a .zip of one, hf:NAME, or wds:PATTERN"
ANNOTATED = "builtin:scenes, a folder of images/ and annotations/, a .zip of one, or hf:NAME"


def open_samples(data: DataSection, split: Split) -> Samples:
    """The images of one split."""
    kind, colon, rest = data.source.partition(":")
    if colon and kind == "builtin":
        if rest == "scenes":
            raise DataError(
                f"{data.source} has masks and boxes, and no class for a whole image.",
                "use it for segmentation or detection, or take builtin:shapes",
            )
        if rest != "shapes":
            raise DataError(
                f"there is no {data.source}.",
                "the builtin sets are builtin:shapes and builtin:scenes",
            )
        _check_builtin(data)
        samples = Shapes(split)
        _ = samples.pixels  # drawn here once, not by every decoding worker
        return samples
    if colon and kind == "hf":
        return open_hub(rest, data, split)
    if colon and kind == "given":
        return open_given(rest, data, split)
    if colon and kind == "wds":
        return open_shards(rest, data, split)
    # os.path and not pathlib, which raises for ~nobody and for a name that is too long.
    path = os.path.expanduser(data.source)
    if os.path.isdir(path):
        return open_folder(Path(path), data, split)
    if path.lower().endswith(".zip") and os.path.isfile(path):
        return open_zip(Path(path), data, split)
    what = "is no data source" if os.path.exists(path) or colon else "does not exist"
    raise DataError(f"data.source {data.source} {what}.", f"give {FORMS}")


def open_annotated(data: DataSection, split: Split, kind: Kind) -> AnnotatedSamples:
    """The images of one split with their masks or boxes."""
    form, colon, rest = data.source.partition(":")
    if colon and form == "builtin":
        if rest != "scenes":
            raise DataError(
                f"{data.source} has no {kind}.", "the builtin set that has them is builtin:scenes"
            )
        _check_builtin(data)
        scenes = Scenes(split, kind)
        _ = scenes.pixels  # drawn here once, not by every decoding worker
        return scenes
    if colon and form == "hf":
        return open_annotated_hub(rest, data, split, kind)
    if colon and form in ("wds", "given"):
        raise DataError(f"{kind} are not read from {form}: sources.", f"give {ANNOTATED}")
    # os.path and not pathlib, which raises for ~nobody and for a name that is too long.
    path = os.path.expanduser(data.source)
    if os.path.isdir(path):
        tree: FolderTree | ZipTree = FolderTree(Path(path))
    elif path.lower().endswith(".zip") and os.path.isfile(path):
        tree = ZipTree(Path(path))
    else:
        what = "is no data source" if os.path.exists(path) or colon else "does not exist"
        raise DataError(f"data.source {data.source} {what}.", f"give {ANNOTATED}")
    if kind == "masks":
        return open_masks(tree, data, split)
    files = find_json(tree)
    return open_coco(tree, files, data, split) if files else open_voc(tree, data, split)


def _check_builtin(data: DataSection) -> None:
    if data.val_fraction is not None or data.classes is not None:
        raise DataError(
            f"{data.source} comes with its own parts and classes.",
            "leave out data.val_fraction and data.classes",
        )


def check_classes(samples: Samples, num_classes: int) -> None:
    """Refuse a model that answers with another number of classes than the data has."""
    if len(samples.classes) != num_classes:
        raise DataError(
            f"the model has {num_classes} classes, the data has {len(samples.classes)} "
            f"({summary(samples.classes)}).",
            "choose a checkpoint trained on this data, or list the model's classes in order, one "
            "per line, in a file and set data.classes to it",
        )
