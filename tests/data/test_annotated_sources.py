"""Masks and boxes from every layout, and every way in which a source can be wrong."""

import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from care_compress.data.annotations import IGNORED
from care_compress.data.sources import open_annotated
from care_compress.errors import BadImageError, DataError
from care_compress.recipe.sections import DataSection

SHARED = Path(__file__).parents[3] / "shared" / "data"
CAMVID, BCCD = SHARED / "camvid-segmentation.zip", SHARED / "bccd-detection.zip"

Files = dict[str, bytes]
WIDTH, HEIGHT = 8, 6


def photo(value: int, form: str = "JPEG", size: tuple[int, int] = (WIDTH, HEIGHT)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, form)
    return buffer.getvalue()


def mask_file(array, mode: str | None = None, form: str = "PNG") -> bytes:
    image = Image.fromarray(np.asarray(array))
    if mode == "P":
        image.putpalette([value for index in range(256) for value in (index, 0, 255 - index)])
    buffer = io.BytesIO()
    (image.convert(mode) if mode in ("1", "RGB") else image).save(buffer, form)
    return buffer.getvalue()


def indices(value: int, other: int | None = None) -> np.ndarray:
    """A mask of one index, with another in its last pixel."""
    array = np.full((HEIGHT, WIDTH), value, np.uint8)
    if other is not None:
        array[-1, -1] = other
    return array


def voc(*objects: tuple, size=(WIDTH, HEIGHT)) -> bytes:
    """An annotation of (name, xmin, ymin, xmax, ymax) with or without a sixth, `difficult`."""
    text = "<annotation>"
    if size:
        text += f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    for name, *numbers in objects:
        named = zip(("xmin", "ymin", "xmax", "ymax"), numbers, strict=False)
        corners = "".join(f"<{tag}>{number}</{tag}>" for tag, number in named)
        hard = f"<difficult>{numbers[4]}</difficult>" if len(numbers) > 4 else ""
        text += f"<object><name>{name}</name>{hard}<bndbox>{corners}</bndbox></object>"
    return (text + "</annotation>").encode()


def coco(told_of: dict[str, list[tuple]], **extra) -> bytes:
    """A file of images by name with (category id, x, y, width, height, iscrowd)."""
    listed, told = [], []
    for key, (name, objects) in enumerate(told_of.items(), 10):
        listed.append({"id": key, "file_name": name, "width": WIDTH, "height": HEIGHT})
        for category, *box, crowd in objects:
            one = {"image_id": key, "category_id": category, "bbox": box, "iscrowd": crowd}
            told.append(one)
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "owl"}]
    content = {"images": listed, "annotations": told, "categories": categories}
    return json.dumps(content | extra).encode()


@pytest.fixture(params=["folder", "zip", "zip with a top folder"])
def write(request, tmp_path):
    """Writes files as a folder or as a zip."""

    def writer(files: Files) -> Path:
        if request.param == "folder":
            return to_folder(tmp_path / "set", files)
        top = "all of it/" if "top" in request.param else ""
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(top + name, content)
        return path

    return writer


def to_folder(root: Path, files: Files) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def section(source, **values) -> DataSection:
    return DataSection(source=str(source), **values)


def masks_of(source, split="val", **values):
    return open_annotated(section(source, **values), split, "masks")


def boxes_of(source, split="val", **values):
    return open_annotated(section(source, **values), split, "boxes")


def error_of(opener, source, split="val", **values) -> str:
    with pytest.raises(DataError) as caught:
        opener(source, split, **values)
    message = str(caught.value)
    assert "Fix: " in message and "\n" not in message
    return message


MASKS: Files = {
    "classes.txt": b"sky\nroad\ncar\n",
    "images/train/a.jpg": photo(10),
    "annotations/train/a.png": mask_file(indices(0, 2)),
    "images/train/deep/b.PNG": photo(20, "PNG"),
    "annotations/train/deep/b.png": mask_file(indices(1, 255), "P"),
    "images/val/c.jpg": photo(30),
    "annotations/val/c.png": mask_file(indices(2)),
}


