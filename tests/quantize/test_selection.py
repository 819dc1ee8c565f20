import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CLASSES, image_folder

import care_compress
from care_compress.data.loader import BadImages
from care_compress.data.samples import Samples
from care_compress.data.sources import open_samples
from care_compress.errors import BadImageError, CalibrationError, RecipeError
from care_compress.model.rewrite import rewrite
from care_compress.quantize.selection import (
    CalibrationSet,
    deep_features,
    read_list,
    select_images,
    write_list,
)
from care_compress.recipe.quantize import CalibrateSection
from care_compress.recipe.sections import DataSection

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "images")


@pytest.fixture
def samples(folder: Path) -> Samples:
    return open_samples(DataSection(source=str(folder), resolution=32), "train")


def select(samples: Samples, seed: int = 0, **settings: object) -> CalibrationSet:
    def features(indices: list[int]) -> tuple[np.ndarray, torch.Tensor]:
        means = [np.asarray(samples.image(i).convert("RGB")).mean(axis=(0, 1)) for i in indices]
        return np.array(indices), torch.tensor(np.array(means), dtype=torch.float32)

    return select_images(samples, CalibrateSection.model_validate(settings), seed, features)


@pytest.mark.parametrize("method", ["random", "stratified", "diverse"])
def test_a_choice_is_the_seeds_and_has_no_image_twice(samples: Samples, method: str) -> None:
    chosen = select(samples, images=40, method=method)
    assert len(set(chosen.indices)) == 40
    assert select(samples, images=40, method=method).indices == chosen.indices
    assert select(samples, seed=1, images=40, method=method).indices != chosen.indices


def test_stratified_takes_the_same_number_of_every_class(samples: Samples) -> None:
    chosen = select(samples, images=40, method="stratified")
    assert set(Counter(samples.labels[list(chosen.indices)].tolist()).values()) == {10}
    uneven = select(samples, images=41, method="stratified")
    counts = Counter(samples.labels[list(uneven.indices)].tolist())
    assert sorted(counts.values()) == [10, 10, 10, 11]


def test_diverse_reaches_every_cluster_where_random_need_not(tmp_path: Path) -> None:
    """One image in ten is red: drawing by cluster takes more of them than chance does."""
    for i in range(160):
        colour = (250, 20, 20) if i % 10 == 0 else (20 + i % 5, 120 + i % 7, 30)
        path = tmp_path / "train" / ("b" if i % 10 == 0 else "a") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), colour).save(path)
    lopsided = open_samples(DataSection(source=str(tmp_path), resolution=32), "train")
    found = {
        method: sum(
            int(
                lopsided.labels[
                    list(select(lopsided, seed, images=32, method=method).indices)
                ].sum()
            )
            for seed in range(8)
        )
        for method in ("random", "diverse")
    }
    assert found["diverse"] > found["random"]


def test_more_images_than_there_are_takes_all(samples: Samples) -> None:
    assert len(select(samples, images=10_000).indices) == len(samples) == 24 * len(CLASSES)


def test_a_list_names_images_and_is_found_again(samples: Samples, tmp_path: Path) -> None:
    chosen = select(samples, images=12)
    write_list(tmp_path / "list.json", chosen)
    content = json.loads((tmp_path / "list.json").read_text())
    assert all(len(entry["sha256"]) == 64 and "/" in entry["name"] for entry in content["images"])
    assert read_list(tmp_path / "list.json", samples).indices == chosen.indices


def test_a_list_that_does_not_fit_is_refused(
    samples: Samples, folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "list.json"
    write_list(path, select(samples, images=4))
    name = json.loads(path.read_text())["images"][0]["name"]
    changed = next(p for p in folder.rglob("*.png") if str(p).endswith(name))
    Image.new("RGB", (32, 32)).save(changed)
    with pytest.raises(CalibrationError, match="pixels differ"):
        read_list(path, samples)
    for text, message in (
        ('{"images": []}', "lists no image"),
        ('{"images": [{"name": "train/red/none.png", "sha256": "0"}]}', "does not have"),
        ("[1, 2]", "no calibration list"),
        ("not json", "no calibration list"),
    ):
        path.write_text(text)
        with pytest.raises(CalibrationError, match=message):
            read_list(path, samples)
    with pytest.raises(CalibrationError, match="cannot read"):
        read_list(tmp_path / "absent.json", samples)


def test_a_saved_list_is_used_in_an_order_of_the_seed(samples: Samples, tmp_path: Path) -> None:
    whole = select(samples, images=40)
    by_class = np.argsort(samples.labels[list(whole.indices)], kind="stable")
    ordered = replace(
        whole,
        indices=tuple(whole.indices[i] for i in by_class),
        digests=tuple(whole.digests[i] for i in by_class),
    )
    write_list(tmp_path / "list.json", ordered)
    used = select(samples, list=str(tmp_path / "list.json"))
    assert sorted(used.indices) == sorted(whole.indices) and used.indices != ordered.indices
    assert len(set(samples.labels[list(used.indices[:12])].tolist())) > 1, "not class by class"
    digests = dict(zip(ordered.indices, ordered.digests, strict=True))
    assert all(digests[i] == d for i, d in zip(used.indices, used.digests, strict=True))


@pytest.mark.parametrize("method", ["random", "stratified", "diverse"])
def test_bad_images_are_replaced_where_the_recipe_skips_them(
    samples: Samples, folder: Path, method: str
) -> None:
    network = rewrite(care_compress.build_model("care_nano", 4))
    data = DataSection(source=str(folder), resolution=32, workers=0, skip_bad_images=True)
    section = CalibrateSection(images=40, method=method)
    for path in sorted((folder / "train").rglob("*.png"))[::2]:
        path.write_bytes(b"no image")
    bad = BadImages()
    features = deep_features(network, samples, data)
    chosen = select_images(samples, section, 0, features, True, bad)
    assert len(chosen.indices) == len(set(chosen.indices)) == 40
    assert not any(samples.name(i) in bad.reasons for i in chosen.indices)
    assert method == "diverse" or bad.reasons, "and they are reported"
    if method != "diverse":
        with pytest.raises(BadImageError):
            select_images(samples, section, 0, features)


def test_the_script_writes_a_list_from_any_directory(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "calibration" / "select.py"), "int8_ptq", "mine.json",
         "--data", str(folder), "--res", "32", "--images", "8", "--method", "diverse"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(json.loads((tmp_path / "mine.json").read_text())["images"]) == 8


def test_diverse_leaves_outliers_out(samples: Samples) -> None:
    """Every 25th image has features of another size than all others."""
    far = set(range(0, len(samples), 25))
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(len(samples), 8), dim=1)
    features[sorted(far)] *= 50

    def compute(indices: list[int]) -> tuple[np.ndarray, torch.Tensor]:
        return np.array(indices), features[indices]

    section = CalibrateSection(images=24, method="diverse")
    chosen = select_images(samples, section, 0, compute)
    assert len(far) >= 3 and not far & set(chosen.indices)


def test_what_is_chosen_is_chosen_on_images_that_calibrate_nothing(samples: Samples) -> None:
    chosen = select(samples, images=32)
    few, rest = chosen.held_back(10), chosen.held_back(10_000)
    assert len(few) == len(set(few)) == 10 and not set(few) & set(chosen.indices)
    assert sorted({*rest, *chosen.indices}) == list(range(len(samples)))
    assert few[0] < len(samples) // 4 and few[-1] > len(samples) // 2, "spread over the split"
    with pytest.raises(RecipeError, match=r"none is left to choose by.*calibrate\.images"):
        select(samples, images=len(samples)).held_back(10)
