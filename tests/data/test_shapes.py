"""``builtin:shapes``: the same bits everywhere, and a cache that survives what disks do."""

import hashlib
import os
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from care_compress.data import shapes
from care_compress.data.shapes import Shapes
from care_compress.data.shapes_render import (
    CLASSES,
    SIZE,
    UNIFORMS,
    Draws,
    NORMALS_FSxy,
    Split,
    render,
)
from care_compress.errors import DataError
from care_compress.files import cache_folder

COUNTS = {"train": 50, "val": 40}


@pytest.fixture(autouse=True)
def small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep every test in a cache of its own, with few images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(shapes, "COUNTS", COUNTS)
    return tmp_path / "care-compress"


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()[:16]


# A change of these digests is a change of the data set: raise shapes.VERSION with it, and every
# stored accuracy is void.
@pytest.mark.parametrize(
    ("seed", "split", "expected"),
    [
        (0, "train", "46668feb598ffc31"),
        (0, "val", "b045c26f5fb1c58b"),
        (7, "val", "ae8a851e2798d793"),
    ],
)
def test_the_bits_are_the_stored_ones(seed: int, split: Split, expected: str) -> None:
    assert (shapes.VERSION, digest(render(seed, split, range(64)))) == ("v1", expected)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    together = render(3, "train", range(70, 80))
    for row, index in enumerate(range(70, 80)):
        np.testing.assert_array_equal(render(3, "train", [index])[0], together[row])
    np.testing.assert_array_equal(render(3, "train", [79, 71]), together[[9, 1]])


def test_splits_and_seeds_share_no_image() -> None:
    drawn = [render(*of, range(48)) for of in ((0, "train"), (0, "val"), (1, "train"), (1, "val"))]
    assert len({image.tobytes() for images in drawn for image in images}) == 4 * 48