def test_masks_of_a_folder_or_zip(write):
    source = write(MASKS)
    train, val = masks_of(source, "train"), masks_of(source)
    assert train.classes == val.classes == ("sky", "road", "car")
    assert [train.name(i) for i in range(2)] == ["images/train/a.jpg", "images/train/deep/b.PNG"]
    assert train.labels.tolist() == [0, 0] and train.unlabelled == 0
    np.testing.assert_array_equal(train.annotation(0), indices(0, 2))
    np.testing.assert_array_equal(train.annotation(1), indices(1, IGNORED))
    assert train.annotation(0).dtype == np.uint8
    assert train.image(1).getpixel((0, 0))[0] == 20
    copy = pickle.loads(pickle.dumps(val))
    np.testing.assert_array_equal(copy.annotation(0), indices(2))
    assert copy.fingerprint() == val.fingerprint() != train.fingerprint()


def test_the_layout_of_ade20k(write):
    top = "ADEChallengeData2016/"
    files = {"sceneCategories.txt": b"a x", "objectInfo150.txt": b"Idx Ratio"}
    for name, content in MASKS.items():
        name = name.replace("train", "training").replace("val", "validation")
        files[name] = content
    source = write({top + name: content for name, content in files.items()})
    assert len(masks_of(source, "train")) == 2
    assert masks_of(source).name(0) == "images/validation/c.jpg"


def test_indices_that_count_from_one(write):
    files = MASKS | {"annotations/val/c.png": mask_file(indices(3, 0))}
    files["annotations/train/deep/b.png"] = mask_file(indices(1))
    source = write(files)
    np.testing.assert_array_equal(
        masks_of(source, ignore_index=0).annotation(0), indices(2, IGNORED)
    )
    message = error_of(masks_of, source, ignore_index=None)
    assert "c.png has the index 3; the 3 classes are 0 to 2, none is ignored" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (mask_file(indices(0, 1) * 255, "1"), indices(0, 1)),
        (mask_file(indices(1, 2).astype(np.uint16)), indices(1, 2)),
        (mask_file(indices(2, 1), "P"), indices(2, 1)),
    ],
)
def test_modes_of_masks(tmp_path, content, expected):
    source = to_folder(tmp_path, MASKS | {"annotations/val/c.png": content})
    np.testing.assert_array_equal(masks_of(source).annotation(0), expected)


def test_an_undivided_set_is_divided(write):
    files: Files = {"classes.txt": b"a\nb\n"}
    for number in range(20):
        files[f"images/{number}.jpg"] = photo(number)
        files[f"annotations/{number}.png"] = mask_file(indices(number % 2))
    source = write(files)
    train, val = (masks_of(source, split, val_fraction=0.2) for split in ("train", "val"))
    assert (len(train), len(val)) == (16, 4)
    names = {samples.name(i) for samples in (train, val) for i in range(len(samples))}
    assert len(names) == 20
    number = int(Path(val.name(1)).stem)
    np.testing.assert_array_equal(val.annotation(1), indices(number % 2))
    assert "data.val_fraction" in error_of(masks_of, source)


VOC_MASKS: Files = {
    "VOCdevkit/VOC2012/JPEGImages/a.jpg": photo(1),
    "VOCdevkit/VOC2012/JPEGImages/b.jpg": photo(2),
    "VOCdevkit/VOC2012/SegmentationClass/b.png": mask_file(indices(1), "P"),
    "VOCdevkit/VOC2012/Annotations/a.xml": voc(("dog", 1, 1, 4, 4)),
    "VOCdevkit/VOC2012/Annotations/b.xml": voc(("dog", 1, 1, 4, 5), ("cat", 2, 2, 3, 3)),
    "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt": b"b\n",
    "VOCdevkit/VOC2012/ImageSets/Main/train.txt": b"a\n",
    "VOCdevkit/VOC2012/ImageSets/Main/val.txt": b"b\n",
    "VOCdevkit/VOC2012/classes.txt": b"background\ndog\n",
}


