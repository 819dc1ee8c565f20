"""What a run's numbers rest on is checked, and what is wrong is said everywhere a reader looks."""

import json
import math
import shutil
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized import SIZE, care, network, section, spoil_weights
from rich.console import Console
from tiny import image_folder, recipe_file

from care_compress.data.checks import Contents, overlap_checks
from care_compress.data.loader import BadImages, Batch, evaluation_batches
from care_compress.data.sources import open_samples
from care_compress.data.transforms import EvalTransform
from care_compress.errors import (
    CalibrationError,
    CareError,
    DataError,
    EvaluationError,
    ExportError,
    RunError,
)
from care_compress.evaluate.accuracy import answers_check
from care_compress.evaluate.agreement import Agreement, compare_logits
from care_compress.export.result import Exported, File
from care_compress.files import json_text
from care_compress.model.checkpoint import save_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.quantize.calibrate import calibrate
from care_compress.quantize.health import Health, share_cut
from care_compress.quantize.placement import simulate
from care_compress.quantize.ptq import planned
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import DataSection
from care_compress.recipe.target import load_target
from care_compress.report.write import write_report
from care_compress.tasks.classification import collect_answers, count_batch, count_pairs

QUIET = Console(quiet=True)
CLIPPING = {
    "quantize.rules": [{"weight": 8, "input": {"bits": 8, "range": "percentile"}}],
    "quantize.calibrate.percentile": 90.0,
    "quantize.target": None,
}


