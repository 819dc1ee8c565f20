"""Images as cameras, converters and attackers leave them: decoded, or left out with a reason."""

import io
import random
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzzing import Cases, damaged, memory_limit, obeyed, sealed, time_limit
from PIL import Image

from care_compress.data.loader import BadImages, evaluation_batches
from care_compress.data.sources import open_samples
from care_compress.data.transforms import EvalTransform, TrainTransform
from care_compress.errors import BadImageError
from care_compress.recipe.sections import AugmentSection, DataSection

CASES = Cases("images")
SIZE = 32


@pytest.fixture(autouse=True, scope="module")
def _limits() -> Iterator[None]:
    with memory_limit():
        yield


def _pixels(mode: str, size: tuple[int, int] = (48, 40), seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    rgb = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (size[1], size[0])).astype(np.uint16))
    if mode == "F":
        return Image.fromarray(rng.normal(0, 1e30, (size[1], size[0])).astype(np.float32))
    if mode == "I":
        return Image.fromarray(rng.integers(-(2**31), 2**31, (size[1], size[0])).astype(np.int32))
    if mode == "LA":
        return rgb.convert("L").convert("LA")
    return rgb.convert(mode)


def _saved(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _saved(_pixels("RGB"), "JPEG", exif=exif)


def _frames(form: str, count: int = 4, **options: object) -> bytes:
    first, *others = (_pixels("RGB", seed=n) for n in range(count))
    return _saved(first, form, save_all=True, append_images=others, duration=50, **options)


def png(width: int, height: int, depth: int = 8, kind: int = 2, body: bytes | None = None) -> bytes:
    """A PNG that says anything about itself."""

    def chunk(name: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    pixels = zlib.compress(bytes(4096)) if body is None else body
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def _palette() -> Image.Image:
    image = _pixels("RGB").quantize(16)
    image.info["transparency"] = bytes(range(16))
    return image


# Every way an image may be stored that is right; each of them is decoded.
RIGHT: dict[str, bytes] = {
    **{f"{mode}.jpg": _saved(_pixels(mode), "JPEG") for mode in ("RGB", "L", "CMYK", "YCbCr")},
    **{
        f"{mode}.png": _saved(_pixels(mode), "PNG")
        for mode in ("RGB", "RGBA", "L", "LA", "1", "P", "I;16")
    },
    **{
        f"{mode}.tif": _saved(_pixels(mode), "TIFF")
        for mode in ("RGB", "CMYK", "L", "1", "I;16", "F", "I", "LAB")
    },
    **{f"{mode}.bmp": _saved(_pixels(mode), "BMP") for mode in ("RGB", "L", "1", "P")},
    **{
        f"packed {c}.tif": _saved(_pixels("RGB"), "TIFF", compression=c)
        for c in ("tiff_lzw", "jpeg", "tiff_deflate")
    },
    "fax.tif": _saved(_pixels("1"), "TIFF", compression="group4"),
    "progressive.jpg": _saved(_pixels("RGB"), "JPEG", progressive=True),
    "palette.png": _saved(_palette(), "PNG", transparency=bytes(range(16))),
    "lossy.webp": _saved(_pixels("RGB"), "WEBP"),
    "lossless.webp": _saved(_pixels("RGBA"), "WEBP", lossless=True),
    "still.gif": _saved(_pixels("P"), "GIF"),
    "clear.gif": _saved(_palette(), "GIF", transparency=0),
    "moving.gif": _frames("GIF", loop=0),
    "moving.webp": _frames("WEBP"),
    "moving.png": _frames("PNG"),
    "pages.tif": _frames("TIFF"),
    **{f"turned {n}.jpg": _turned(n) for n in (1, 3, 6, 8, 9, 65535)},
    "one pixel.png": _saved(_pixels("RGB", (1, 1)), "PNG"),
    "one pixel.jpg": _saved(_pixels("L", (1, 1)), "JPEG"),
    "one pixel.gif": _saved(_pixels("P", (1, 1)), "GIF"),
    "one column.png": _saved(_pixels("RGB", (1, 300)), "PNG"),
    "wide.png": _saved(_pixels("RGB", (1200, 2)), "PNG"),
    "really a gif.jpg": _saved(_pixels("P"), "GIF"),
    "really a jpeg.png": _saved(_pixels("RGB"), "JPEG"),
    "a comment.jpg": _saved(_pixels("RGB"), "JPEG", comment=b"\x1b[2J" * 100),
    "a tail.png": _saved(_pixels("RGB"), "PNG") + b"PK\x03\x04 and more",
}
_GIF = struct.pack("<HHHH", 0, 0, 65000, 65000)


def _bmp(side: int) -> bytes:
    head = struct.pack("<IHHIIii", 1 << 30, 0, 0, 54, 40, side, side)
    return b"BM" + head + struct.pack("<HHIIiiII", 1, 24, 0, 0, 0, 0, 0, 0)


_SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
# What nobody can or should decode; each of them is left out, with a reason.
WRONG: dict[str, bytes] = {
    "empty.jpg": b"",
    "a byte.png": b"\x89",
    "text.jpg": b"not an image\n" * 50,
    "zeros.jpg": bytes(5000),
    "html.jpg": b"<html><body>404</body></html>",
    "script.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n",
    "drawing.png": _SVG,
    "document.jpg": b"%PDF-1.7\n",
    "program.png": b"\x7fELF" + bytes(200),
    "archive.png": b"PK\x03\x04" + bytes(200),
    "bomb 65000.png": png(65000, 65000),
    "bomb grey.png": png(65000, 65000, 1, 0),
    "bomb of 100 MP.png": png(10000, 10000),
    "largest.png": png(2**31 - 1, 2**31 - 1),
    "larger.png": png(2**32 - 1, 2**32 - 1),
    "no size.png": png(0, 0),
    "no height.png": png(32, 0),
    "no pixels.png": png(32, 32, body=b""),
    "few pixels.png": png(512, 512, body=zlib.compress(bytes(10))),
    "odd depth.png": png(32, 32, depth=7),
    "odd kind.png": png(32, 32, kind=5),
    "65000.gif": b"GIF89a" + struct.pack("<HH3x", 65000, 65000) + b"," + _GIF + b"\x00\x02\x00;",
    "65000.bmp": _bmp(65000),
    "negative.bmp": _bmp(-32),
    "header.tif": b"II*\0\x08\0\0\0",
    "loop.tif": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "many tags.tif": b"II*\0\x08\0\0\0\xff\xff" + bytes(400),
    "half.jpg": RIGHT["RGB.jpg"][: len(RIGHT["RGB.jpg"]) // 2],
    "half.png": RIGHT["RGB.png"][: len(RIGHT["RGB.png"]) // 2],
    "half.webp": RIGHT["lossy.webp"][:100],
    "random.jpg": b"\xff\xd8\xff\xe0" + random.Random(0).randbytes(3000),
    "random.gif": b"GIF89a" + random.Random(1).randbytes(3000),
    "random.webp": b"RIFF\xff\xff\xff\xffWEBPVP8 " + random.Random(2).randbytes(3000),
}  # fmt: skip
EACH = 11  # damaged copies of each right image


def _damaged_images() -> dict[str, bytes]:
    found = {}
    for number, (name, content) in enumerate(RIGHT.items()):
        rng = random.Random(number)
        stem, _, suffix = name.rpartition(".")
        for copy in range(EACH):
            found[f"{stem} {copy}.{suffix}"] = damaged(content, rng)
    return found


DAMAGED = _damaged_images()


def _folder(root: Path, images: dict[str, bytes]) -> Path:
    (root / "val" / "class").mkdir(parents=True)
    (root / "train" / "class").mkdir(parents=True)
    for name, content in images.items():
        (root / "val" / "class" / name).write_bytes(content)
    return root


def _zip(path: Path, images: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in images.items():
            archive.writestr(f"val/class/{name}", content)
    return path


def decode_all(source: Path, expected: int, rotate: bool) -> tuple[set[str], BadImages]:
    """Names of what was decoded, one image a batch, and what was left out; together everything."""
    data = DataSection(
        source=str(source), resolution=SIZE, workers=0, skip_bad_images=True, exif_rotate=rotate
    )
    samples = open_samples(data, "val")
    assert len(samples) == expected
    evaluate = EvalTransform(SIZE, 0.875, rotate)
    train = TrainTransform(SIZE, AugmentSection(jitter=0.4, erase=0.5), rotate)
    good, bad = set(), BadImages()
    for index in range(len(samples)):
        name = samples.name(index)
        for transform in (evaluate, train):

            def one(
                index: int = index, transform: EvalTransform | TrainTransform = transform
            ) -> None:
                for batch in evaluation_batches(
                    samples, transform, 1, data, bad=bad, indices=[index]
                ):
                    assert batch.images.shape == (1, 3, SIZE, SIZE)
                    assert batch.images.dtype == torch.uint8
                    good.add(samples.name(index))

            if transform is evaluate:
                CASES.attempt(one)
            else:
                with time_limit():
                    one()
    assert good.isdisjoint(bad.reasons) and len(good) + len(bad) == expected
    for name, reason in bad.reasons.items():
        assert reason and Path(name).name in reason and len(reason) < 1000
    return {Path(name).name for name in good}, bad


@pytest.mark.parametrize("rotate", [False, True])
def test_every_right_form_is_decoded(rotate: bool, tmp_path: Path) -> None:
    good, bad = decode_all(_folder(tmp_path, RIGHT), len(RIGHT), rotate)
    assert good == set(RIGHT), bad.reasons


def test_what_is_no_image_is_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as leaked, sealed(tmp_path):
        warnings.simplefilter("always")
        good, bad = decode_all(_folder(tmp_path, WRONG), len(WRONG), False)
    assert good == set() and len(bad) == len(WRONG)
    assert not leaked, "Pillow's warnings name no file"
    assert capfd.readouterr().err == "", "nor do those of the libraries below it"
    CASES.refused += len(bad)
    CASES.worked -= len(bad)  # counted as worked, because the loader went on
    assert "bomb" in bad.reasons["val/class/bomb 65000.png"]
    assert "bomb" in bad.reasons["val/class/bomb of 100 MP.png"]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_damaged_images(kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    half = dict(list(DAMAGED.items())[kind == "zip" :: 2])
    source = _folder(tmp_path / "x", half) if kind == "folder" else _zip(tmp_path / "x.zip", half)
    with warnings.catch_warnings(record=True) as leaked, sealed(tmp_path):
        warnings.simplefilter("always")
        _, bad = decode_all(source, len(half), kind == "zip")
    assert not leaked and capfd.readouterr().err == ""
    assert len(half) / 10 < len(bad) < len(half), "damage that is never noticed is no damage"


def test_without_skipping_the_first_bad_image_is_named(tmp_path: Path) -> None:
    data = DataSection(source=str(_folder(tmp_path, WRONG)), resolution=SIZE, workers=0)
    samples = open_samples(data, "val")
    for index in range(len(samples)):
        message = CASES.attempt(lambda index=index: samples.image(index).convert("RGB"))  # type: ignore[misc]
        assert isinstance(message, str) and Path(samples.name(index)).name in message


def test_files_that_are_none_under_an_image_name(tmp_path: Path) -> None:
    import os

    folder = _folder(tmp_path, {"right.png": RIGHT["RGB.png"]}) / "val" / "class"
    os.mkfifo(folder / "pipe.png")
    (folder / "endless.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "folder.png").mkdir()
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(1 << 40)
    (folder / "\x1b[2J[bold]\n.png").write_bytes(b"x")
    good, bad = decode_all(tmp_path, 8, False)
    assert good == {"right.png"} and len(bad) == 7


def test_workers_skip_the_same(tmp_path: Path) -> None:
    """In decoding processes, as users run it."""
    images = {**WRONG, **RIGHT}
    data = DataSection(
        source=str(_folder(tmp_path, images)), resolution=SIZE, workers=2, skip_bad_images=True
    )
    samples, bad = open_samples(data, "val"), BadImages()
    with time_limit(60):
        batches = evaluation_batches(samples, EvalTransform(SIZE, 0.875), 8, data, bad=bad)
        count = sum(len(batch.labels) for batch in batches)
    assert (count, len(bad)) == (len(RIGHT), len(WRONG))


def test_names_are_shown_and_not_obeyed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from graphs import onnx_file

    from care_compress.cli import main

    folder = tmp_path / "images"
    for name in ("\x1b[2J", "[bold]", "a", ":bomb:"):
        (folder / "val" / name).mkdir(parents=True)
        (folder / "val" / name / "right.png").write_bytes(RIGHT["RGB.png"])
    (folder / "val" / "a" / "\x1b]0;title\x07[red].png").write_bytes(b"x")
    model = onnx_file(tmp_path / "four.onnx")
    ask = ["accuracy", str(model), "--data", str(folder), "--res", "32"]
    with pytest.raises(SystemExit) as ended:
        main([*ask, "--skip-bad-images"])
    out, err = capfd.readouterr()
    assert ended.value.code == 0 and obeyed(out.replace("\n", "")) == "" and err == ""
    assert "\\x1b]0;title" in out and "[red].png" in out
    with pytest.raises(SystemExit) as ended:
        main(ask)
    out, err = capfd.readouterr()
    assert ended.value.code == 2 and err.count("\n") == 1 and "BadImageError" in err
    assert obeyed(err[:-1]) == "" and "\\x1b]0;title" in err
    (folder / "val" / "b").mkdir()
    with pytest.raises(SystemExit) as ended:
        main([*ask, "--skip-bad-images"])
    _, err = capfd.readouterr()
    assert ended.value.code == 2 and obeyed(err[:-1]) == "", "five classes for a model of four"
    assert "\\x1b[2J" in err and ":bomb:" in err and "[bold]" in err


def test_there_were_enough_cases() -> None:
    assert issubclass(BadImageError, Exception)
    CASES.assert_enough()