def test_the_layout_of_pascal_voc(write):
    files = dict(VOC_MASKS)
    # Lists of classes have a second column, which names no image.
    files["VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"] = b"b  1\n\n"
    masks = masks_of(write(files), "train")
    assert len(masks) == 1 and masks.name(0) == "JPEGImages/b.jpg"
    del files["VOCdevkit/VOC2012/classes.txt"]
    files["VOCdevkit/VOC2012/Annotations/b.xml"] = voc(("dog", 1, 1, 4, 5))
    source = write(files)
    if source.is_dir():
        (source / "VOCdevkit/VOC2012/classes.txt").unlink()
    boxes = boxes_of(source)
    assert boxes.classes == ("dog",) and boxes.name(0) == "JPEGImages/b.jpg"
    assert boxes.annotation(0).corners.tolist() == [[0, 0, 4, 5]]


BOXES: Files = {
    "images/train/a.jpg": photo(10),
    "annotations/train/a.xml": voc(("owl", 1, 1, 4, 3), ("dog", 2, 2, 8, 6, 1)),
    "images/train/b.jpg": photo(20),
    "images/val/c.jpg": photo(30),
    "annotations/val/c.xml": voc(("owl", 3, 2, 3, 2)),
}


def test_boxes_of_pascal_voc(write):
    source = write(BOXES)
    train, val = boxes_of(source, "train"), boxes_of(source)
    assert train.classes == val.classes == ("dog", "owl")
    found = train.annotation(0)
    # The first and the last pixel, counted from 1.
    assert found.corners.tolist() == [[0, 0, 4, 3], [1, 1, 8, 6]]
    assert found.classes.tolist() == [1, 0] and found.crowd.tolist() == [False, True]
    assert found.size == (HEIGHT, WIDTH) and found.corners.dtype == np.float32
    assert len(train.annotation(1)) == 0 and train.unlabelled == 1 and val.unlabelled == 0
    assert val.annotation(0).corners.tolist() == [[2, 1, 3, 2]], "one pixel is an area"
    assert len(pickle.loads(pickle.dumps(train)).annotation(0)) == 2


def test_a_voc_file_need_not_say_the_size(write):
    files = BOXES | {"annotations/val/c.xml": voc(("owl", 1, 1, 8, 6), size=None)}
    assert boxes_of(write(files)).annotation(0).size == (HEIGHT, WIDTH)


COCO_TRAIN = {"a.jpg": [(7, 0, 0, 4, 3, 0), (3, 1.5, 1, 6.5, 5.0001, 1)], "b.jpg": []}
COCO: Files = {
    "annotations/instances_train2017.json": coco(COCO_TRAIN),
    "annotations/instances_val2017.json": coco({"c.jpg": [(3, 2, 1, 1, 1, 0)]}),
    "annotations/captions_train2017.json": b"{}",
    "train2017/a.jpg": photo(10),
    "train2017/b.jpg": photo(20),
    "train2017/not listed.jpg": photo(21),
    "val2017/c.jpg": photo(30),
}


@pytest.mark.parametrize("layout", ["train2017", "images/train2017", "images/train", "images"])
def test_boxes_of_coco(write, layout):
    files = {
        name.replace("train2017/", f"{layout}/").replace(
            "val2017/", f"{layout.replace('train', 'val')}/"
        ): content
        for name, content in COCO.items()
    }
    source = write(files)
    train, val = boxes_of(source, "train"), boxes_of(source)
    assert train.classes == val.classes == ("owl", "dog"), "by id"
    assert [train.name(i) for i in range(2)] == [f"{layout}/a.jpg", f"{layout}/b.jpg"]
    found = train.annotation(0)
    np.testing.assert_allclose(found.corners, [[0, 0, 4, 3], [1.5, 1, 8, 6]])
    assert found.classes.tolist() == [1, 0] and found.crowd.tolist() == [False, True]
    assert train.unlabelled == 1 and len(train.annotation(1)) == 0
    assert val.annotation(0).corners.tolist() == [[2, 1, 3, 2]]


def test_coco_files_named_after_their_part_alone(write):
    files = {
        "annotations/train.json": COCO["annotations/instances_train2017.json"],
        "annotations/val.json": COCO["annotations/instances_val2017.json"],
        "images/train/a.jpg": photo(1),
        "images/train/b.jpg": photo(2),
        "images/val/c.jpg": photo(3),
    }
    assert boxes_of(write(files)).name(0) == "images/val/c.jpg"


