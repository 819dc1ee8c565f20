"""Hugging Face ``datasets`` with masks (a second image column) or boxes (a column of objects)."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from care_compress.console import one_line, shortened
from care_compress.data.annotations import AnnotatedSamples, Kind
from care_compress.data.boxes import BoxSamples, Object, Told
from care_compress.data.hub import HubSamples, load_tables
from care_compress.data.layout import rows_of
from care_compress.data.listing import (
    Listing,
    PackedNames,
    Split,
    choose_part,
    read_classes,
    summary,
)
from care_compress.data.masks import MaskSamples, classes_of_masks
from care_compress.errors import DataError
from care_compress.recipe.sections import DataSection

if TYPE_CHECKING:
    import datasets

# Which column, and which part of an object, is taken: the first of these that is there.
IMAGES = ("image", "img", "pixel_values")
MASKS = ("annotation", "mask", "label", "labels", "segmentation_mask", "semantic_segmentation")
OBJECTS = ("objects", "annotations", "labels")
CATEGORIES = ("category", "categories", "category_id", "label", "labels")
CROWDS = ("iscrowd", "is_crowd", "difficult")
BBOX = "bbox"  # x, y, width, height, as COCO


def open_annotated_hub(
    reference: str, data: DataSection, split: Split, kind: Kind
) -> AnnotatedSamples:
    """One split of a set on the hub, a directory, or parquet files."""
    source = f"hf:{reference}"
    tables = load_tables(reference)
    part = choose_part(tables.keys(), split, data, source)
    if part.name is None:
        raise DataError(f"{source} has no train part to divide.", "name the part to divide train")
    table = tables[part.name]
    names = [f"{part.name}/{row}" for row in range(len(table))]
    rows = rows_of(part, names, source, kind)
    image = _column(table, IMAGES, source)
    images = _samples(source, table, image, names, rows)
    classes = None if data.classes is None else read_classes(Path(data.classes))
    if kind == "masks":
        column = _column(table, MASKS, source)
        masks = _samples(source, table, column, [f"{name} ({column})" for name in names], rows)
        # A table has no cheap digest of its cells, and one of the files it was made from.
        return MaskSamples(
            images, masks, classes_of_masks(classes, source), data, str(table._fingerprint)
        )
    told, named = _told(table, classes, names, source)
    return BoxSamples(images, [told[row] for row in rows], classes or named, data)


def _column(table: "datasets.Dataset", usual: Sequence[str], source: str) -> str:
    for name in usual:
        if name in table.features:
            return name
    raise DataError(
        f"{source} has no column called {usual[0]}, only {summary(table.features)}.",
        f"call it {' or '.join(usual)}",
    )


def _samples(
    source: str, table: "datasets.Dataset", column: str, names: Sequence[str], rows: Sequence[int]
) -> HubSamples:
    """The images of a column as stored bytes."""
    import datasets

    if type(table.features[column]).__name__ != "Image":
        raise DataError(f"{source}: the column {column} holds no images.", "give it the type Image")
    packed = PackedNames([names[row].encode() for row in rows])
    # decode=False hands out the stored bytes; decoding is ours, so that errors name the image.
    images = table.select_columns(column).cast_column(column, datasets.Image(decode=False))
    listing = Listing(packed, np.zeros(len(rows), np.int64), ())
    return HubSamples(source, listing, images, np.array(rows, np.int64))


def _told(
    table: "datasets.Dataset", listed: tuple[str, ...] | None, names: Sequence[str], source: str
) -> tuple[list[Told], tuple[str, ...]]:
    """What the column of objects says of every image, and the names of the classes."""
    column = _column(table, OBJECTS, source)
    classes = _class_names(table.features[column]) or listed
    if classes is None:
        raise DataError(
            f"{source} does not name its classes.",
            "set data.classes to a file with one name per line, in the order of their numbers",
        )
    sides = [side for side in ("height", "width") if side in table.features]
    told = []
    for name, row in zip(names, table.select_columns([column, *sides]), strict=True):
        try:
            size = (int(row["height"]), int(row["width"])) if len(sides) == 2 else None
            told.append(
                Told(name, size, [_object(one, classes) for one in _each(row[column])], name)
            )
        except (LookupError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(
                f"{source}: {name}, {column}: {shortened(one_line(reason))}.",
                "give every object bbox (x, y, width, height) and category",
            ) from error
    return told, classes


def _class_names(feature: Any) -> tuple[str, ...] | None:
    """The names of the ClassLabel somewhere inside a feature."""
    if type(feature).__name__ == "ClassLabel":
        return tuple(feature.names)
    inner = getattr(feature, "feature", feature)
    inside = inner.values() if isinstance(inner, dict) else [inner] if inner is not feature else []
    return next(filter(None, map(_class_names, inside)), None)


def _each(objects: Any) -> list[dict[str, Any]]:
    """Objects one by one, from a list of them or from lists of their parts."""
    if isinstance(objects, dict):
        keys = objects.keys()
        return [dict(zip(keys, each, strict=True)) for each in zip(*objects.values(), strict=True)]
    return list(objects or ())


def _object(one: dict[str, Any], classes: tuple[str, ...]) -> Object:
    x, y, width, height = map(float, one[BBOX])
    key = next((key for key in CATEGORIES if key in one), CATEGORIES[0])
    category = one[key]
    if not isinstance(category, str):
        if not 0 <= category < len(classes):
            raise ValueError(f"there is no class {category}, they count from 0")
        category = classes[category]
    crowd = any(bool(one.get(key)) for key in CROWDS)
    return Object(category, (x, y, x + width, y + height), crowd)
