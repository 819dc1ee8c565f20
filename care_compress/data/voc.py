"""Pascal VOC: one XML file per image.

A file from a stranger may define entities that grow to gigabytes or name other files. They need a
document type, and no annotation has one: the parser stops where it begins.
"""

import math
from xml.etree.ElementTree import Element, TreeBuilder  # nosec B405 # see `parse_xml`
from xml.parsers import expat  # nosec B407

from care_compress.console import one_line, shortened
from care_compress.data.boxes import BoxSamples, Object, Told
from care_compress.data.layout import ARRANGE, Named, check_part, find_parts, rows_of
from care_compress.data.listing import Split, choose_part
from care_compress.data.tree import Tree
from care_compress.errors import DataError
from care_compress.recipe.sections import DataSection

MOST_XML_BYTES = 1 << 24
CORNERS = ("xmin", "ymin", "xmax", "ymax")


def open_voc(tree: Tree, data: DataSection, split: Split) -> BoxSamples:
    """One split of images and .xml files under one name."""
    parts = find_parts(tree, "boxes")
    part = choose_part(parts.keys() - {""}, split, data, tree.source)
    named = parts.get(part.name or "")
    if named is None:
        raise DataError(f"{tree.source} has no images to divide.", ARRANGE["boxes"])
    check_part(named, tree.source, "boxes")
    told = _told(tree, named)
    classes = tree.classes(data)
    if classes is None:
        # Both splits number the classes of the training images.
        named_by = parts.get("train", named)
        of_train = told if named_by is named else _told(tree, named_by)
        classes = tuple(sorted({each.name for one in of_train for each in one.objects}))
        if not classes:
            raise DataError(f"{tree.source} has no objects to learn from.", "annotate images")
    rows = rows_of(part, [one.image for one in told], tree.source, "boxes")
    chosen = [told[row] for row in rows]
    return BoxSamples(tree.files([one.image for one in chosen]), chosen, classes, data)


def _told(tree: Tree, named: Named) -> list[Told]:
    """What the files of a part say; an image without a file has no objects."""
    stems = sorted(named.images)
    written = [stem for stem in stems if stem in named.annotations]
    found: dict[str, Told] = {}
    if written:
        files = tree.files([named.annotations[stem] for stem in written])
        for index, stem in enumerate(written):
            where = named.annotations[stem]
            try:
                root = parse_xml(files.encoded(index))
                found[stem] = _annotation(root, named.images[stem], where)
            except (OSError, ValueError) as error:
                raise DataError(
                    f"{tree.source}: {where} cannot be read ({shortened(one_line(str(error)))}).",
                    "write it as Pascal VOC does: object, name, bndbox, xmin ymin xmax ymax",
                ) from error
    return [
        found.get(stem) or Told(named.images[stem], None, (), named.images[stem]) for stem in stems
    ]


def parse_xml(content: bytes) -> Element:
    """The root of a document; ValueError if it is none, or brings definitions of its own."""

    def refuse(*_: object) -> None:
        raise ValueError("it has a document type, which no annotation needs")

    if len(content) > MOST_XML_BYTES:
        raise ValueError(f"it has {len(content):,} bytes, more than {MOST_XML_BYTES:,}")
    builder = TreeBuilder()
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(content, True)
    # An encoding that Python does not know is a LookupError.
    except (expat.ExpatError, LookupError) as error:
        raise ValueError(f"it is no XML: {error}") from error
    return builder.close()


def _annotation(root: Element, image: str, where: str) -> Told:
    """The size and the objects that a document describes; ValueError where one is incomplete."""
    size = None
    width, height = (root.findtext(f"size/{side}", "0") for side in ("width", "height"))
    if (sides := (_number(height), _number(width))) and min(sides) >= 1:
        size = (int(sides[0]), int(sides[1]))
    objects = []
    for count, each in enumerate(root.findall("object"), 1):
        name = each.findtext("name", "").strip()
        if not name:
            raise ValueError(f"object {count} has no name")
        texts = [each.findtext(f"bndbox/{corner}") for corner in CORNERS]
        if None in texts:
            raise ValueError(f"object {count} ({name}) has no whole bndbox")
        x1, y1, x2, y2 = (_number(text or "") for text in texts)
        # The first and the last pixel, counted from 1: one of them is one pixel wide.
        corners = (x1 - 1, y1 - 1, x2, y2)
        objects.append(Object(name, corners, each.findtext("difficult", "0").strip() == "1"))
    return Told(image, size, objects, where)


def _number(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text.strip()} is no place")
    return number