def test_one_coco_file_is_an_undivided_set(write):
    images = {f"{n}.jpg": [(7, 0, 0, 1 + n % 5, 3, 0)] for n in range(10)}
    files = {"annotations/instances_default.json": coco(images)}
    files |= {f"images/{name}": photo(n) for n, name in enumerate(images)}
    val = boxes_of(write(files), val_fraction=0.3)
    assert len(val) == 3
    for index in range(3):
        number = int(Path(val.name(index)).stem)
        assert val.annotation(index).corners.tolist() == [[0, 0, 1 + number % 5, 3]]


def test_lists_of_classes_come_first(write, tmp_path):
    order = tmp_path / "order.txt"
    order.write_text("cat\nowl\ndog\n")
    for files in (BOXES, COCO):
        source = write(files | {"classes.txt": b"owl\ndog\n"})
        assert boxes_of(source, "train").annotation(0).classes.tolist() in ([0, 1], [1, 0])
        assert boxes_of(source, "train").classes == ("owl", "dog")
        assert boxes_of(source, "train", classes=str(order)).classes == ("cat", "owl", "dog")
        break
    source = write(BOXES | {"classes.txt": b"owl\n"})
    message = error_of(boxes_of, source, "train")
    assert "a.xml has classes that the list does not name: dog" in message


def test_a_class_of_validation_alone_is_named(write):
    source = write(BOXES | {"annotations/val/c.xml": voc(("yak", 1, 1, 2, 2))})
    assert "c.xml has classes that the list does not name: yak" in error_of(boxes_of, source)


def digests(samples) -> tuple[str, str]:
    return samples.fingerprint(), samples.content_digest()


def test_changed_annotations_change_the_digests(tmp_path):
    for opener, files, name, other in (
        (masks_of, MASKS, "annotations/val/c.png", mask_file(indices(2, 1))),
        (boxes_of, BOXES, "annotations/val/c.xml", voc(("owl", 3, 2, 4, 2))),
    ):
        source = to_folder(tmp_path / name, files)
        before = digests(opener(source))
        assert digests(opener(source)) == before
        os.utime(source / "images/val/c.jpg", (1, 1))
        touched = digests(opener(source))
        assert touched[0] == before[0] and touched[1] != before[1]
        (source / name).write_bytes(other)
        changed = digests(opener(source))
        assert changed[0] != touched[0] and changed[1] != touched[1]
    assert masks_of(tmp_path / "annotations/val/c.png", ignore_index=None).fingerprint() != (
        masks_of(tmp_path / "annotations/val/c.png").fingerprint()
    )


def test_a_folder_and_a_zip_of_it_are_the_same_set(tmp_path):
    folder = to_folder(tmp_path / "set", MASKS)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, content in MASKS.items():
            archive.writestr(f"top/{name}", content)
    assert masks_of(folder).fingerprint() == masks_of(tmp_path / "set.zip").fingerprint()


