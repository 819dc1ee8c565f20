import io
import json
import os
import pickle
import shutil
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from care_compress.data.sources import check_classes, open_samples
from care_compress.errors import BadImageError, DataError
from care_compress.recipe.sections import DataSection

CIFAR = Path(__file__).parents[3] / "shared" / "data" / "cifar10-imagefolder.zip"


def encoded(value: int, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (value, value, value)).save(buffer, form)
    return buffer.getvalue()


def value_of(samples, index: int) -> int:
    return samples.image(index).getpixel((0, 0))[0]


def section(source, **values) -> DataSection:
    return DataSection(source=str(source), **values)


FILES = {
    "train/dog/b.png": 1,
    "train/dog/a.PNG": 2,
    "train/cat/deep/er/c.png": 3,
    "val/cat/x.png": 4,
    "val/eel/y.png": 5,
}
IGNORED = ["train/dog/.hidden.png", "train/dog/notes.txt", "train/.git/x.png", "__MACOSX/cat/a.png"]


def with_ignored(files: dict[str, int]) -> list[str]:
    return [*files, *(IGNORED if files is FILES else [])]


def write_folder(root: Path, files: dict[str, int]) -> Path:
    for name in with_ignored(files):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(files[name]) if name in files else b"junk")
    return root


def write_zip(
    path: Path, files: dict[str, int], top: str = "", method: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in files if top else with_ignored(files):
            archive.writestr(top + name, encoded(files[name]) if name in files else b"junk")
    return path


@pytest.fixture(params=["folder", "stored", "deflated", "zip with a top folder"])
def tree(request, tmp_path):
    """Writes the same files as a folder or as one of three zips."""

    def write(files: dict[str, int]) -> Path:
        if request.param == "folder":
            return write_folder(tmp_path / "images", files)
        if request.param == "stored":
            return write_zip(tmp_path / "images.zip", files)
        if request.param == "deflated":
            return write_zip(tmp_path / "images.zip", files, method=zipfile.ZIP_DEFLATED)
        return write_zip(tmp_path / "images.ZIP", files, top="all of it/")

    return write


def test_both_parts_number_the_classes_of_the_whole(tree):
    source = tree(FILES)
    train = open_samples(section(source), "train")
    val = open_samples(section(source), "val")
    assert train.classes == val.classes == ("cat", "dog", "eel")
    names = ["train/cat/deep/er/c.png", "train/dog/a.PNG", "train/dog/b.png"]
    assert [train.name(i) for i in range(len(train))] == names
    assert train.labels.tolist() == [0, 1, 1] and val.labels.tolist() == [0, 2]
    assert train.labels.dtype == np.int64
    assert [value_of(train, i) for i in range(3)] == [3, 2, 1]
    assert [value_of(val, i) for i in range(2)] == [4, 5]
    assert not train.in_memory
    with pytest.raises(IndexError):
        val.name(2)


def test_samples_survive_pickling(tree):
    samples = open_samples(section(tree(FILES)), "train")
    copy = pickle.loads(pickle.dumps(samples))
    assert copy.fingerprint() == samples.fingerprint() and copy.classes == samples.classes
    assert [value_of(copy, i) for i in range(3)] == [3, 2, 1]


def test_a_folder_and_a_zip_of_it_are_the_same_set(tmp_path):
    folder = open_samples(section(write_folder(tmp_path / "a", FILES)), "train")
    same = open_samples(section(write_zip(tmp_path / "a.zip", FILES, "top/")), "train")
    other = open_samples(section(tmp_path / "a.zip"), "val")
    assert folder.fingerprint() == same.fingerprint() != other.fingerprint()


def test_a_class_folder_without_images_is_a_class_everywhere(tmp_path):
    """Who unpacks a set in part keeps the numbers of its classes, zipped or not."""
    folder = write_folder(tmp_path / "images", {"val/cat/x.png": 1, "val/eel/y.png": 2})
    (folder / "val" / "dog" / "deep").mkdir(parents=True)
    (folder / "val" / ".hidden").mkdir()
    packed = {}
    for name, root, base in (("plain", folder, "."), ("top", tmp_path, folder.name)):
        packed[name] = shutil.make_archive(str(tmp_path / "zips" / name), "zip", root, base)
    for source in (folder, *packed.values()):
        val = open_samples(section(source), "val")
        assert val.classes == ("cat", "dog", "eel"), source
        assert val.labels.tolist() == [0, 2]


def test_an_undivided_zip_counts_its_empty_folders(tmp_path):
    folder = write_folder(tmp_path / "images", {f"a/{n}.png": n for n in range(4)})
    (folder / "b").mkdir()
    packed = shutil.make_archive(str(tmp_path / "set"), "zip", folder)
    for source in (folder, packed):
        data = section(source, val_fraction=0.5)
        assert open_samples(data, "val").classes == ("a", "b")


def test_part_may_be_called_validation(tree):
    source = tree({name.replace("val", "validation"): v for name, v in FILES.items()})
    assert open_samples(section(source), "val").name(0) == "validation/cat/x.png"


UNDIVIDED = {
    f"{c}/{n:02d}.png": n for c, count in (("a", 40), ("b", 10), ("c", 1)) for n in range(count)
}


def test_undivided_set_is_divided_by_class_and_for_good(tree):
    source = tree(UNDIVIDED)
    data = section(source, val_fraction=0.2)
    train, val = open_samples(data, "train"), open_samples(data, "val")
    names = [{samples.name(i) for i in range(len(samples))} for samples in (train, val)]
    assert names[0] | names[1] == set(UNDIVIDED) and not names[0] & names[1]
    assert np.bincount(val.labels, minlength=3).tolist() == [8, 2, 0]
    assert val.fingerprint() == open_samples(data, "val").fingerprint()
    assert [value_of(val, i) for i in range(10)] == [UNDIVIDED[val.name(i)] for i in range(10)]


def test_train_part_alone_can_be_divided(tree):
    source = tree({f"train/{name}": n for name, n in UNDIVIDED.items()})
    assert len(open_samples(section(source, val_fraction=0.2), "val")) == 10


def error_of(data: DataSection, split="val") -> str:
    with pytest.raises(DataError) as caught:
        open_samples(data, split)
    assert "Fix: " in str(caught.value)
    return str(caught.value)


def test_missing_parts_are_named(tree):
    source = tree(UNDIVIDED)
    assert "no val part, only one undivided set" in error_of(section(source))
    assert "val_fraction" in error_of(section(source))


def test_missing_train_part_is_named(tree):
    source = tree({"val/cat/a.png": 1, "val/dog/a.png": 1})
    assert "no train part, only val" in error_of(section(source), "train")
    assert "has a val part" in error_of(section(source, val_fraction=0.5), "val")


def test_class_file_fixes_the_order_and_may_name_more(tree, tmp_path):
    order = tmp_path / "order.txt"
    order.write_text("eel\nant\n\ndog\ncat\n")
    samples = open_samples(section(tree(FILES), classes=str(order)), "train")
    assert samples.classes == ("eel", "ant", "dog", "cat")
    assert samples.labels.tolist() == [2, 2, 3]
    assert [samples.classes[label] for label in samples.labels] == ["dog", "dog", "cat"]
    assert [value_of(samples, i) for i in range(3)] == [2, 1, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [("cat\ndog\n", "eel"), ("", "is empty"), ("cat\ncat\n", "twice"), (None, "cannot be read")],
)
def test_class_file_that_does_not_fit(tmp_path, content, message):
    order = tmp_path / "order.txt"
    if content is not None:
        order.write_text(content)
    source = write_folder(tmp_path / "images", FILES)
    assert message in error_of(section(source, classes=str(order)))


def test_linked_folders_are_followed_once(tmp_path):
    elsewhere = write_folder(tmp_path / "elsewhere", {"a.png": 1, "b.png": 2})
    root = write_folder(tmp_path / "images", FILES)
    os.symlink(elsewhere, root / "val" / "bat")
    os.symlink(root / "val" / "cat", root / "val" / "cat" / "again")
    samples = open_samples(section(root), "val")
    assert samples.classes == ("bat", "cat", "dog", "eel")
    assert samples.labels.tolist() == [0, 0, 1, 3]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "does not exist"),
        ("builtin:forms", "builtin:shapes"),
        ("s3:bucket", "no data source"),
        ("wds:https://host/a-{0..3}.tar", "mount or download"),
        ("wds:pipe:cat a.tar", "mount or download"),
        ("wds:/nowhere/train-{0.tar", "no shard pattern"),
        ("wds:/nowhere/${UNSET}.tar", "no shard pattern"),
        ("wds:/nowhere/train-{000..001}.tar", "/nowhere/train-000.tar"),
        ("hf:/nowhere/at/all", "cannot be loaded"),
    ],
)
def test_sources_that_are_none(source, message):
    assert message in error_of(section(source))


