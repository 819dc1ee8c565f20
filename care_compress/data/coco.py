"""COCO: one JSON file for all images of a part.

The images of the set are those that the file names; one without an annotation has no objects.
"""

import json
import math
import re
from typing import Any

from care_compress.console import one_line, shortened
from care_compress.data.boxes import BoxSamples, Object, Told
from care_compress.data.layout import ARRANGE, PARTS, rows_of
from care_compress.data.listing import Split, choose_part, summary
from care_compress.data.tree import Tree
from care_compress.errors import DataError
from care_compress.recipe.sections import DataSection

# annotations/instances_train2017.json or annotations/train.json; of others the part is unknown.
JSON = re.compile(r"annotations/(?:instances_)?((train|val|test)[^/]*)\.json")
FIX = (
    "write images (id, file_name, width, height), annotations (image_id, category_id, bbox) and "
    "categories (id, name), as COCO does"
)


def find_json(tree: Tree) -> dict[str, str]:
    """The annotation file of every part by name; '' is of an undivided set."""
    files = [name for name in tree.names if re.fullmatch(r"annotations/[^/]*\.json", name)]
    found: dict[str, str] = {}
    for name in files:
        if (match := JSON.fullmatch(name)) is None:
            continue
        part = match[2]
        if part in found:
            raise DataError(
                f"{tree.source} has {found[part]} and {name} for one part.", "keep one of them"
            )
        found[part] = name
    if not found and len(files) == 1:
        return {"": files[0]}
    return found


def open_coco(tree: Tree, files: dict[str, str], data: DataSection, split: Split) -> BoxSamples:
    """One split of what `find_json` found."""
    part = choose_part(files.keys() - {""}, split, data, tree.source)
    name = files.get(part.name or "")
    if name is None:
        raise DataError(f"{tree.source} has no images to divide.", ARRANGE["boxes"])
    categories, told = _read(tree, name)
    classes = tree.classes(data)
    if classes is None:
        # Both splits number the classes of the training images.
        train = files.get("train", name)
        named = categories if train == name else _categories(tree, train, _json(tree, train))
        classes = tuple(dict.fromkeys(named[key] for key in sorted(named)))
        if not classes:
            raise DataError(f"{tree.source}: {train} has no categories.", FIX)
    rows = rows_of(part, [one.image for one in told], tree.source, "boxes")
    chosen = [told[row] for row in rows]
    return BoxSamples(tree.files([one.image for one in chosen]), chosen, classes, data)


def _json(tree: Tree, name: str) -> dict[str, Any]:
    try:
        value = json.loads(tree.read(name))
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else one_line(str(error))
        raise DataError(
            f"{tree.source}: {name} is no COCO file ({shortened(reason)}).", FIX
        ) from error
    return value


def _categories(tree: Tree, name: str, content: dict[str, Any]) -> dict[int, str]:
    """Names by id."""
    try:
        return {_whole(one["id"]): str(one["name"]) for one in content["categories"]}
    except (LookupError, TypeError, ValueError) as error:
        raise _incomplete(tree, f"{name}, categories", error) from error


def _read(tree: Tree, name: str) -> tuple[dict[int, str], list[Told]]:
    """The categories and what is said of every image, in the order of its name."""
    content = _json(tree, name)
    categories = _categories(tree, name, content)
    objects: dict[int, list[Object]] = {}
    files: dict[int, tuple[str, tuple[int, int] | None]] = {}
    at = "images"
    try:
        for count, one in enumerate(content["images"]):
            at = f"images[{count}]"
            height, width = (_whole(one.get(side) or 0) for side in ("height", "width"))
            size = (height, width) if min(height, width) >= 1 else None
            key = _whole(one["id"])
            if key in files:
                raise ValueError(f"the id {key} is there twice")
            files[key] = (str(one["file_name"]), size)
            objects[key] = []
        at = "annotations"
        for count, one in enumerate(content["annotations"]):
            at = f"annotations[{count}]"
            x, y, w, h = map(_number, one["bbox"])
            category, image = _whole(one["category_id"]), _whole(one["image_id"])
            if category not in categories:
                raise ValueError(f"there is no category {category}")
            if image not in objects:
                raise ValueError(f"there is no image {image}")
            corners = (x, y, x + w, y + h)
            crowd = bool(one.get("iscrowd", 0))
            objects[image].append(Object(categories[category], corners, crowd))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _incomplete(tree, f"{name}, {at}", error) from error
    places = _places(tree, name, [file for file, _ in files.values()])
    told = [
        Told(places[file], size, objects[key], f"{name}, {file}")
        for key, (file, size) in files.items()
    ]
    if len({one.image for one in told}) != len(told):
        raise DataError(f"{tree.source}: {name} names an image twice.", "give it one entry")
    return categories, sorted(told, key=lambda one: one.image)


def _incomplete(tree: Tree, where: str, error: Exception) -> DataError:
    missing = f"{error} is missing" if isinstance(error, KeyError) else str(error)
    return DataError(f"{tree.source}: {where}: {shortened(one_line(missing))}.", FIX)


def _places(tree: Tree, name: str, files: list[str]) -> dict[str, str]:
    """Where in the tree the images are that a file names; DataError if some are nowhere."""
    match = JSON.fullmatch(name)
    tag, part = (match[1], match[2]) if match else ("", "")
    folders = [tag, *(alias for alias, meant in PARTS.items() if meant == part)]
    # train2017/ beside annotations/train.json
    tops = {each.split("/", 1)[0] for each in tree.names if "/" in each}
    folders += sorted(top for top in tops if part and top.startswith(part))
    candidates = [f"{above}{folder}/" for folder in folders if folder for above in ("images/", "")]
    there = set(tree.names)
    best: list[str] = files
    where = ""
    for folder in dict.fromkeys([*candidates, "images/", ""]):
        missing = [file for file in files if folder + file not in there]
        if len(missing) < len(best):
            best, where = missing, folder
    if best:
        raise DataError(
            f"{tree.source}: {name} names images that are not there: {summary(best)}.",
            "put them into images/train/ and images/val/, or train2017/ and val2017/",
        )
    return {file: where + file for file in files}


def _whole(value: object) -> int:
    # True is an int to Python.
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise ValueError(f"{value!r} is no whole number")
    return value


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is no number")
    return float(value)