LARGE = np.zeros((HEIGHT + 1, WIDTH), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes.txt": None}, "does not name its classes. Fix: write classes.txt"),
        ({"classes.txt": b" \n"}, "classes.txt is empty"),
        ({"classes.txt": b"a\na\n"}, "classes.txt names classes twice: a"),
        ({"classes.txt": b"\xff\xfe\xff"}, "classes.txt is no list of names"),
        ({"annotations/val/c.png": None}, "has no annotations (.png)"),
        ({"images/val/d.jpg": photo(1)}, "has images without a mask: images/val/d.jpg"),
        (
            {"annotations/val/d.png": mask_file(indices(1))},
            "annotations without an image: annotations/val/d.png",
        ),
        ({"images/val/c.png": photo(1, "PNG")}, "has both images/val/c.jpg and images/val/c.png"),
        (
            {"annotations/val/c.png": mask_file(LARGE)},
            "images/val/c.jpg has 8 x 6 pixels and a mask of 8 x 7",
        ),
        (
            {"annotations/val/c.png": mask_file(LARGE.T[:, :HEIGHT])},
            "a mask of 6 x 8. Fix: set data.exif_rotate",
        ),
        (
            {"annotations/val/c.png": mask_file(indices(1, 17))},
            "annotations/val/c.png has the index 17; the 3 classes are 0 to 2, 255 is ignored. "
            "Fix: set data.ignore_index=17",
        ),
        (
            {"annotations/val/c.png": mask_file(np.arange(48, dtype=np.uint8).reshape(6, 8))},
            "has the indices 3, 4, 5, 6, 7 and more",
        ),
        (
            {"annotations/val/c.png": mask_file(indices(1).astype(np.uint16) * 300)},
            "has the index 300",
        ),
        (
            {"annotations/val/c.png": mask_file(indices(1), "RGB")},
            "c.png is a PNG image of mode RGB, not one of indices",
        ),
        (
            {"annotations/val/c.png": mask_file(indices(1), form="JPEG")},
            "c.png is a JPEG image of mode L",
        ),
        ({"annotations/val/c.png": b"nonsense"}, "annotations/val/c.png is no JPEG"),
        ({"annotations/val/c.png": b""}, "annotations/val/c.png is empty"),
        ({"classes.txt": "\n".join(map(str, range(256))).encode()}, "has 256 classes, a mask"),
    ],
)
def test_masks_that_are_wrong(write, changes, message):
    files = {name: content for name, content in (MASKS | changes).items() if content is not None}
    assert message in error_of(masks_of, write(files))


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (voc(("owl", 1, 1, 10, 4)), "object 1 (owl) from (0, 0) to (10, 4) reaches outside the"),
        (voc(("owl", 1, 1, 2, 2), ("dog", -3, 1, 5, 4)), "object 2 (dog) from (-4, 0) to (5, 4)"),
        (voc(("owl", 5, 1, 4, 4)), "(owl) from (4, 0) to (4, 4) has no area"),
        (voc(("owl", 6, 1, 4, 4)), "has no area"),
        (voc(("owl", 1, 1, 2)), "object 1 (owl) has no whole bndbox"),
        (voc(("", 1, 1, 2, 2)), "object 1 has no name"),
        (voc(("owl", 1, 1, "nan", 2)), "nan is no place"),
        (voc(("owl", 1, 1, "two", 2)), "could not convert"),
        (voc(("owl", 1, 1, 2, 2))[:-9], "it is no XML"),
        (b"", "it is no XML"),
        (b"\x00\xff" * 30, "it is no XML"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "cannot be read"),
        (voc(("owl", 1, 1, 2, 2), size=(80, 60)), "8 x 6 pixels and boxes of an image of 80 x 60"),
        (
            b'<!DOCTYPE a [<!ENTITY b "boo"><!ENTITY c "&b;&b;&b;">]><annotation>&c;</annotation>',
            "it has a document type",
        ),
        (
            b'<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]><annotation>&b;</annotation>',
            "it has a document type",
        ),
    ],
)
def test_voc_files_that_are_wrong(write, annotation, message):
    source = write(BOXES | {"annotations/val/c.xml": annotation})
    found = error_of(boxes_of, source)
    assert message in found and "c." in found and "passwd" not in found


@pytest.mark.parametrize("deep", [b"<a>" * 200_000, b"<annotation>" + b"<a>" * 5 + b"</a>" * 5])
def test_voc_files_nested_or_unfinished(tmp_path, deep):
    source = to_folder(tmp_path, BOXES | {"annotations/val/c.xml": deep})
    assert "it is no XML" in error_of(boxes_of, source)


def test_a_box_out_by_a_rounding_is_clipped(write):
    source = write(BOXES | {"annotations/val/c.xml": voc(("owl", 0, 1, 9, 7))})
    assert boxes_of(source).annotation(0).corners.tolist() == [[0, 0, 8, 6]]


def test_annotations_of_images_that_are_not_there(write):
    files = BOXES | {"annotations/val/d.xml": voc()}
    assert "annotations without an image: annotations/val/d.xml" in error_of(boxes_of, write(files))


def test_boxes_without_any_annotation(write):
    files = {name: content for name, content in BOXES.items() if "val/c.xml" not in name}
    assert "has no annotations (.xml)" in error_of(boxes_of, write(files))
    message = error_of(boxes_of, write({"images/val/a.jpg": photo(1)}))
    assert "has no annotations" in message or "has both" in message


