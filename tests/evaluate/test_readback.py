"""A file read back on another processor: near enough, or told with both numbers."""

import json

import pytest
import torch

from care_compress.evaluate.agreement import HeldImages, drop_on_held
from care_compress.evaluate.compare import judge
from care_compress.evaluate.readback import (
    ReadBack,
    counted_only,
    exports_check,
    read_back,
    read_back_checks,
    what_failed,
)
from care_compress.recipe.sections import DataSection
from care_compress.tasks.classification import Classification
from care_compress.tasks.intervals import unpaired_interval
from care_compress.tasks.task import Drop

TOP1 = Classification.metric


def answers(images: int = 400, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are right for nine images in ten, and the labels."""
    torch.manual_seed(0)
    labels = torch.arange(images) % classes
    logits = torch.randn(images, classes)
    logits[torch.arange(images), labels] += 8
    logits[::10] = logits[::10].roll(1, dims=1)
    return logits, labels


def beside(
    model: torch.Tensor, file: torch.Tensor, labels: torch.Tensor, least_db: float
) -> ReadBack:
    """Answers of a file beside its model's, to images of these labels."""
    held = HeldImages(torch.zeros(len(labels), 3, 1, 1), labels, DataSection(source="none"))
    return read_back(Classification(), model, file, held, least_db)


def test_a_file_of_another_processor_holds_by_what_its_export_promised() -> None:
    logits, labels = answers()
    near = beside(logits, logits + 0.01 * torch.randn_like(logits), labels, 25.0)
    assert near.holds and near.value == near.model_value == pytest.approx(90.0)
    spoiled = torch.cat([logits[:200].roll(2, dims=1), logits[200:]])
    far = beside(logits, spoiled, labels, 25.0)
    assert not far.holds
    assert "top-1 45.00 % where its model has 90.00 %, on the same 400 images" in str(far)
    assert "of at least 25.0" in str(far) and far.as_json()["holds"] is False
    coarse = logits + 0.7 * torch.randn_like(logits)
    assert not beside(logits, coarse, labels, 25.0).holds
    lost = beside(logits, torch.full_like(logits, torch.nan), labels, 25.0)
    assert not lost.holds and "NaN" in str(lost) and lost.value == 0
    json.dumps(lost.as_json(), allow_nan=False)


def test_a_drop_on_held_images_counts_what_is_no_number_as_wrong() -> None:
    """A placement that overflows has lost everything; that is a number, and no reason to stop."""
    logits, labels = answers()
    held = HeldImages(torch.zeros(400, 3, 1, 1), labels, DataSection(source="none"))
    for spoiled, lost in ((logits, 0.0), (torch.full_like(logits, torch.nan), 90.0)):
        drop = drop_on_held(Classification(), logits, spoiled, held)
        assert drop.value == pytest.approx(lost) and drop.low <= lost <= drop.high


def test_as_many_right_answers_to_other_images_are_not_the_same_answers() -> None:
    """The drop would be nothing, and the file is not the model all the same."""
    labels = torch.tensor([0, 1] * 100)
    model = torch.nn.functional.one_hot(labels, 2).float()
    model[:20] = model[:20].flip(1)
    file = torch.nn.functional.one_hot(labels, 2).float()
    file[-20:] = file[-20:].flip(1)
    found = beside(model, file, labels, 3.9)
    assert found.value == found.model_value == pytest.approx(90.0)
    assert not found.holds and "80.0 % of answers are the same" in str(found)


def test_where_only_counts_are_known_chance_is_allowed_for() -> None:
    assert not counted_only(TOP1, 47.0, 4000, 94.0, 4000).holds
    assert counted_only(TOP1, 93.5, 4000, 94.0, 4000).holds
    assert not counted_only(TOP1, 92.5, 4000, 94.0, 4000).holds
    assert counted_only(TOP1, 92.5, 200, 94.0, 4000).holds, "few images say little"
    assert counted_only(TOP1, 97.0, 4000, 94.0, 4000).holds, "a target may leave layers in float"
    assert counted_only(TOP1, 100.0, 10, 100.0, 10).holds
    assert "a difference of [" in str(counted_only(TOP1, 47.0, 4000, 94.0, 4000))


def test_an_unpaired_interval_covers_the_true_difference_nineteen_times_in_twenty() -> None:
    torch.manual_seed(0)
    covered = 0
    for _ in range(400):
        before, after = (torch.rand(500) < 0.94), (torch.rand(500) < 0.91)
        low, high = unpaired_interval(
            100 * float(before.float().mean()), 500, 100 * float(after.float().mean()), 500
        )
        covered += low <= 3.0 <= high
    assert 0.92 * 400 <= covered <= 0.985 * 400


def test_what_is_wrong_what_failed_and_what_is_unknown_are_told_apart() -> None:
    logits, labels = answers(40)
    good, bad = beside(logits, logits, labels, 25), beside(logits, -logits, labels, 25)
    (fine,) = read_back_checks({"cpu/a": good}, {}, {})
    assert fine.status == "fine" and "of 1" in fine.text
    wrong, unknown = read_back_checks(
        {"cpu/a": good, "cpu/b": bad}, {"npu/b": "the export failed: no"}, {"cpu/c": "no run"}
    )
    assert wrong.status == "warning" and wrong.text.startswith("2 of 3 files")
    assert wrong.items[0].startswith("cpu/b: top-1 0.00 % where its model has 90.00 %")
    assert wrong.items[1] == "npu/b: the export failed: no"
    assert (unknown.status, unknown.items) == ("not measured", ("cpu/c: no run",))
    (again,) = read_back_checks({"cpu/a": good}, {"cpu/a": "wrong where it was made"}, {})
    assert again.status == "warning" and again.text.startswith("1 of 1"), "one file, one processor"


def test_a_file_that_is_not_its_model_never_pays() -> None:
    speedups = {"fp32": (3.0, 2.9, 3.1)}
    drop = Drop(0.0, -0.1, 0.1)
    assert judge("openvino-cpu", "int8", speedups, drop, 100.0, 0.3).pays is True
    fault = judge("openvino-cpu", "int8", speedups, drop, 100.0, 0.3, fault="80 % agree")
    assert fault.pays is False and "does not pay" in fault.text and "80 % agree" in fault.text
    assert judge("openvino-cpu", "int8", {}, None, None, 0.3, fault="failed").pays is False


def model(file: str, holds: bool = True, **more: object) -> dict[str, object]:
    near = {"agreement": 62.5 if not holds else 100.0, "sqnr_db": 8.0, "least_sqnr_db": 25.0}
    return {"file": file, "holds": holds, **near, **more}


def test_exports_are_one_finding() -> None:
    good = {"target": "a", "models": {"int8": model("int8.onnx"), "fp16": model("fp16.onnx")}}
    skipped = {"target": "b", "skipped": "it has no such bits"}
    failed = {"target": "c", "failed": "stem.0 reaches 1e7, float16 ends at 65504."}
    off = model("int8.xml", False, parts_at="stem.0")
    differs = {"target": "d", "models": {"int8": off, "fp16": model("fp16.onnx", False)}}
    fine = exports_check({"a": good, "b": skipped})
    assert fine.status == "fine" and "of 2" in fine.text
    assert exports_check({"b": skipped}).status == exports_check({}).status == "not measured"
    found = exports_check({"a": good, "b": skipped, "c": failed, "d": differs})
    assert found.status == "warning" and found.text.startswith("3 of 5 files")
    assert found.items[0] == "c: the export failed: stem.0 reaches 1e7, float16 ends at 65504."
    assert found.items[1] == (
        "d, int8.xml: 62.5 % of answers as its model's, 8.0 dB of at least 25.0; it parts at stem.0"
    )
    assert list(what_failed(differs, "int8")) == ["int8.xml"]
    assert what_failed(good) == what_failed(skipped) == what_failed(differs, "fp32") == {}
    nothing = {"target": "e", "models": {"int8": model("int8.onnx", False, sqnr_db=None)}}
    assert "NaN" in exports_check({"e": nothing}).items[0]