def test_builtin_has_its_own_parts():
    assert "val_fraction" in error_of(section("builtin:shapes", val_fraction=0.1))
    assert open_samples(section("builtin:shapes"), "val").in_memory


def test_empty_places_are_named(tmp_path):
    assert "no folders with images" in error_of(section(tmp_path))
    (tmp_path / "val" / "cat").mkdir(parents=True)
    assert "holds no images" in error_of(section(tmp_path))
    empty = write_zip(tmp_path / "empty.zip", {})
    assert "no folders with images" in error_of(section(empty))
    (tmp_path / "broken.zip").write_bytes(b"PK nothing")
    assert "cannot be read as a zip" in error_of(section(tmp_path / "broken.zip"))
    (tmp_path / "file.txt").write_text("")
    assert "is no data source" in error_of(section(tmp_path / "file.txt"))


def test_zip_entries_we_do_not_unpack(tmp_path):
    source = write_zip(tmp_path / "a.zip", FILES, method=zipfile.ZIP_LZMA)
    assert "deflate" in error_of(section(source))
    content = bytearray(write_zip(tmp_path / "b.zip", FILES).read_bytes())
    directory = content.index(b"PK\x01\x02")
    while directory >= 0:
        content[directory + 8] |= 1  # the flag of an encrypted entry
        directory = content.find(b"PK\x01\x02", directory + 1)
    (tmp_path / "b.zip").write_bytes(content)
    assert "encrypted" in error_of(section(tmp_path / "b.zip"))