VAL = "annotations/instances_val2017.json"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "instances_val2017.json is no COCO file"),
        (b"[]", "it holds no object"),
        (b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe{}", "is no COCO file"),
        (b"{}", "instances_val2017.json, categories: 'categories' is missing"),
        (coco({}, images=3), "images: 'int' object is not iterable"),
        (coco({}, images=[{"id": 1}]), "images[0]: 'file_name' is missing"),
        (coco({}, images=[{"id": 1.5, "file_name": "c.jpg"}]), "images[0]: 1.5 is no whole"),
        (coco({"c.jpg": [(7, 0, 0, 4, "3", 0)]}), "annotations[0]: '3' is no number"),
        (coco({"c.jpg": [(7, 0, 0, 4, 0)]}), "annotations[0]: not enough values"),
        (coco({"c.jpg": [(7, 0, 0, 4, float("nan"), 0)]}), "annotations[0]: nan is no number"),
        (coco({"c.jpg": [(8, 0, 0, 4, 3, 0)]}), "annotations[0]: there is no category 8"),
        (
            coco({"c.jpg": []}, annotations=[{"image_id": 99, "category_id": 7, "bbox": [0] * 4}]),
            "annotations[0]: there is no image 99",
        ),
        (coco({"c.jpg": [(7, 0, 0, 4, 0, 0)]}), "c.jpg: object 1 (dog) from (0, 0) to (4, 0) has"),
        (coco({"c.jpg": [(7, 2, 2, 60, 3, 0)]}), "reaches outside the image of 8 x 6"),
        (coco({"c.jpg": [], "d.jpg": []}), "names images that are not there: d.jpg"),
        (coco({"../val2017/c.jpg": []}), "images that are not there: ../val2017/c.jpg"),
        (coco({"c.jpg": []}, images=[]), "holds no images for this split"),
    ],
)
def test_coco_files_that_are_wrong(write, content, message):
    assert message in error_of(boxes_of, write(COCO | {VAL: content}))


def test_two_coco_files_for_one_part(write):
    source = write(COCO | {"annotations/instances_val2014.json": COCO[VAL]})
    assert "instances_val2014.json and annotations/instances_val2017.json" in error_of(
        boxes_of, source
    )


def test_every_mask_is_looked_at_when_it_is_loaded(tmp_path):
    files: Files = {"classes.txt": b"a\nb\n"}
    for number in range(130):
        files[f"images/val/{number:03d}.jpg"] = photo(number)
        files[f"annotations/val/{number:03d}.png"] = mask_file(indices(0))
    files["annotations/val/003.png"] = mask_file(indices(0, 9))  # between those looked at
    val = masks_of(to_folder(tmp_path, files))
    with pytest.raises(DataError, match=r"annotations/val/003.png has the index 9"):
        val.annotation(3)


def test_undecodable_masks_may_be_skipped(tmp_path):
    files = MASKS | {"images/val/d.jpg": photo(1), "annotations/val/d.png": b"junk"}
    val = masks_of(to_folder(tmp_path, files), skip_bad_images=True)
    with pytest.raises(BadImageError, match=r"annotations/val/d.png is no JPEG"):
        val.annotation(1)


def test_images_whose_size_nobody_knows_may_be_skipped(tmp_path):
    files = BOXES | {
        "images/val/d.jpg": b"junk",
        "annotations/val/d.xml": voc(("owl", 1, 1, 2, 2), size=None),
    }
    source = to_folder(tmp_path, files)
    assert "images/val/d.jpg is no JPEG" in error_of(boxes_of, source)
    assert len(boxes_of(source, skip_bad_images=True)) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "does not exist"),
        ("wds:a.tar", "boxes are not read from wds:"),
        ("given:12", "boxes are not read from given:"),
        ("builtin:shapes", "builtin:shapes has no boxes"),
        ("hf:/nowhere/at/all", "cannot be loaded"),
    ],
)
def test_sources_that_are_none(source, message):
    assert message in error_of(boxes_of, source)


def test_links_and_hidden_files_are_no_annotations(tmp_path):
    root = to_folder(tmp_path / "set", MASKS | {"annotations/val/.c.png": b"junk"})
    os.symlink(root / "images", root / "images" / "val" / "again")
    os.mkfifo(root / "annotations" / "val" / "e.png")
    (root / "images" / "val" / "e.jpg").write_bytes(photo(3))
    assert "e.png cannot be read (it is no regular file" in error_of(masks_of, root)


