"""Zips, tars, bundles, results and run directories that lie: read in place, or refused by name."""

import io
import json
import os
import random
import re
import shutil
import struct
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from comparison import board_results, comparison, cpu_results
from fuzzing import LONGEST_LINE, Cases, damaged, memory_limit, obeyed, sealed, tree
from PIL import Image
from rich.console import Console

from care_compress.cli import main
from care_compress.data.loader import BadImages, evaluation_batches
from care_compress.data.sources import open_samples
from care_compress.data.transforms import EvalTransform
from care_compress.device.manifest import BUNDLE_FORMAT, BUNDLE_KIND, open_bundle
from care_compress.errors import CareError
from care_compress.evaluate.gate import (
    GateOptions,
    as_junit,
    check_comparable,
    compared,
    summary,
)
from care_compress.evaluate.resolve import named_models
from care_compress.evaluate.stored_comparison import read_compared
from care_compress.export.deploy import bundle_content, take_results
from care_compress.quantize.selection import read_list
from care_compress.recipe.sections import DataSection
from care_compress.recipe.target import load_target
from care_compress.report.write import write_report
from care_compress.run.finished import find_run

CASES = Cases("archives")
SIZE = 32
QUIET = Console(quiet=True)


@pytest.fixture(autouse=True, scope="module")
def _limits() -> Iterator[None]:
    with memory_limit():
        yield