def test_damage_inside_a_zip_is_noticed(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"val/cat/a.png": 1})
    samples = open_samples(section(path), "val")
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 255
    path.write_bytes(content)
    with pytest.raises(BadImageError, match="a.zip: val/cat/a.png .*checksum"):
        samples.image(0)


def bomb() -> bytes:
    content = bytearray(encoded(0))
    content[16:24] = (60_000).to_bytes(4, "big") * 2  # width and height in the PNG header
    header = bytes(content[12:29])
    content[29:33] = zipfile.crc32(header).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"hello", "no JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no JPEG"),
        (encoded(9, "JPEG")[:-5], "truncated"),
        (encoded(9, "PNG")[:50], "not decodable"),
        (bomb(), "bomb"),
    ],
)
def test_bad_images_are_named(tmp_path, content, reason):
    path = tmp_path / "images" / "val" / "cat" / "bad.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    samples = open_samples(section(tmp_path / "images"), "val")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImageError, match=reason) as caught:
            samples.image(0)
    assert "images: val/cat/bad.png" in str(caught.value)


def test_a_file_that_vanished_is_a_bad_image(tmp_path):
    samples = open_samples(section(write_folder(tmp_path / "images", FILES)), "val")
    (tmp_path / "images" / "val" / "cat" / "x.png").unlink()
    with pytest.raises(BadImageError, match="x.png cannot be read"):
        samples.image(0)


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture
def shards(tmp_path):
    """Two training shards, one for validation; labels as text, as JSON number and JSON object."""
    root = tmp_path / "shards"
    long = "long/" * 30 + "name"  # needs a tar header of its own
    write_tar(root / "train-000.tar", {"a.png": encoded(1), "a.cls": b"1\n", "a.txt": b"hi"})
    json_label = json.dumps({"label": 2}).encode()
    members = {f"{long}.json": json_label, f"{long}.JPG": encoded(2), "b.cls": b"0"}
    write_tar(root / "train-001.tar", members | {"c.webp": encoded(3, "WEBP"), "c.cls": b"0"})
    write_tar(root / "val-000.tar", {"d.jpeg": encoded(4, "JPEG"), "d.json": b"1"})
    return root


@pytest.mark.parametrize("pattern", ["", "/train-{000..001}.tar", "/{train,val}-*.tar", "/*.tar"])
def test_shards_give_random_access(shards, pattern):
    samples = open_samples(section(f"wds:{shards}{pattern}"), "train")
    assert samples.labels.tolist() == [1, 2, 0] and samples.classes == ("0", "1", "2")
    assert samples.name(0) == "train-000.tar/a.png"
    copy = pickle.loads(pickle.dumps(samples))
    assert [value_of(copy, index) for index in (2, 0, 1)] == [3, 1, 2]


def test_shards_of_one_part_do_not_stand_for_the_other(shards):
    assert "no val part, only train" in error_of(section(f"wds:{shards}/train-*.tar"))
    data = section(f"wds:{shards}/train-*.tar", val_fraction=0.5)
    assert len(open_samples(data, "train")) == 3  # one image per class: none can validate
    assert value_of(open_samples(section(f"wds:{shards}"), "val"), 0) == 4


def test_names_of_shard_classes(shards, tmp_path):
    (shards / "classes.txt").write_text("x\ny\nz\n")
    assert open_samples(section(f"wds:{shards}"), "val").classes == ("x", "y", "z")
    order = tmp_path / "order.txt"
    order.write_text("p\nq\n")
    data = section(f"wds:{shards}", classes=str(order))
    assert open_samples(data, "val").classes == ("p", "q")
    assert "labels from 0 to 2" in error_of(data, "train")


@pytest.mark.parametrize("label", [{}, {"a.cls": b"cat"}, {"a.json": b'{"text": 1}'}])
def test_shard_samples_without_a_label(tmp_path, label):
    write_tar(tmp_path / "val-0.tar", {"a.png": encoded(1), **label})
    assert "a.png has no label" in error_of(section(f"wds:{tmp_path}"))


