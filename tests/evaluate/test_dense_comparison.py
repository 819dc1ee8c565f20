"""A comparison of networks whose answers have a place: told by their own metric, and drawn."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masks import TARGET, answers, compared
from PIL import Image
from rich.console import Console

from care_compress.data.loader import Batch
from care_compress.errors import RunError
from care_compress.evaluate import differences
from care_compress.evaluate.compare import accuracy_table, decide, judge
from care_compress.evaluate.comparison import comparison_as_json
from care_compress.evaluate.gate import accuracy_check, check_comparable
from care_compress.evaluate.stored_comparison import ComparedModel, read_compared
from care_compress.files import sha256_file
from care_compress.tasks.task import Drop

WRONG = [0, 200, 400, 0, 100, 300]
SAME = [100, 90, 70, 100, 95, 80]
TRUE = {"background": 100 * 6000 / 7000, "road": 100 * 5000 / 6000}
QUIET = Console(quiet=True)


def test_the_json_tells_the_metric_by_its_own_key(tmp_path: Path) -> None:
    value = json.loads(json.dumps(comparison_as_json(compared(tmp_path, WRONG, SAME))))
    row, (pair,) = value["targets"][TARGET]["mine"], value["pairs"]
    assert value["task"] == "segmentation"
    assert row["miou"] == pytest.approx(sum(TRUE.values()) / 2)
    assert row["miou_ci95"][0] < row["miou"] < row["miou_ci95"][1]
    assert pair["drop"] == pytest.approx(100 - row["miou"])
    assert pair["drop_ci95"][0] < pair["drop"] < pair["drop_ci95"][1]
    assert pair["agreement"] == pytest.approx(np.mean(SAME))
    assert pair["per_class"]["mine"] == pytest.approx({**TRUE, "car": None})
    assert pair["per_class"]["float"] == {"background": 100, "road": 100, "car": None}
    assert [one["index"] for one in pair["changed"]] == [20, 50, 10, 40]
    assert not {"top1", "mcnemar_p", "flipped"} & (row.keys() | pair.keys())
    assert value["models"]["mine"]["miou"] == row["miou"]


def test_tables_have_the_metrics_of_the_task(tmp_path: Path) -> None:
    table = accuracy_table(comparison_as_json(compared(tmp_path, WRONG, SAME)))
    heads = [column.header for column in table.columns]
    assert heads[2:7] == ["mIoU", "pixel accuracy", "drop [95 %]", "same places", "SQNR"]
    cells = {column.header: list(column.cells) for column in table.columns}
    assert cells["mIoU"] == ["100.00 %", "84.52 %"] and cells["same places"][1] == "89.17 %"


@pytest.mark.parametrize(("limit", "holds"), [(20.0, True), (15.0, False)])
def test_a_limit_is_in_points_of_the_metric(tmp_path: Path, limit: float, holds: bool) -> None:
    found = compared(tmp_path, WRONG, SAME, max_drop=limit)
    decide(found)
    (budget,) = found.budgets
    assert (budget.name, budget.ok, found.holds) == ("max_miou_drop of mine", holds, holds)


def test_a_verdict_counts_places() -> None:
    drop = Drop(0.1, 0.0, 0.2)
    said = judge("x", "mine", {"float": (2.0, 1.9, 2.1)}, drop, 99.5, 0.5, things="places")
    assert said.pays and "99.50 % of places the same" in said.text


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A comparison whose float network says road everywhere, and the other background."""

    def answering(path: str, *_: object, **__: object) -> Any:
        place = 1 if "float" in path else 0
        return lambda images: torch.eye(3)[place][None, :, None, None].expand(1, 3, 16, 16)

    def batches(*_: object, indices: list[int], **__: object) -> Any:
        for index in indices:
            yield Batch(torch.zeros(1, 3, 64, 64), torch.zeros(1), torch.tensor([index]))

    monkeypatch.setattr(differences, "open_predictor", answering)
    monkeypatch.setattr(differences, "prepared_batches", batches)
    found = compared(tmp_path, WRONG, SAME)
    differences.draw_differences(found, QUIET)
    return found


