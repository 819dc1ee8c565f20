"""The front door of the data room: a recipe's data section to `Samples`."""

import os
from pathlib import Path

from care_compress.data.folder import open_folder, open_zip
from care_compress.data.given import open_given
from care_compress.data.hub import open_hub
from care_compress.data.listing import Split, summary
from care_compress.data.samples import Samples
from care_compress.data.shapes import Shapes
from care_compress.data.shards import open_shards
from care_compress.errors import DataError
from care_compress.recipe.sections import DataSection

FORMS = "builtin:shapes, an image folder, a .zip of one, hf:NAME, or wds:PATTERN"


def open_samples(data: DataSection, split: Split) -> Samples:
    """The images of one split."""
    kind, colon, rest = data.source.partition(":")
    if colon and kind == "builtin":
        if rest != "shapes":
            raise DataError(f"there is no {data.source}.", "the one builtin set is builtin:shapes")
        if data.val_fraction is not None or data.classes is not None:
            raise DataError(
                f"{data.source} comes with its own parts and classes.",
                "leave out data.val_fraction and data.classes",
            )
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


def check_classes(samples: Samples, num_classes: int) -> None:
    """Refuse a model that answers with another number of classes than the data has."""
    if len(samples.classes) != num_classes:
        raise DataError(
            f"the model has {num_classes} classes, the data has {len(samples.classes)} "
            f"({summary(samples.classes)}).",
            "choose a checkpoint trained on this data, or list the model's classes in order, one "
            "per line, in a file and set data.classes to it",
        )
