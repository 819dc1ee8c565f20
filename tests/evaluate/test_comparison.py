"""compare.json, its budgets and what a device says, from counts that can be followed by hand."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comparison import board_results, cpu_results

from care_compress.data.loader import Batch
from care_compress.evaluate.compare import decide, device_verdict
from care_compress.evaluate.comparison import (
    CompareOptions,
    Comparison,
    Entry,
    comparison_as_json,
)
from care_compress.evaluate.latency import Latency
from care_compress.evaluate.resolve import NamedModel
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import DataSection
from care_compress.tasks.classification import (
    NO_ANSWER,
    Answers,
    Classification,
    collect_answers,
    same_answers,
)
from care_compress.tasks.distance import Distance
from care_compress.tasks.task import Collected

LABELS = np.array([0, 0, 1, 1, 2, 2, 2, 2])
BEFORE = (0, 0, 1, 1, 2, 2, 2, 0)  # right but for the last
AFTER = (0, 1, 1, 0, 2, 2, NO_ANSWER, 2)  # lost: the second, fourth, seventh; gained: the last
ONNX, XML = "onnxruntime-cpu", "openvino-cpu"


def answers(first: Sequence[int]) -> Answers:
    right = np.array(first) == LABELS
    sure = np.full(len(first), 0.7, np.float32)
    return Answers(np.array(first, np.int32), right, right, sure, Distance(10.0, 1.0))


def compared(
    folder: Path,
    found: Mapping[str, Sequence[int]],
    options: CompareOptions | None = None,
    budget: Sequence[str] = (),
    milliseconds: Mapping[str, float] | None = None,
) -> Comparison:
    """Files of two models: what the second answers on each target, and how long it takes."""
    (folder / "float.onnx").write_bytes(bytes(4_000_000))
    (folder / "mine.onnx").write_bytes(bytes(1_500_000))
    recipe = load_recipe("int8_ptq", ["budget.max_top1_drop=null", *budget])
    models = [
        NamedModel(name, dict.fromkeys(found, folder / f"{name}.onnx"), recipe=recipe)
        for name in ("float", "mine")
    ]
    entries = [Entry(t, one.name, one.files[t], "f32") for t in found for one in models]
    given = {f"{target}/float": answers(BEFORE) for target in found}
    given |= {f"{target}/mine": answers(first) for target, first in found.items()}
    samples: Any = SimpleNamespace(classes=("cat", "dog", "owl"), fingerprint=lambda: "images")
    timed = {
        (batch, 1): {
            key: Latency(tuple(np.full(3, batch * (ms + 1) - 1) for _ in range(6)), batch)
            for key, ms in (milliseconds or {}).items()
        }
        for batch in (1, 8)
    }
    return Comparison(
        Classification(),
        DataSection(source="builtin:shapes"),
        samples,
        options or CompareOptions(),
        models,
        entries,
        {},
        Collected(LABELS, np.arange(8) * 10, given),
        latency=timed,
    )


def test_a_pair_tells_what_was_lost_where_and_how_sure_that_is(tmp_path: Path) -> None:
    value = comparison_as_json(compared(tmp_path, {ONNX: AFTER}))
    (pair,) = value["pairs"]
    assert (pair["baseline"], pair["candidate"], pair["lost"], pair["gained"]) == (
        *("float", "mine"),
        *(3, 1),
    )
    assert (pair["drop"], pair["agreement"]) == (25.0, 50.0)
    assert pair["drop_ci95"][0] < 0 < 25 < pair["drop_ci95"][1]
    assert pair["mcnemar_p"] == pytest.approx(2 * (1 + 4) / 2**4)
    assert pair["drop_per_class"] == {"cat": 50.0, "dog": 50.0, "owl": 0.0}
    assert [flip["index"] for flip in pair["flipped"]] == [10, 30, 60, 70]
    assert pair["flipped"][0] == {"index": 10, "label": "cat", "before": "cat", "after": "dog"}
    assert pair["flipped"][2]["after"] == "no number" and pair["flipped_in_all"] == 4
    # 0.7 sure and right 7 times of 8, and 5 times of 8.
    assert pair["ece"] == pytest.approx({"float": 17.5, "mine": 7.5}, abs=1e-4)
    assert pair["sqnr_db"] == pytest.approx(10.0)
    assert value["models"]["mine"]["size_bytes"] == 1_500_000
    assert value["targets"][ONNX]["mine"]["not_finite"] == 1


def test_another_wrong_answer_is_a_flip_and_no_drop(tmp_path: Path) -> None:
    (pair,) = comparison_as_json(compared(tmp_path, {ONNX: (*BEFORE[:-1], 1)}))["pairs"]
    assert (pair["lost"], pair["gained"], pair["drop"], pair["agreement"]) == (0, 0, 0.0, 87.5)
    (flip,) = pair["flipped"]
    assert (flip["before"], flip["after"], flip["label"]) == ("cat", "dog", "owl")


def test_speed_is_over_the_baseline_and_throughput_of_images(tmp_path: Path) -> None:
    times = {f"{ONNX}/float": 4.0, f"{ONNX}/mine": 2.0}
    value = comparison_as_json(compared(tmp_path, {ONNX: AFTER}, milliseconds=times))
    one, eight = value["latency"]
    assert [(row["name"], row["speedup"]) for row in one["rows"]] == [("float", 1), ("mine", 2)]
    assert one["rows"][1]["speedup_ci95"] == pytest.approx([2.0, 2.0])
    assert eight["batch"] == 8 and eight["rows"][1]["latency_ms"]["p50"] == 23.0
    assert eight["rows"][1]["throughput"] == pytest.approx(8000 / 23)
    assert eight["rows"][1]["speedup"] == pytest.approx(39 / 23)
    assert one["rows"][1]["runs"] == 18 and not one["rows"][1]["noisy"]
    row = value["targets"][ONNX]["mine"]
    assert row["latency_ms"]["p50"] == 2.0, "of one image on one thread"


@pytest.mark.parametrize(
    ("budget", "value", "ok"),
    [
        ("budget.max_top1_drop=25.0", 25.0, True),
        ("budget.max_top1_drop=24.0", 25.0, False),
        ("budget.min_agreement=50.0", 50.0, True),
        ("budget.min_agreement=50.1", 50.0, False),
        ("budget.max_size=1.5", 1.5, True),
        ("budget.max_size=1.4", 1.5, False),
        (f"budget.min_speedup={{{ONNX}: 2.0}}", 2.0, True),
        (f"budget.min_speedup={{{ONNX}: 2.1}}", 2.0, False),
    ],
)
def test_a_budget_is_held_to_the_worst_target(
    tmp_path: Path, budget: str, value: float, ok: bool
) -> None:
    """On one target 25 points are lost, on the other nothing."""
    times = {f"{ONNX}/float": 4.0, f"{ONNX}/mine": 2.0, f"{XML}/float": 3.0, f"{XML}/mine": 1.0}
    found = compared(tmp_path, {XML: BEFORE, ONNX: AFTER}, None, [budget], times)
    decide(found)
    (held,) = found.budgets
    assert (held.value, held.ok) == (pytest.approx(value), ok) and found.holds is ok
    assert [one.target for one in found.verdicts] == [XML, ONNX]


def test_what_could_not_be_measured_breaks_its_budget(tmp_path: Path) -> None:
    options = CompareOptions(min_speedup=1.0)
    found = compared(tmp_path, {ONNX: AFTER}, options)
    decide(found)
    assert [(one.value, one.ok) for one in found.budgets] == [(None, False)]


@pytest.mark.parametrize(
    ("int8", "pays", "words"),
    [(3.0, True, "pays: 1.50x over FP32"), (4.45, None, "equally"), (6.0, False, "not pay: 0.75x")],
)
def test_a_device_pays_where_its_float_file_takes_longer(
    int8: float, pays: bool | None, words: str
) -> None:
    found = cpu_results("mine")
    found["models"]["int8"]["speed"]["latency_ms"]["p50"] = int8
    said = device_verdict("mine", "int8", found)
    assert said is not None and said.pays is pays and words in said.text
    board = board_results("mine")
    board["models"]["int8"]["speed"]["latency_ms"]["p50"] = 0.36 * int8 / 4.5
    said = device_verdict("mine", "int8", board)
    assert said is not None and said.pays is pays and re.search("FP16 on NVIDIA Jetson", said.text)


def test_no_answer_is_no_confidence_and_agrees_with_nothing() -> None:
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [torch.nan, 5.0, 0.0]])
    batch = Batch(torch.zeros(3, 3, 1, 1), torch.tensor([0, 0, 1]), torch.arange(3))
    models = {"a": lambda x: logits, "b": lambda x: logits + 1}
    found = collect_answers(models, {"a": "a", "b": "a"}, [batch], lambda n: None)  # type: ignore[arg-type]
    one = found.answers["a"]
    odds = [np.exp(2) / (np.exp(2) + 2), np.e / (np.e + 2), 0.0]
    assert one.confidence.tolist() == pytest.approx(odds, abs=1e-6)
    assert one.first.tolist() == [0, 1, NO_ANSWER] and one.broken == 1
    assert one.in_top5.tolist() == [True, True, False]
    assert (one.top1, same_answers(one, one)) == (pytest.approx(100 / 3), pytest.approx(200 / 3))
    # Six numbers that are 1 away: the power of the first two images is 5.
    assert found.answers["b"].sqnr_db == pytest.approx(10 * np.log10(5 / 6))