def small(folder: Path, checkpoint: Path) -> dict[str, object]:
    return {
        "model.checkpoint": str(checkpoint),
        "data.source": str(folder),
        "data.resolution": 32,
        "data.workers": 0,
        "export.targets": [],
        "quantize.calibrate.images": 96,
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "four.safetensors"
    save_checkpoint(care(4), path, {})
    return path


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A run of everything that can be wrong with data and ranges: its folder, results, console."""
    folder = tmp_path_factory.mktemp("sick")
    images = image_folder(folder / "images")
    shutil.rmtree(images / "val" / "grey")
    shutil.copy(images / "val" / "red" / "3.png", images / "train" / "blue" / "3.png")
    shutil.copy(images / "val" / "red" / "4.png", images / "val" / "blue" / "[b]4.png")
    shutil.copy(images / "val" / "red" / "5.png", images / "val" / "red" / "5b.png")
    model = care(4)
    norm = next(m for m in model.stem if isinstance(m, torch.nn.BatchNorm2d))
    norm.weight.data[:3] = 0  # their output is the bias, whatever the image
    save_checkpoint(model, folder / "sick.safetensors", {})
    recipe = load_recipe("int8_ptq", [], {**small(images, folder / "sick.safetensors"), **CLIPPING})
    text = StringIO()
    results = run_recipe(recipe, folder, "sick", Console(file=text, width=200))
    return folder / "sick", results, text.getvalue()


def check_of(results: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [one for one in results["checks"] if one["check"] == name]
    return dict(found)


def test_every_fault_of_data_and_ranges_is_counted_and_named(
    sick: tuple[Path, dict[str, Any], str],
) -> None:
    _, results, _ = sick
    shared = check_of(results, "duplicate images in calibration and validation")
    assert shared["items"] == ["train/blue/3.png = val/red/3.png"] and "1 of 96" in shared["text"]
    within = check_of(results, "duplicate images in validation")
    assert within["count"] == 2 and "2 of 38" in within["text"] and "1 of them" in within["text"]
    assert set(within["items"][0].split(" = ")) == {"val/red/4.png", "val/blue/[b]4.png"}, "worst"
    assert check_of(results, "classes")["items"] == ["grey"]
    dead = check_of(results, "dead channels")
    assert "3 of " in dead["text"] and dead["items"][0].endswith(" 3 of 16")
    cut = check_of(results, "saturated ranges")
    shares = [float(item.split()[-2]) for item in cut["items"]]
    assert cut["count"] > 10 and shares == sorted(shares, reverse=True)
    assert 2 <= shares[-1] <= shares[0] < 30, "a range of 90 % cuts off about a tenth"
    assert check_of(results, "answers")["status"] == "fine"
    statuses = [one["status"] for one in results["checks"]]
    assert statuses == sorted(statuses, key=["warning", "not measured", "fine"].index)


def test_faults_are_on_the_console_in_the_file_and_in_the_report(
    sick: tuple[Path, dict[str, Any], str],
) -> None:
    run, results, console = sick
    lines = [line for line in console.splitlines() if line.startswith("take note: ")]
    assert len(lines) == sum(one["status"] == "warning" for one in results["checks"]) == 5
    (cut,) = [line for line in lines if "saturated" in line]
    assert cut.count("stage") == 3 and "more)" in cut, "worst first, and how many more"
    assert any("[b]4.png" in line for line in lines), "a name is no markup"
    assert json.loads((run / "results.json").read_text())["checks"] == results["checks"]
    write_report(run, QUIET)
    text = (run / "report.md").read_text()
    part = text.partition("## What to know about these numbers")[2].partition("\n## ")[0]
    for check in ("duplicate images in validation", "classes", "dead channels", "saturated"):
        assert f"✗ {check}" in part, check
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev extra")
    schema = Path(write_report.__code__.co_filename).with_name("results.schema.json")
    jsonschema.validate(json.loads(json.dumps(results)), json.loads(schema.read_text()))


def test_a_file_that_is_not_its_model_is_told_before_the_run_fails(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = "stages.1.blocks.0.inter_layer.inter2_fc1"
    spoil_weights(monkeypatch, site)
    exporting = {"export.targets": ["onnxruntime-cpu"], "export.images": 32}
    given = {**small(image_folder(tmp_path / "images"), checkpoint), **exporting}
    text = StringIO()
    recipe = load_recipe("int8_ptq", [], given)
    with pytest.raises(ExportError, match="does not compute what the model does"):
        run_recipe(recipe, tmp_path, "run", Console(file=text, width=200))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    found = check_of(results, "exports")
    assert found["status"] == "warning" and results["checks"][0] == found, "worst first"
    (item,) = found["items"]
    assert item.startswith("onnxruntime-cpu, int8.onnx: ") and f"it parts at {site}" in item
    assert "take note: exports: 1 of 1 files" in text.getvalue()
    write_report(tmp_path / "run", QUIET)
    for name in ("report.md", "report.html"):
        report = (tmp_path / "run" / name).read_text()
        assert "✗ exports: 1 of 1 files" in report and "Nothing was found" not in report, name
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev extra")
    schema = Path(write_report.__code__.co_filename).with_name("results.schema.json")
    jsonschema.validate(results, json.loads(schema.read_text()))


def test_a_sound_run_says_that_all_is_fine(checkpoint: Path, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    exporting = {"export.targets": ["onnxruntime-cpu"], "export.images": 8}
    recipe = load_recipe("int8_ptq", [], {**small(folder, checkpoint), **exporting})
    text = StringIO()
    results = run_recipe(recipe, tmp_path, "run", Console(file=text, width=200))
    assert {one["status"] for one in results["checks"]} == {"fine"} and len(results["checks"]) == 8
    assert "take note" not in text.getvalue()


def test_an_image_counts_once_however_often_it_is_read(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", per_class=4)
    data = DataSection(source=str(folder), resolution=32, workers=0)
    samples = open_samples(data, "val")
    parts = [Contents(), Contents(), Contents()]
    for part, indices in zip(parts, ([0, 1, 2, 3], [4, 5, 6, 7], [0, 1]), strict=True):
        list(
            evaluation_batches(
                samples, EvalTransform(32, 1.0), 3, data, bad=BadImages(), indices=indices,
                contents=part,
            )
        )  # fmt: skip
    whole = Contents()
    whole.take(parts)
    assert len(whole) == len(samples) == 8
    assert [one.status for one in overlap_checks(samples, whole, [])] == ["fine"]
    again = Contents.of_text(whole.as_text())
    assert all((a == b).all() for a, b in zip(again.sorted(), whole.sorted(), strict=True))
    assert len(Contents.of_text("no such\nthing")) == 0, "a damaged file tells nothing"
    unknown = overlap_checks(samples, whole, None)[-1]
    assert unknown.status == "not measured" and "calibration" in unknown.check
    (found,) = overlap_checks(samples, Contents(), [])
    assert found.status == "not measured", "nothing was read: not the same as nothing found"


def logits(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


NAN, INF = float("nan"), float("inf")
MIXED = logits([1, 0, 0], [0, NAN, 0], [0, 0, INF], [0, 0, 1])
BATCH = Batch(torch.zeros(4, 3, 1, 1), torch.tensor([0, 1, 2, 0]), torch.arange(4))


def test_what_is_no_number_is_never_a_right_answer() -> None:
    accuracy = count_batch(lambda images: MIXED, BATCH)
    assert (accuracy.images, accuracy.correct, accuracy.broken) == (4, 1, 2)
    finding = answers_check({"float": accuracy})
    assert finding.status == "warning" and finding.items == ("float: 2 of 4",)
    broken = count_batch(lambda images: torch.full((4, 3), NAN), BATCH)
    with pytest.raises(EvaluationError, match="NaN or infinity to all 4 images"):
        _ = broken.top1
    assert (broken + accuracy).top1 == pytest.approx(12.5)


def test_two_models_do_not_agree_on_nan() -> None:
    sound = logits([1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1.5])
    paired = count_pairs(lambda images: MIXED, lambda images: sound, [BATCH])
    assert paired.agreeing == 2 and paired.gained == 2 and paired.baseline.broken == 2
    assert np.isfinite(paired.distance.sqnr_db), "of the images that both answered"
    both = count_pairs(lambda images: MIXED, lambda images: MIXED, [BATCH])
    assert both.agreeing == 2
    answers = collect_answers(
        {"a": lambda images: sound, "b": lambda images: MIXED}, {"a": "a", "b": "a"}, [BATCH], print
    ).answers["b"]
    assert answers.broken == 2 and np.isfinite(answers.confidence).all()
    assert answers.first.tolist() == [0, -1, -1, 2] and answers.right.tolist()[1:3] == [False] * 2
    with pytest.raises(EvaluationError, match="b answers NaN"):
        collect_answers({"b": lambda images: MIXED * NAN}, {"b": "b"}, [BATCH], print)


def test_a_file_of_nan_has_no_distance_but_a_reason() -> None:
    near = compare_logits(torch.eye(3), torch.full((3, 3), NAN))
    found = near.as_json()
    assert not near.holds and str(near) == "no numbers" and found["sqnr_db"] is None
    assert "NaN" in found["not_measured"]["sqnr_db"]
    assert "not_measured" not in compare_logits(torch.eye(3), torch.eye(3)).as_json()


def test_no_file_of_results_can_hold_nan() -> None:
    good = {"a": [1.5, None, {"b": (2, "NaN")}]}
    assert json.loads(json_text(good)) == {"a": [1.5, None, {"b": [2, "NaN"]}]}
    for wrong in (NAN, INF, -INF):
        with pytest.raises(RunError, match=r"^a\.1\.b\.0 came out as no number"):
            json_text({"z": 1, "a": [1, {"b": [wrong]}]})


@pytest.mark.parametrize("value", [INF, -INF])
def test_an_infinity_that_the_logits_hide_is_found_where_it_is(value: float) -> None:
    model, plan = planned(network(), section(), SIZE)
    graph = simulate(model, plan)
    chosen = next(q for q in graph.integers("input") if "inter1_fc2" in q.site)

    def spoil(module: object, inputs: tuple[torch.Tensor]) -> None:
        inputs[0][0] = value  # of one image

    handle = chosen.register_forward_pre_hook(spoil)
    finite = graph.graph.forward
    graph.graph.forward = lambda x: tuple(torch.nan_to_num(out, 0, 0, 0) for out in finite(x))
    with pytest.raises(CalibrationError, match=chosen.site.replace(".", r"\.")):
        calibrate(graph, [torch.rand(2, 3, SIZE, SIZE)], 99.99)
    handle.remove()


def test_ranges_are_those_of_the_float_network_however_often_they_are_taken() -> None:
    """A network that was calibrated already must not be calibrated on its own rounded values."""
    model, plan = planned(network(), section(), SIZE)
    graph, images = simulate(model, plan), torch.rand(20, 3, SIZE, SIZE)
    calibrate(graph, [images], 99.99)
    scales = [quantizer.scale.clone() for quantizer in graph.integers()]
    calibrate(graph, [images], 99.99)
    again = [quantizer.scale for quantizer in graph.integers()]
    assert all(torch.equal(one, other) for one, other in zip(scales, again, strict=True))


def test_what_a_range_cuts_off_is_counted_exactly() -> None:
    model, plan = planned(network(), section(), SIZE)
    graph = simulate(model, plan)
    images = torch.rand(20, 3, SIZE, SIZE)
    calibrate(graph, [images], 99.99)
    stem = next(graph.integers("input"))
    assert share_cut(graph, images)[stem.site] == 0, "min-max cuts nothing of what it has seen"
    stem.scale.mul_(0.5)
    narrow = share_cut(graph, images)[stem.site]
    low, high, half = stem.bounds(4)
    expected = ((images < low - half) | (images > high + half)).float().mean()
    assert narrow == pytest.approx(float(expected)) and narrow > 0.2
    worst, *_ = Health(20, {}, {}, 20, {"a": 0.5, "b": 0.9, "c": 0.0}).checks()
    assert worst.items == ("b 90.0 %", "a 50.0 %")


def test_validation_images_that_all_are_broken_are_an_error_not_0_percent(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    for path in (folder / "val").rglob("*.png"):
        path.write_bytes(b"broken")
    recipe = load_recipe(
        str(recipe_file(tmp_path, folder, epochs=1, warmup_epochs=0)), ["data.skip_bad_images=true"]
    )
    with pytest.raises(DataError, match="no validation image can be decoded"):
        run_recipe(recipe, tmp_path, "run", QUIET)
    assert not (tmp_path / "run" / "results.json").exists()


def test_no_validation_image_at_all_ends_before_any_work(checkpoint: Path, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    for path in (folder / "val").rglob("*.png"):
        path.unlink()
    recipe = load_recipe("fp32", [], {**small(folder, checkpoint), "quantize": None})
    with pytest.raises(CareError, match="no images for this split"):
        run_recipe(recipe, tmp_path, "run", QUIET)


def test_a_file_that_computes_exactly_the_same_can_be_recorded(tmp_path: Path) -> None:
    """No difference is infinitely many decibels, and JSON has no number for that."""
    exact = Agreement(images=8, same=8, ties=0, sqnr_db=math.inf, least_db=25.0)
    path = tmp_path / "int8.xml"
    done = Exported(load_target("openvino-cpu"), files={"int8": File(path, exact, "")})
    record = json.loads(json_text(done.as_record()))
    assert Exported.of_record(done.target, tmp_path, record).files["int8"] == done.files["int8"]