def test_shards_that_cannot_be_read(tmp_path):
    (tmp_path / "val-0.tar").write_bytes(b"\x1f\x8b compressed, or whatever it is" * 99)
    assert "val-0.tar cannot be read as a tar" in error_of(section(f"wds:{tmp_path}"))
    write_tar(tmp_path / "val-0.tar", {"a.txt": b""})
    assert "holds no images" in error_of(section(f"wds:{tmp_path}"))
    (tmp_path / "empty").mkdir()
    assert "no .tar files" in error_of(section(f"wds:{tmp_path / 'empty'}"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set as the hub stores it: parquet files with encoded images."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["dog", "cat"]), "picture": datasets.Image()}
    )
    for part, values in {"train": [10, 11, 12, 13], "validation": [20, 21]}.items():
        rows = {
            "label": [value % 2 for value in values],
            "picture": [{"bytes": encoded(value), "path": None} for value in values],
        }
        table = datasets.Dataset.from_dict(rows, features=features)
        (tmp_path / "hub").mkdir(exist_ok=True)
        table.to_parquet(str(tmp_path / "hub" / f"{part}-00000-of-00001.parquet"))
    return tmp_path / "hub"


def test_hub_directory(hub, tmp_path):
    train = open_samples(section(f"hf:{hub}"), "train")
    val = open_samples(section(f"hf:{hub}"), "val")
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [1, 0, 1, 0] and val.labels.tolist() == [1, 0]
    copy = pickle.loads(pickle.dumps(val))
    assert [value_of(copy, i) for i in (1, 0)] == [21, 20]
    assert val.name(1) == "validation/1"
    order = tmp_path / "order.txt"
    order.write_text("dog\nowl\ncat\n")
    data = section(f"hf:{hub}", classes=str(order))
    assert open_samples(data, "val").labels.tolist() == [0, 2]


def test_hub_parquet_files(hub):
    source = f"hf:{hub}/train-*.parquet"
    assert "no val part, only train" in error_of(section(source))
    data = section(source, val_fraction=0.5)
    train, val = open_samples(data, "train"), open_samples(data, "val")
    values = [value_of(s, i) for s in (train, val) for i in range(2)]
    assert sorted(values) == [10, 11, 12, 13]
    assert [value % 2 for value in values] == [
        1 - label for s in (train, val) for label in s.labels
    ]


def test_hub_columns_are_found_by_type(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict({"picture": ["a"], "label": [1]})
    table.to_parquet(str(tmp_path / "train.parquet"))
    data = section(f"hf:{tmp_path / 'train.parquet'}")
    assert "0 columns of type Image" in error_of(data, "train")


def test_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def unreachable(*_):
        raise ConnectionError("Couldn't reach 'some/set' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = error_of(section("hf:some/set:config"))
    assert "hf:some/set:config cannot be loaded (Couldn't reach" in message and "\n" not in message


def test_check_classes(tmp_path):
    samples = open_samples(section(write_folder(tmp_path / "images", FILES)), "val")
    check_classes(samples, 3)
    with pytest.raises(DataError, match="model has 1000 classes, the data has 3.*data.classes"):
        check_classes(samples, 1000)


def test_cifar_zip():
    if not CIFAR.is_file():
        pytest.skip("the CIFAR-10 zip is not on this machine")
    train = open_samples(section(CIFAR), "train")
    val = open_samples(section(CIFAR), "val")
    assert len(train) == 50_000 and len(val) == 10_000
    assert np.bincount(val.labels).tolist() == [1000] * 10
    with zipfile.ZipFile(CIFAR) as archive:
        for index in (0, 1234, 9999):
            expected = Image.open(io.BytesIO(archive.read(val.name(index))))
            np.testing.assert_array_equal(np.asarray(val.image(index)), np.asarray(expected))


def test_other_images_under_the_same_names_have_another_content(tree):
    once = open_samples(section(tree(FILES)), "val")
    assert open_samples(section(once.source), "val").content_digest() == once.content_digest()
    before = once.content_digest(), once.fingerprint()
    other = open_samples(section(tree({name: value + 1 for name, value in FILES.items()})), "val")
    assert other.fingerprint() == before[1], "the list is the same"
    assert other.content_digest() != before[0]


def test_hub_rows_without_a_label_are_told(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    features = datasets.Features(
        {"label": datasets.ClassLabel(names=["dog", "cat"]), "picture": datasets.Image()}
    )
    pictures = [{"bytes": encoded(value), "path": None} for value in (1, 2)]
    table = datasets.Dataset.from_dict({"label": [1, -1], "picture": pictures}, features=features)
    table.to_parquet(str(tmp_path / "train.parquet"))
    data = section(f"hf:{tmp_path / 'train.parquet'}")
    assert "has images without a label" in error_of(data, "train")