def _png(colour: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), (colour, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


IMAGES = {
    f"{part}/{name}/{n}.png": _png(40 * n)
    for part in ("train", "val")
    for name in "ab"
    for n in (1, 2)
}


def read(source: str, folder: Path, **more: Any) -> Any:
    """As training and evaluation read it: list, then decode everything."""

    def run() -> int:
        data = DataSection(source=source, resolution=SIZE, workers=0, skip_bad_images=True, **more)
        bad = BadImages()
        samples = open_samples(data, "val")
        batches = evaluation_batches(samples, EvalTransform(SIZE, 0.9), 8, data, bad=bad)
        good = sum(len(batch.labels) for batch in batches)
        assert good + len(bad) == len(samples)
        samples.content_digest()
        return good

    before = tree(folder)
    with sealed(Path(tempfile.gettempdir())):
        found = CASES.attempt(run)
    assert tree(folder) == before, "an archive is read in place"
    return found


def _zip(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path.read_bytes()


def _tar(path: Path, entries: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in entries.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path.read_bytes()


@pytest.mark.parametrize("part", range(5))
def test_damaged_zips(part: int, tmp_path: Path) -> None:
    path = tmp_path / "images.zip"
    content = _zip(path, IMAGES, zipfile.ZIP_STORED if part % 2 else zipfile.ZIP_DEFLATED)
    assert read(str(path), tmp_path) == 4
    rng = random.Random(part)
    directory = content.rindex(b"PK\x01\x02", 0, content.index(b"PK\x01\x02") + 4)
    for copy in range(24):
        if copy % 2:  # the directory alone, which everything is found by
            broken = content[:directory] + damaged(content[directory:], rng)
        else:
            broken = damaged(content, rng)
        path.write_bytes(broken)
        read(str(path), tmp_path)


def _patched(content: bytes, at: int, form: str, value: int) -> bytes:
    """Every directory entry says this."""
    found, broken = 0, bytearray(content)
    while (found := content.find(b"PK\x01\x02", found)) >= 0:
        struct.pack_into(form, broken, found + at, value)
        found += 4
    return bytes(broken)


def test_zips_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "lying.zip"
    content = _zip(path, IMAGES)
    fields = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<I"), "packed": (20, "<I")}
    fields |= {"size": (24, "<I"), "name": (28, "<H"), "extra": (30, "<H"), "disk": (34, "<H")}
    fields |= {"offset": (42, "<I")}
    for at, form in fields.values():
        for value in (
            0,
            1,
            0x7FFF,
            0xFFFF,
            *((0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF) if form == "<I" else ()),
        ):
            path.write_bytes(_patched(content, at, form, value))
            read(str(path), tmp_path)
    end = content.rindex(b"PK\x05\x06")
    for at, form in ((4, "<H"), (8, "<H"), (10, "<H"), (12, "<I"), (16, "<I"), (20, "<H")):
        for value in (0, 1, 0xFFFF):
            broken = bytearray(content)
            struct.pack_into(form, broken, end + at, value)
            path.write_bytes(bytes(broken))
            read(str(path), tmp_path)


def test_zips_with_hostile_names(tmp_path: Path) -> None:
    image = _png(1)
    names = [
        "../../escaped.png",
        "/etc/escaped.png",
        "C:\\escaped.png",
        "..\\escaped.png",
        "val/../../escaped.png",
    ]
    names += [
        "val/../b/1.png",
        "val//1.png",
        "//1.png",
        "val/a/../../../1.png",
        "val/\x1b[2J/1.png",
        "val/[bold]/1.png",
    ]
    names += [
        "val/a/" + "n" * 60_000 + ".png",
        "/".join(["val"] * 5000) + "/1.png",
        "val/a/\udc80.png",
        "val/./1.png",
    ]
    names += [
        ".png",
        "val/.png",
        "val/a/.hidden.png",
        "__MACOSX/val/a/1.png",
        "val/a/1.png/2.png",
        "\u202e/a/1.png",
    ]
    path = tmp_path / "named.zip"
    for name in names:
        clean = name.encode("utf-8", "replace").decode()
        for more in ({}, IMAGES):
            _zip(path, {clean: image, **more})
            assert not more or read(str(path), tmp_path) != 0
            read(str(path), tmp_path, val_fraction=None if more else 0.5)
    assert not list(tmp_path.parent.rglob("*escaped*"))


def test_zips_with_more_than_files(tmp_path: Path) -> None:
    path = tmp_path / "odd.zip"
    link = zipfile.ZipInfo("val/a/link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in IMAGES.items():
            archive.writestr(name, content)
        archive.writestr(link, "/etc/passwd")
    assert read(str(path), tmp_path) == 4, "a link is no image"
    with pytest.warns(UserWarning, match="Duplicate"):
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("val/a/1.png", "val/a/1.png", "val/b/1.png"):
                archive.writestr(name, _png(9))
    assert read(str(path), tmp_path) == 2, "of one name the last counts"
    inner = _zip(tmp_path / "inner.zip", IMAGES)
    (tmp_path / "inner.zip").unlink()
    for name in ("val/a/inner.zip", "val/a/inner.png", "inner.zip"):
        _zip(path, {name: inner})
        read(str(path), tmp_path)
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        _zip(path, IMAGES, method)
        assert isinstance(read(str(path), tmp_path), str)
    (tmp_path / "empty.zip").write_bytes(b"")
    (tmp_path / "nothing.zip").write_bytes(b"PK\x05\x06" + bytes(18))
    (tmp_path / "folder.zip").mkdir()
    os.mkfifo(tmp_path / "pipe.zip")
    (tmp_path / "endless.zip").symlink_to("/dev/zero")
    names = (
        "empty.zip",
        "nothing.zip",
        "folder.zip",
        "pipe.zip",
        "endless.zip",
        "absent.zip",
        "a\0.zip",
    )
    for name in (*names, "x" * 5000 + ".zip", "\udc80.zip"):
        assert isinstance(read(f"{tmp_path}/{name}", tmp_path), str)
    for source in (
        "",
        "~nobody-at-all",
        "builtin:",
        "builtin:cifar",
        "file:///etc",
        "x" * 5000,
        "\0",
        "\x1b[2J",
        "hf:",
    ):
        assert isinstance(read(source, tmp_path), str)


def test_zip_bombs(tmp_path: Path) -> None:
    """Three gigabytes of zeros under an image's name, told truly and told as 100 bytes."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in IMAGES.items():
            archive.writestr(name, content)
        with archive.open("val/a/bomb.png", "w") as file:
            for _ in range(600):
                file.write(bytes(1 << 20))
    assert read(str(path), tmp_path) == 4
    content = path.read_bytes()
    for size in (100, 0xFFFFFFFE):
        path.write_bytes(_patched(content, 24, "<I", size))
        assert read(str(path), tmp_path) == 0


SHARD = {
    f"{part}/{n:03}.{kind}": content
    for part in ("val",)
    for n in range(4)
    for kind, content in (("cls", str(n % 2).encode()), ("png", _png(40 * n)))
}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_damaged_tars(form: int, tmp_path: Path) -> None:
    path = tmp_path / "val-000.tar"
    entries = (
        SHARD
        if form == tarfile.USTAR_FORMAT
        else {f"{'long' * 60}/{k}": v for k, v in SHARD.items()}
    )
    content = _tar(path, entries, form)
    assert read(f"wds:{path}", tmp_path) == 4
    rng = random.Random(form)
    for _ in range(16):
        path.write_bytes(damaged(content, rng))
        read(f"wds:{path}", tmp_path)
    heads = [
        place
        for place in range(0, len(content), 512)
        if content[place + 257 : place + 262] == b"ustar"
    ]
    for _ in range(24):  # headers whose checksum is right and whose fields are not
        broken = bytearray(content)
        at = rng.choice(heads)
        start, end = rng.choice(
            ((0, 100), (100, 108), (124, 136), (136, 148), (156, 157), (157, 257), (345, 500))
        )
        broken[at + start : at + end] = rng.choice(
            (rng.randbytes(end - start), b"7" * (end - start), b"\xff" * (end - start), bytes(end - start), b"-1 ".ljust(end - start))
        )  # fmt: skip
        check = sum(broken[at : at + 148]) + 8 * 32 + sum(broken[at + 156 : at + 512])
        broken[at + 148 : at + 156] = b"%06o\0 " % check
        path.write_bytes(bytes(broken))
        read(f"wds:{path}", tmp_path)


def test_tars_that_lie(tmp_path: Path) -> None:
    path = tmp_path / "val-000.tar"
    labels = [
        b"",
        b"x",
        b"-1",
        b"1e9",
        b"NaN",
        b"1" * 5000,
        b"99999999999999999999",
        b"999999",
        b"1000001",
        b"true",
    ]
    labels += [
        b"null",
        b"[" * 100_000,
        b'{"label": {}}',
        b'{"cls": "1"}',
        b"\xff",
        b"0.5",
        b" 1 ",
        b"{}",
        b"2147483648",
    ]
    for label in labels:
        for kind in ("cls", "json"):
            _tar(path, {f"a.{kind}": label, "a.png": _png(1)})
            read(f"wds:{path}", tmp_path)
    names = ["../../escaped", "/etc/escaped", "a" * 99, "\x1b[2J", "", ".", "..", "a/../../b"]
    for name in names:
        _tar(path, {f"{name}.cls": b"0", f"{name}.png": _png(1)}, tarfile.PAX_FORMAT)
        read(f"wds:{path}", tmp_path)
    for kind in (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
    ):
        with tarfile.open(path, "w") as archive:
            for name in ("a.cls", "a.png"):
                entry = tarfile.TarInfo(name)
                entry.type, entry.linkname = kind, "/etc/passwd"
                archive.addfile(entry)
        assert isinstance(read(f"wds:{path}", tmp_path), str)
    for mode in ("w:gz", "w:bz2", "w:xz"):
        with tarfile.open(path, mode) as archive:
            archive.addfile(tarfile.TarInfo("a.png"))
        assert isinstance(read(f"wds:{path}", tmp_path), str)
    patterns = [
        "{000..999999999}.tar",
        "{0..99999}{0..99999}.tar",
        "{a..z}{a..z}{a..z}{a..z}{a..z}{a..z}.tar",
        "{0..1",
        "}",
    ]
    patterns += [
        "pipe:touch pwned",
        "x::pipe:touch pwned",
        "https://x/y.tar",
        "$UNSET/x.tar",
        "[",
        "*",
        "**/*",
        "",
        "\0",
    ]
    patterns += [
        "{0..99999999999999999999}.tar",
        "x" * 5000,
        "{a,{b,{c,{d}}}}",
        "{1..5..0}.tar",
        "{5..1..-3}.tar",
        "~nobody/x.tar",
    ]
    patterns += ["{a,b}" * 40 + ".tar"]
    for pattern in patterns:
        assert isinstance(
            read(
                f"wds:{tmp_path}/{pattern}" if "pipe" not in pattern else f"wds:{pattern}", tmp_path
            ),
            str,
        )
    for content in ("0\n1\n" * 10, "", "\0", "a\n" * 2, "x" * 100_000):
        (tmp_path / "classes.txt").write_text(content)
        _tar(path, SHARD)
        read(f"wds:{path}", tmp_path)
        read(f"wds:{path}", tmp_path, classes=str(tmp_path / "classes.txt"))
    for classes in ("/dev/zero", str(tmp_path), "absent", "\0", "x" * 5000):
        assert isinstance(read(f"wds:{path}", tmp_path, classes=classes), str)


def mutated(value: Any, rng: random.Random) -> Any:
    """JSON with one thing changed, somewhere."""
    odd = (
        None,
        True,
        -1,
        0,
        1e308,
        10**30,
        "",
        "\x1b[2J",
        "../../x",
        "x" * 3000,
        [],
        {},
        [[]],
        {"a": 1},
        float("nan"),
    )
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, rng.choice(("x", "", "\x1b[2J", "__class__")): rng.choice(odd)}
            case _:
                return {**value, key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], mutated(value[at], rng), *value[at + 1 :]]
    return rng.choice(odd)


JUNK = [
    b"",
    b"null",
    b"[]",
    b"{",
    b"3",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b"{}",
    b"NaN",
    b'{"run": "../../x"}',
]


def _variants(value: Any, count: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    yield from JUNK
    for _ in range(count):
        yield json.dumps(mutated(value, rng)).encode()
    text = json.dumps(value).encode()
    for _ in range(count // 4):
        yield damaged(text, rng)


def test_results_of_devices(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    run.mkdir(parents=True)
    file = tmp_path / "results.json"
    of_both = (board_results("mine"), cpu_results("mine"))
    for content in (one for value in of_both for one in _variants(value, 40, 3)):
        file.write_bytes(content)
        with sealed(run):
            CASES.attempt(lambda: take_results(file, tmp_path / "runs", None, QUIET))
            CASES.attempt(lambda: take_results(file, tmp_path / "runs", "mine", QUIET))
    assert {path.parent.name for path in tmp_path.rglob("*") if path.is_file()} <= {
        "measured",
        tmp_path.name,
    }


def _baseline() -> dict[str, Any]:
    """compare.json of two files on two targets, as far as a gate asks it."""
    value, targets = comparison("mine"), ("openvino-cpu", "onnxruntime-cpu")
    one = next(pair for pair in value["pairs"] if pair["candidate"] == "mine")
    times = {"name": "mine", "speedup": 1.2, "speedup_ci95": [1.1, 1.3]}
    return value | {
        "models": {name: {"precision": None, "checkpoint_sha256": "0"} for name in ("fp32", "mine")},
        "pairs": [{**one, "target": target} for target in targets],
        "latency": [{"batch": 1, "threads": 1, "rows": [{**times, "target": target} for target in targets]}],
        "data": {"samples": "0", "resolution": 64, "crop_pct": 1.0, "mean": [0.5], "std": [0.5], "exif_rotate": False},
        "machine": {"arch": "x86_64", "cpu": {"name": "x", "features": {"avx2": True}}},
    }  # fmt: skip


def test_baselines_of_a_gate(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text(json.dumps(_baseline()))
    now, options = read_compared(tmp_path / "good.json", "mine", "store one"), GateOptions()
    path = tmp_path / "base.json"

    def hold() -> str:
        before = read_compared(path, "mine", "store one")
        check_comparable(before, now)
        checks = list(compared(before, now, options))
        ElementTree.fromstring(as_junit("mine", checks))
        return summary(before, now, checks, options)

    shutil.copy(tmp_path / "good.json", path)
    assert "is not worse than mine" in CASES.attempt(hold)
    for content in _variants(_baseline(), 60, 6):
        path.write_bytes(content)
        with sealed(tmp_path):
            CASES.attempt(hold)


def test_bundles_with_a_lying_manifest(tmp_path: Path) -> None:
    (tmp_path / "int8.onnx").write_bytes(b"graph")
    manifest = {
        "format": BUNDLE_FORMAT, "kind": BUNDLE_KIND, "run": "r", "recipe": "r", "target": "t", "fingerprint": "f",
        "requirement": "tensorrt", "classes": ["a"], "resolution": 32, "crop_pct": 1.0, "exif_rotate": False,
        "mean": [0.5], "std": [0.5], "input": {}, "output": {},
        "models": {"int8": {
            "file": "int8.onnx", "sha256": "0" * 64, "limits": {"agreement": 95.0, "sqnr_db": 31.0},
        }},
        "files": {"int8.onnx": "0" * 64, "../../etc/passwd": "0" * 64},
    }  # fmt: skip
    for content in _variants(manifest, 40, 4):
        (tmp_path / "manifest.json").write_bytes(content)
        with sealed(tmp_path):
            assert isinstance(CASES.attempt(lambda: open_bundle(tmp_path, ("tensorrt",))), str)


class _Listed:
    """A training split of one image."""

    source, classes, in_memory = "x", ("a",), True

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return "train/a/1.png"

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (4, 4))

    def hashed(self, index: int) -> tuple[Image.Image, int]:
        return self.image(index), 0


def test_calibration_lists(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    good = {
        "method": "random",
        "classes": ["a"],
        "images": [{"name": "train/a/1.png", "sha256": "0"}],
    }
    for content in _variants(good, 30, 5):
        path.write_bytes(content)
        CASES.attempt(lambda: read_list(path, _Listed()))  # type: ignore[arg-type]
    os.mkfifo(tmp_path / "pipe.json")
    for name in ("pipe.json", "absent.json", ".", "\0", "x" * 5000):
        assert isinstance(
            CASES.attempt(lambda name=name: read_list(tmp_path / name, _Listed())), str
        )  # type: ignore[misc, arg-type]


def _recipe_text() -> str:
    return "claim: a test\nname: mine\nmodel: {checkpoint: 'builtin:care_nano_shapes'}\n"


def _results() -> dict[str, Any]:
    """results.json of a float run, as the schema has it."""
    return {
        "run": "mine", "recipe": "mine", "precision": "fp32",
        "accuracy": {"images": 4, "top1": 50.0, "top5": 100.0},
        "rewrites": [{"name": "published", "parameters": 10, "macs": 1000, "operations": 5}],
        "data": {"source": "builtin:shapes", "fingerprint": "0" * 64, "classes": ["a", "b"], "skipped_images": {}},
        "exports": {"openvino-cpu": {"models": {"fp32": {"file": "fp32.xml", "sha256": "0" * 64, "size_bytes": 3}}}},
        "seconds": {"export": 1.0},
    }  # fmt: skip


def _doors(runs: Path) -> dict[str, Callable[[], object]]:
    """What reads a run directory."""
    return {
        "find": lambda: find_run(runs, "mine").checked_checkpoint(),
        "named_models": lambda: [
            one.export_of for one in named_models(["mine"], runs) if not isinstance(one, str)
        ],
        "report": lambda: write_report(runs / "mine", QUIET),
        "bundle": lambda: bundle_content(
            runs / "mine", "mine", load_target("tensorrt-jetson-orin")
        ),
    }


FILES: dict[str, Any] = {
    "results.json": _results(),
    "manifest.json": {
        "run": "mine",
        "inputs": {"checkpoint": {"sha256": "0"}},
        "outputs": {},
        "machine": {},
    },
    "compare.json": comparison("mine"),
    "measured/x.json": board_results("mine"),
    "calibration.json": {"method": "random", "classes": [], "images": []},
    "exports/openvino-cpu/export.json": {"preprocessing": {}, "classes": [], "models": {}},
    "exports/tensorrt-jetson-orin/export.json": {
        "preprocessing": {},
        "classes": [],
        "models": {},
        "batch": 1,
    },
    "fidelity.json": {"rungs": [], "images": 1},
    "ptq/tuning.json": {"steps": []},
    "float/history.json": {"epochs": []},
}


@pytest.mark.parametrize("file", FILES)
def test_run_directories(file: str, tmp_path: Path) -> None:
    """Any file of a run is garbage: each door says so, or does without it."""
    count = 24 if file in ("results.json", "compare.json", "measured/x.json") else 4
    for content in _variants(FILES[file], count, len(file)):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        run = tmp_path / "runs" / "mine"
        for name, value in FILES.items():
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            if name in ("results.json", "manifest.json") or name == file:
                (run / name).write_text(json.dumps(value))
        (run / "recipe.yaml").write_text(_recipe_text())
        (run / file).write_bytes(content)
        for door in _doors(tmp_path / "runs").values():
            with sealed(tmp_path / "runs" / "mine"):
                CASES.attempt(door)


def test_the_command_line_says_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _zip(Path("encrypted.zip"), IMAGES)
    Path("encrypted.zip").write_bytes(_patched(Path("encrypted.zip").read_bytes(), 8, "<H", 1))
    Path("cut.zip").write_bytes(b"PK\x03\x04" + bytes(100))
    Path("val-0.tar").write_bytes(bytes(100) + b"x" * 1000)
    Path("junk.json").write_bytes(b"[" * 100_000)
    run = Path("runs/mine")
    run.mkdir(parents=True)
    (run / "results.json").write_bytes(b"{}")
    (run / "recipe.yaml").write_text(_recipe_text())
    before = tree(tmp_path)
    verbs = [["accuracy", "builtin:care_nano_shapes", "--res", "32", "--data", data] for data in
             ("encrypted.zip", "cut.zip", "wds:val-0.tar", "wds:{0..999999999}.tar", "nothing", "x\x1b[2J.zip")]  # fmt: skip
    verbs += [
        ["import-results", "junk.json"],
        ["import-results", "absent.json", "--run", "mine"],
        ["report", "mine"],
    ]
    verbs += [
        ["report", "../mine"],
        ["report", "\x1b[2J"],
        ["fidelity", "mine"],
        ["bundle", "openvino-cpu", "--run", "mine"],
    ]
    verbs += [
        ["bundle", "tensorrt-jetson-orin", "--run", "mine"],
        ["compare", "mine", "nothing"],
        ["nonsense"],
        ["compare"],
    ]
    for verb in verbs:

        def ask(verb: list[str] = verb) -> int:
            with pytest.raises(SystemExit) as ended:
                main(verb)
            return int(str(ended.value.code))

        with sealed(Path(tempfile.gettempdir())):
            assert CASES.attempt(ask) == 2, verb
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1, (verb, out, err)
        assert re.match(r"[A-Z]\w+: .* Fix: ", err), (verb, err)
        assert obeyed(err[:-1]) == "" and len(err) < LONGEST_LINE
    after = tree(tmp_path)
    assert after.keys() - before.keys() <= {"runs/mine/.lock"} and issubclass(CareError, Exception)


def test_there_were_enough_cases() -> None:
    CASES.assert_enough()