def test_the_most_changed_images_are_drawn_beside_each_other(drawn: Any, tmp_path: Path) -> None:
    value = comparison_as_json(drawn)["pictures"]
    assert [one["name"] for one in value["images"]] == [
        *("val/20.png", "val/50.png", "val/10.png", "val/40.png")
    ]
    assert list(value["legend"]) == ["road"], "what is drawn, and no class that is not"
    (first, *_) = value["images"]
    assert first["agreement"] == 70
    pixels = {}
    for kind, one in first["pictures"].items():
        path = tmp_path / "mine" / one["file"]
        assert sha256_file(path) == one["sha256"]
        with Image.open(path) as picture:
            pixels[kind] = np.asarray(picture.convert("RGB")).astype(int)
    assert len({one.shape for one in pixels.values()}) == 1, "they stand side by side"
    assert (pixels["image"][50, 50] == (20, 90, 90)).all()
    assert np.ptp(pixels["before"][50, 50]) > 30 and np.ptp(pixels["after"][50, 50]) == 0


def test_pictures_of_an_earlier_comparison_are_gone(drawn: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / differences.FOLDER
    assert len(list(folder.iterdir())) == 3 * 4
    drawn.collected.answers[f"{TARGET}/mine"].agreed[2:] = [(100, 100)] * 4
    differences.draw_differences(drawn, QUIET)
    assert {path.name[0] for path in folder.iterdir()} == {"1"}


def stored(folder: Path, wrong: list[int], change: Any = None) -> ComparedModel:
    value = comparison_as_json(compared(folder, wrong, [99] * len(wrong)))
    if change is not None:
        change(value)
    path = folder / "compare.json"
    path.write_text(json.dumps(value))
    return read_compared(path, "mine", "again")


def test_the_gate_holds_the_metric_of_the_task(tmp_path: Path) -> None:
    steady = [20] * 40
    before = stored(tmp_path / "before", steady)
    same = accuracy_check(before, stored(tmp_path / "same", steady), TARGET, 0.3)
    assert (same.what, same.regressed) == ("mIoU", False)
    worse = accuracy_check(before, stored(tmp_path / "worse", [120] * 40), TARGET, 0.3)
    assert worse.regressed and worse.text.startswith("mIoU fell by 9.") and "98." in worse.text


@pytest.mark.parametrize("known", [True, False])
def test_what_the_float_file_lost_is_held_where_its_interval_is_stored(
    tmp_path: Path, known: bool
) -> None:
    def change(value: Any) -> None:
        row = value["targets"][TARGET]["float"]
        row["miou"] = 60.0
        row["miou_ci95"] = [58.0, 62.0]
        if not known:
            del row["miou_ci95"]

    before, now = stored(tmp_path / "a", [20] * 40), stored(tmp_path / "b", [20] * 40, change)
    found = accuracy_check(before, now, TARGET, 0.3)
    assert found.regressed is known
    assert ("which cannot be held" in found.text) is not known


def test_a_baseline_of_another_task_is_refused(tmp_path: Path) -> None:
    def change(value: Any) -> None:
        value["task"] = "detection"

    before, now = stored(tmp_path / "a", [20], change), stored(tmp_path / "b", [20])
    with pytest.raises(RunError, match="is of detection"):
        check_comparable(before, now)


def test_what_is_drawn_is_of_the_target_where_most_changed(drawn: Any) -> None:
    on = drawn.collected.answers
    for name, one in zip(("float", "mine"), drawn.models, strict=True):
        drawn.entries.append(replace(drawn.entry(TARGET, name), target="openvino-cpu"))
        one.files["openvino-cpu"] = one.files[TARGET]
        on[f"openvino-cpu/{name}"] = on[f"{TARGET}/{name}"]
    on[f"{TARGET}/mine"] = answers(WRONG, [99] * len(WRONG))
    differences.draw_differences(drawn, QUIET)
    assert drawn.pictures["target"] == "openvino-cpu"
    on["openvino-cpu/mine"] = answers(WRONG, [100] * len(WRONG))
    differences.draw_differences(drawn, QUIET)
    assert drawn.pictures["target"] == TARGET