def test_images_fill_the_range_of_bytes() -> None:
    images = render(0, "train", range(32))
    assert images.shape == (32, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    assert images.flags.c_contiguous
    assert images.min() < 20
    assert images.max() > 235


def test_every_form_is_its_own_mirror_image() -> None:
    """Training flips images; a form that changed under it would be a label error."""
    for normals_Sxy in NORMALS_FSxy:
        sides = {(round(float(x), 6), round(float(y), 6)) for x, y in normals_Sxy + 0.0}
        assert {(-x + 0.0, y) for x, y in sides} == sides


def test_every_number_of_an_image_has_words_of_its_own() -> None:
    """The noise starts where the scene's numbers end; the scene must not run into it."""
    draws = Draws(0, "val", [0])
    for _ in range(UNIFORMS - 1):
        draws.uniform()
    with pytest.raises(AssertionError):
        draws.uniform()


@pytest.mark.parametrize("split", ["train", "val"])
def test_full_splits_are_balanced(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    samples = Shapes(split)  # nothing is drawn before the pixels are asked for
    assert len(samples) == {"train": 20_000, "val": 4_000}[split]
    assert samples.labels.dtype == np.int64
    assert set(Counter(samples.labels.tolist()).values()) == {len(samples) // len(CLASSES)}


def test_samples_name_label_and_show_their_images() -> None:
    samples = Shapes("val")
    assert samples.classes == CLASSES
    assert len(set(CLASSES)) == 40
    assert samples.in_memory
    assert samples.name(12) == "shapes-v1-seed0/val/00012"
    image = samples.image(12)
    assert (image.mode, image.size) == ("RGB", (SIZE, SIZE))
    np.testing.assert_array_equal(np.asarray(image), render(0, "val", [12])[0])
    assert samples.pixels.shape == (40, SIZE, SIZE, 3)
    assert not samples.pixels.flags.writeable
    with pytest.raises(IndexError):
        samples.name(40)


def test_fingerprint_tells_lists_apart() -> None:
    assert Shapes("val").fingerprint() == Shapes("val").fingerprint()
    others = (Shapes("val"), Shapes("train"), Shapes("val", seed=1))
    assert len({samples.fingerprint() for samples in others}) == 3


def test_pickling_ships_no_pixels_and_reopens_them() -> None:
    samples = Shapes("train")
    expected = samples.pixels[7].copy()
    shipped = pickle.dumps(samples)
    assert len(shipped) < 4_000
    np.testing.assert_array_equal(pickle.loads(shipped).pixels[7], expected)


def test_a_second_run_draws_nothing(monkeypatch: pytest.MonkeyPatch, small_cache: Path) -> None:
    expected = np.array(Shapes("val").pixels)
    assert [path.name for path in small_cache.iterdir()] == ["shapes-v1-seed0-val.npy"]
    monkeypatch.setattr(shapes, "render", _interrupted)
    np.testing.assert_array_equal(Shapes("val").pixels, expected)


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _flip_a_pixel(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5_000] ^= 1
    path.write_bytes(data)


def _cut_the_digest(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _other_shape(path: Path) -> None:
    np.save(path, np.zeros((40, 8, 8, 3), np.uint8))


def _other_type(path: Path) -> None:
    np.save(path, np.zeros((40, SIZE, SIZE, 3), np.float32))


def _no_array(path: Path) -> None:
    path.write_bytes(b"<html>" * 100)


@pytest.mark.parametrize(
    "damage",
    [_truncate, _empty, _flip_a_pixel, _cut_the_digest, _other_shape, _other_type, _no_array],
)
def test_a_damaged_cache_is_drawn_again(
    damage: Callable[[Path], None], small_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = np.array(Shapes("val").pixels)
    damage(small_cache / "shapes-v1-seed0-val.npy")
    np.testing.assert_array_equal(Shapes("val").pixels, expected)
    assert "damaged" in caplog.text
    assert len(list(small_cache.iterdir())) == 1


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def _unwritable_pixels(*_: object) -> str:
    return "no array: the thread is well, writing its result fails"


@pytest.mark.parametrize("draw", [_interrupted, _unwritable_pixels])
def test_a_failed_run_leaves_no_file_and_no_thread(
    draw: Callable[..., object], monkeypatch: pytest.MonkeyPatch, small_cache: Path
) -> None:
    monkeypatch.setattr(shapes, "render", draw)
    before = threading.active_count()
    # The caught error keeps its frames: threads must not wait for the collector to be ended.
    with pytest.raises((KeyboardInterrupt, AttributeError)) as caught:
        _ = Shapes("val").pixels
    assert list(small_cache.iterdir()) == []
    assert threading.active_count() == before, caught


def test_two_at_once_both_end_well(small_cache: Path) -> None:
    """The second one finishes, and replaces the file, while the first one is still drawing."""
    first = Shapes("val")
    inner: list[np.ndarray] = []

    def render_beside(indices: range) -> np.ndarray:
        if not inner:
            inner.append(np.array(Shapes("val").pixels))
        return render(0, "val", indices)

    path, shape = small_cache / "shapes-v1-seed0-val.npy", (40, SIZE, SIZE, 3)
    outer = shapes.cached(path, shape, render_beside)
    np.testing.assert_array_equal(outer, inner[0])
    np.testing.assert_array_equal(first.pixels, inner[0])
    assert len(list(small_cache.iterdir())) == 1


def test_leftovers_of_a_killed_run_are_swept(small_cache: Path) -> None:
    small_cache.mkdir()
    old, young = (small_cache / f"shapes-v1-seed0-val.npy.{name}.tmp" for name in ("old", "young"))
    for path in (old, young):
        path.touch()
    os.utime(old, (0, 0))
    _ = Shapes("val").pixels
    assert not old.exists()
    assert young.exists()  # it may belong to a process that is drawing right now


def test_an_unwritable_cache_names_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="XDG_CACHE_HOME"):
        _ = Shapes("val").pixels


def test_a_readable_cache_needs_no_writing(small_cache: Path) -> None:
    _ = Shapes("val").pixels
    small_cache.chmod(0o555)
    try:
        assert Shapes("val").pixels.shape[0] == 40
    finally:
        small_cache.chmod(0o755)


def test_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "care-compress"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_folder() == tmp_path / "home" / ".cache" / "care-compress"


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(DataError, match="seed"):
        Shapes("val", seed=seed)
