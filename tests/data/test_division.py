"""How a set is divided, listed, told apart and looked through for copies, by hand."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from care_compress.data.checks import Contents, coverage_check, digest_of, overlap_checks
from care_compress.data.listing import Listing, PackedNames, Part, summary
from care_compress.data.loader import images_at_once, steps_per_epoch
from care_compress.data.samples import spread_indices
from care_compress.data.transforms import TrainTransform, resized_size
from care_compress.recipe.sections import AugmentSection


def listing(sizes: list[int], skip: int = 0) -> Listing:
    """A class of each size, its images named by number."""
    labels = np.repeat(np.arange(len(sizes)), sizes)[skip:]
    names = [f"{label}/{row}".encode() for row, label in enumerate(labels, skip)]
    return Listing(PackedNames(names), labels, tuple(f"c{i}" for i in range(len(sizes))))


def divided(whole: Listing, fraction: float) -> tuple[list[int], list[int]]:
    train, val = (Part(split, None, fraction).rows(whole).tolist() for split in ("train", "val"))
    return train, val


def test_every_class_gives_its_share_to_validation_and_keeps_one_to_train_on() -> None:
    whole = listing([1, 2, 7, 40, 3])
    train, val = divided(whole, 0.25)
    assert sorted(train + val) == list(range(53)) and val == sorted(val)
    # 0.25, 0.5, 1.75, 10 and 0.75 images; at least one, and never all.
    assert np.bincount(whole.labels[val], minlength=5).tolist() == [0, 1, 2, 10, 1]
    assert np.bincount(whole.labels[divided(whole, 0.9)[1]]).tolist() == [0, 1, 6, 36, 2]


def test_an_image_keeps_its_place_when_others_go() -> None:
    whole, fewer = listing([400, 400]), listing([400, 400], skip=40)
    before = {whole.names[row] for row in divided(whole, 0.5)[1]}
    after = {fewer.names[row] for row in divided(fewer, 0.5)[1]}
    left = {fewer.names[row] for row in range(len(fewer.names))}
    assert len(before & left ^ after) < 0.1 * len(after)


def test_a_listing_is_another_one_for_other_names_labels_or_classes() -> None:
    def fingerprint(names: list[bytes], labels: list[int], classes: tuple[str, ...]) -> str:
        return Listing(PackedNames(names), np.array(labels), classes).fingerprint()

    usual = fingerprint([b"ab", b"c"], [0, 1], ("x", "y"))
    assert usual == fingerprint([b"ab", b"c"], [0, 1], ("x", "y"))
    others = [
        fingerprint([b"a", b"bc"], [0, 1], ("x", "y")),
        fingerprint([b"ab", b"d"], [0, 1], ("x", "y")),
        fingerprint([b"ab", b"c"], [1, 0], ("x", "y")),
        fingerprint([b"ab", b"c"], [0, 1], ("y", "x")),
    ]
    assert len({usual, *others}) == 5


def test_a_summary_names_five_and_counts_the_rest() -> None:
    assert summary("gfedcba") == "a, b, c, d, e and 2 more"
    assert summary("edcba") == "a, b, c, d, e" and summary([]) == ""


def test_images_are_spread_evenly_from_the_first() -> None:
    assert spread_indices(10, 5) == [0, 2, 4, 6, 8]
    assert spread_indices(10, 4) == [0, 2, 5, 7]
    assert spread_indices(3, 10) == spread_indices(3, None) == [0, 1, 2]


def test_an_epoch_has_full_batches_only() -> None:
    samples = cast(Any, range(50))
    assert [steps_per_epoch(samples, size) for size in (8, 25, 26, 50)] == [6, 2, 1, 1]


def test_few_images_at_once_on_a_cpu_many_on_a_gpu_and_as_asked() -> None:
    assert images_at_once(None, torch.device("cpu")) == 16
    assert images_at_once(None, torch.device("cuda")) == 256
    assert images_at_once(3, torch.device("cuda")) == 3


def samples(labels: list[int], classes: str = "abc") -> Any:
    return SimpleNamespace(
        labels=np.array(labels), classes=tuple(classes), name=lambda index: f"image {index}"
    )


def counted(labels: list[int]) -> tuple[tuple[str, ...], Any]:
    """Three classes, and how many images each has."""
    return ("a", "b", "c"), np.bincount(labels, minlength=3)


def seen(*digests: int) -> Contents:
    contents = Contents()
    contents.add(range(len(digests)), digests)
    return contents


def test_copies_in_validation_are_counted_and_those_of_another_class_come_first() -> None:
    found, *_ = overlap_checks(samples([0, 0, 1, 1, 2]), seen(3, 3, 5, 9, 5), [])
    assert found.status == "warning"
    assert found.text.startswith("2 of 5 validation images are copies")
    assert found.text.endswith("1 of them under another class")
    assert found.items == ("image 4 = image 2", "image 1 = image 0")
    fine, *_ = overlap_checks(samples([0, 0]), seen(1, 2), [])
    assert fine.status == "fine"


def test_calibration_images_among_those_validated_on_are_named() -> None:
    calibration = [("x", 5), ("y", 6), ("z", 9), ("w", 2**64 - 1)]
    _, found = overlap_checks(samples([0, 0, 0]), seen(9, 4, 5), calibration)
    assert found.status == "warning" and found.text.startswith("2 of 4 calibration images")
    assert found.items == ("x = image 2", "z = image 0")
    _, unknown = overlap_checks(samples([0]), seen(9), None)
    assert unknown.status == "not measured"


def test_contents_are_kept_as_text_and_each_image_once() -> None:
    contents = seen(2**64 - 1, 3)
    again = Contents.of_text(contents.as_text())
    assert [part.tolist() for part in again.sorted()] == [[1, 0], [3, 2**64 - 1]]
    both = Contents()
    both.take([contents, again, seen(2**64 - 1, 3, 8)])
    assert len(both) == 3
    cut = contents.as_text().split("\n")
    assert len(Contents.of_text(f"{cut[0]}\n{cut[1][:8]}")) == 0, "damaged"
    assert digest_of(b"a") != digest_of(b"b") and 0 <= digest_of(b"a") < 2**64


def test_classes_that_no_image_belongs_to_are_named() -> None:
    found = coverage_check(*counted([0, 0, 2]))
    assert found.status == "warning" and found.items == ("b",)
    fine = coverage_check(*counted([0, 0, 1, 2]))
    assert fine.status == "fine" and "at least 1 " in fine.text


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((100, 200), (50, 100)),
        ((200, 100), (100, 50)),
        ((60, 60), (50, 50)),
        ((6, 11), (50, 91)),
        ((11, 6), (91, 50)),
    ],
)
def test_the_shorter_side_is_resized_and_the_longer_is_cut(
    size: tuple[int, int], resized: tuple[int, int]
) -> None:
    assert resized_size(size, 50) == resized


def test_what_is_erased_is_a_fiftieth_to_a_third_and_never_all() -> None:
    augment = AugmentSection(scale=(1, 1), ratio=(1, 1), flip=0.0, erase=0.999)
    transform, black = TrainTransform(32, augment), Image.new("RGB", (32, 32))
    shares = [
        float((transform(black, (0, 0, index)) > 0).any(dim=0).float().mean())
        for index in range(300)
    ]
    assert 0.01 < min(shares) < 0.04 and 0.28 < max(shares) < 0.36
    tall = TrainTransform(4, augment)
    tiny = Image.new("RGB", (4, 4))
    whole = [(tall(tiny, (0, 0, i)) > 0).any(dim=0) for i in range(200)]
    assert not any(bool(rows.any(dim=1).all() or rows.any(dim=0).all()) for rows in whole)