def hub_set(folder: Path, monkeypatch, features, rows) -> str:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    (folder / "hub").mkdir()
    for part in ("train", "validation"):
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        table.to_parquet(str(folder / "hub" / f"{part}-00000-of-00001.parquet"))
    return f"hf:{folder / 'hub'}"


def test_masks_of_the_hub(tmp_path, monkeypatch):
    import datasets

    rows = {
        "image": [{"bytes": photo(value), "path": None} for value in (1, 2)],
        "annotation": [{"bytes": mask_file(indices(value)), "path": None} for value in (1, 0)],
    }
    features = {"image": datasets.Image(), "annotation": datasets.Image()}
    source = hub_set(tmp_path, monkeypatch, features, rows)
    assert "does not name its classes" in error_of(masks_of, source)
    order = tmp_path / "order.txt"
    order.write_text("a\nb\n")
    val = masks_of(source, classes=str(order))
    assert val.name(1) == "validation/1" and val.classes == ("a", "b")
    np.testing.assert_array_equal(val.annotation(0), indices(1))
    assert val.image(1).getpixel((0, 0))[0] == 2
    order.write_text("a\n")
    message = error_of(masks_of, source, classes=str(order))
    assert "validation/0 (annotation) has the index 1" in message


@pytest.mark.parametrize("nested", ["lists", "objects"])
def test_boxes_of_the_hub(tmp_path, monkeypatch, nested):
    import datasets

    numbers = datasets.Value("float32")
    box = datasets.Sequence(numbers) if nested == "objects" else [numbers]
    one = {"bbox": box, "category": datasets.ClassLabel(names=["owl", "dog"])}
    first = [{"bbox": [0, 0, 4, 3], "category": 1}, {"bbox": [1, 1, 7, 5], "category": 0}]
    if nested == "objects":
        features, objects = [one], [first, []]
    else:
        features = datasets.Sequence(one)
        objects = [
            {key: [each[key] for each in some] for key in ("bbox", "category")}
            for some in (first, [])
        ]
    rows = {
        "image": [{"bytes": photo(value), "path": None} for value in (1, 2)],
        "objects": objects,
    }
    source = hub_set(tmp_path, monkeypatch, {"image": datasets.Image(), "objects": features}, rows)
    val = boxes_of(source)
    assert val.classes == ("owl", "dog") and val.unlabelled == 1
    found = val.annotation(0)
    assert found.corners.tolist() == [[0, 0, 4, 3], [1, 1, 8, 6]]
    assert found.classes.tolist() == [1, 0] and found.size == (HEIGHT, WIDTH)
    assert "no column called annotation" in error_of(masks_of, source)


def test_camvid():
    if not CAMVID.is_file():
        pytest.skip("the CamVid zip is not on this machine")
    train, val = (masks_of(CAMVID, split, ignore_index=11) for split in ("train", "val"))
    assert (len(train), len(val), len(train.classes)) == (367, 101, 11)
    mask = val.annotation(50)
    assert mask.shape == (360, 480) and set(np.unique(mask)) <= {*range(11), IGNORED}
    assert "set data.ignore_index=11" in error_of(masks_of, CAMVID)


def test_bccd():
    if not BCCD.is_file():
        pytest.skip("the BCCD zip is not on this machine")
    train, val = (boxes_of(BCCD, split) for split in ("train", "val"))
    assert (len(train), len(val)) == (205, 87)
    assert train.classes == val.classes == ("Platelets", "RBC", "WBC")
    assert val.annotation(3).size == (480, 640) and val.unlabelled == 0


def test_images_of_a_contest_are_no_part_until_their_answers_are_there(write):
    files = {"images/test/z.jpg": photo(99), "classes.txt": b"sky\n"}
    for number in range(4):
        files[f"images/train/{number}.jpg"] = photo(number)
        files[f"annotations/train/{number}.png"] = mask_file(indices(0))
    train, val = (masks_of(write(files), split, val_fraction=0.5) for split in ("train", "val"))
    assert (len(train), len(val)) == (2, 2)
    files["annotations/test/z.png"] = mask_file(indices(0))
    assert len(masks_of(write(files), "val")) == 1
