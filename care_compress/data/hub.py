"""Hugging Face ``datasets``: a set on the hub, a local directory, or parquet files."""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from care_compress.console import one_line, shortened
from care_compress.data.listing import (
    MOST_BYTES,
    EncodedSamples,
    Listing,
    PackedNames,
    Split,
    choose_part,
    class_order,
    summary,
)
from care_compress.errors import DataError
from care_compress.files import read_whole
from care_compress.recipe.sections import DataSection

if TYPE_CHECKING:
    import datasets

# Which column is taken where several have the right type.
USUAL_NAMES = {"Image": ("image", "img"), "ClassLabel": ("label", "labels")}


class HubSamples(EncodedSamples):
    """Rows of a table whose image column holds encoded files; the table is memory-mapped."""

    def __init__(
        self, source: str, listing: Listing, images: "datasets.Dataset", rows: NDArray[np.int64]
    ) -> None:
        super().__init__(source, listing)
        self._images = images  # the image column alone
        self._rows = rows

    def encoded(self, index: int) -> bytes:
        """The bytes in the table, or of the file it points to."""
        (image,) = self._images[int(self._rows[index])].values()
        if image is not None and image["bytes"] is not None:
            return bytes(image["bytes"])
        if image is not None and image["path"] is not None:
            return read_whole(image["path"], MOST_BYTES)
        raise OSError("the row holds no image")


def open_hub(reference: str, data: DataSection, split: Split) -> HubSamples:
    """One split of NAME, NAME:CONFIG, a directory, or parquet files (a path or a pattern)."""
    return hub_samples(load_tables(reference), data, split, f"hf:{reference}")


def load_tables(reference: str) -> "datasets.DatasetDict":
    """The tables of what `open_hub` names; DataError if they cannot be loaded."""
    import datasets  # imports for a second, so only where needed

    source = f"hf:{reference}"
    tables: datasets.DatasetDict
    try:
        # A set is data: `datasets` runs no code of one since version 4, whatever its revision.
        if os.path.isdir(reference):
            tables = datasets.load_dataset(reference)  # nosec B615 # local
        elif reference.endswith(".parquet"):
            tables = datasets.load_dataset("parquet", data_files=reference)  # nosec B615 # local
        else:
            name, _, config = reference.partition(":")
            tables = datasets.load_dataset(name, config or None)  # nosec B615 # the user's choice
    # It looks for files before it looks at what it was given: an empty name is an IndexError.
    except (
        OSError, ValueError, RuntimeError, LookupError, datasets.exceptions.DatasetsError,
    ) as error:  # fmt: skip
        reason = shortened(one_line(str(error)) or type(error).__name__)
        raise DataError(
            f"{source} cannot be loaded ({reason}).",
            "check the name; without a network, use a local directory or .parquet files",
        ) from error
    return tables


def hub_samples(
    tables: "Mapping[str, datasets.Dataset]", data: DataSection, split: Split, source: str
) -> HubSamples:
    """One split of these tables, by the names of their parts."""
    import datasets

    part = choose_part(tables.keys(), split, data, source)
    if part.name is None:
        raise DataError(
            f"{source} has no train part to divide, only {summary(tables)}.",
            "name the part to divide train",
        )
    table = tables[part.name]
    image, label = _column(table, "Image", source), _column(table, "ClassLabel", source)
    names = table.features[label].names
    classes = class_order(names, data, source)
    stored = np.asarray(table.with_format("numpy")[label][:], np.int64)
    if (stored < 0).any():
        raise DataError(f"{source} has images without a label.", "use a source with labels for all")
    whole = Listing(
        PackedNames([f"{part.name}/{row}".encode() for row in range(len(table))]),
        np.array([classes.index(name) for name in names], np.int64)[stored],
        classes,
    )
    # decode=False hands out the stored bytes; decoding is ours, so that errors name the image.
    images = table.select_columns(image).cast_column(image, datasets.Image(decode=False))
    rows = part.rows(whole)
    return HubSamples(source, whole.take(rows), images, rows)


def _column(table: "datasets.Dataset", kind: str, source: str) -> str:
    """The column of feature type `kind`; among several the one with the usual name."""
    types: dict[str, str] = {
        name: type(feature).__name__ for name, feature in table.features.items()
    }
    fitting = [name for name, found in types.items() if found == kind]
    usual = [name for name in fitting if name in USUAL_NAMES[kind]]
    if len(usual or fitting) == 1:
        return (usual or fitting)[0]
    columns = ", ".join(f"{name} ({found})" for name, found in types.items())
    raise DataError(
        f"{source} has {len(fitting)} columns of type {kind}, one is needed; it has {columns}.",
        f"give one column the type {kind}, or one of them the name {USUAL_NAMES[kind][0]}",
    )
