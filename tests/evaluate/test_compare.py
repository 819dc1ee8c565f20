"""What compare says is right, and what it cannot know it does not say."""

import json
import os
import shutil
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from comparison import cpu_results, engine_speed
from hypothesis import given
from hypothesis import strategies as st
from quantized import small_start
from rich.console import Console

from care_compress.data.loader import Batch
from care_compress.errors import CareError, DataError, RecipeError, RunError, TargetError
from care_compress.evaluate.compare import WIDTH, accuracy_table, device_verdict, judge, run_compare
from care_compress.evaluate.comparison import CompareOptions
from care_compress.evaluate.latency import LatencyPlan, measure_latency
from care_compress.export.deploy import take_results
from care_compress.files import digest_of
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import DataSection
from care_compress.recipe.target import DOT_PRODUCTS
from care_compress.report.write import write_report
from care_compress.tasks.classification import (
    Accuracy,
    Paired,
    collect_answers,
    drop_between,
)
from care_compress.tasks.distance import Distance
from care_compress.tasks.task import Drop

pytest.importorskip("openvino", reason="needs the openvino extra")
ROOT = Path(__file__).resolve().parents[2]
QUIET = Console(quiet=True)
QUICK = LatencyPlan(seconds=0.01, least_runs=6, warmup=1, turns=3)
TARGETS = "export.targets=[onnxruntime-cpu, openvino-cpu, tensorrt-jetson-orin]"


def compare(
    names: list[str], runs: Path, options: CompareOptions, console: Console, report: bool = False
) -> int:
    """As the command line does it; its exit code."""
    found = run_compare(names, runs, options, run_recipe, console)
    if report:
        assert found.models[-1].run is not None
        write_report(found.models[-1].run, console)
    return 0 if found.holds else 1


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("start")
    return [*small_start(folder), TARGETS]


@pytest.fixture(scope="module")
def runs(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    # Laid out alike, whatever this processor has: layers are counted below.
    few = [*start, "quantize.calibrate.images=32", "export.dot_products=true"]
    run_recipe(load_recipe("int8_ptq", few), runs, "mine", QUIET)
    return runs


@pytest.fixture(scope="module")
def compared(runs: Path) -> Any:
    file = runs.parent / "compared.json"
    options = CompareOptions(json_file=file, max_drop=100.0, latency=QUICK)
    assert compare(["fp32", "int8"], runs, options, QUIET, report=True) == 0
    assert (runs / "mine" / "report.html").is_file()
    return json.loads(file.read_text())


def test_a_missing_float_baseline_is_made(compared: Any, runs: Path) -> None:
    assert list(compared["models"]) == ["mine_fp32", "mine"]
    assert (runs / "mine_fp32" / "results.json").is_file()
    assert json.loads((runs / "mine" / "compare.json").read_text()) == compared


def test_the_json_is_the_interface(compared: Any) -> None:
    assert compared["images"] == 48
    for model in compared["models"].values():
        assert {"top1", "top5", "size_bytes", "params"} <= set(model)
    pair = compared["pairs"][0]
    assert {"baseline", "candidate", "drop", "drop_ci95", "agreement", "mcnemar_p"} <= set(pair)
    assert pair["drop_ci95"][0] <= pair["drop"] <= pair["drop_ci95"][1]
    assert set(compared["targets"]) == {"onnxruntime-cpu", "openvino-cpu", "tensorrt-jetson-orin"}
    for target in ("onnxruntime-cpu", "openvino-cpu"):
        found = compared["targets"][target]["mine"]
        assert found["available"] and set(found["latency_ms"]) == {"p50", "p90", "p99"}
        assert found["latency_ms"]["p50"] <= found["latency_ms"]["p99"]
    orin = compared["targets"]["tensorrt-jetson-orin"]["mine"]
    assert orin["available"] is False and "make bundle" in orin["why"]
    assert "top1" not in orin, "nothing is invented for what could not run"
    assert compared["targets"]["openvino-cpu"]["mine"]["int8_mac_share"] >= 0.95
    (budget,) = compared["budgets"]
    assert budget["ok"] and budget["limit"] == 100.0


def test_memory_and_the_state_of_the_machine_are_recorded(compared: Any) -> None:
    on = compared["targets"]
    for target in ("onnxruntime-cpu", "openvino-cpu"):
        for name in ("mine_fp32", "mine"):
            assert on[target][name]["peak_memory_bytes"] > 0
    assert "peak_memory_bytes" not in on["tensorrt-jetson-orin"]["mine"]
    about = compared["machine"]
    assert set(about["load_average"]) == {"before", "after"}
    assert "governor" in about["cpu"] and isinstance(about["noisy"], bool)


def test_accuracy_is_that_of_the_files(compared: Any, runs: Path) -> None:
    results = json.loads((runs / "mine_fp32" / "results.json").read_text())
    assert compared["targets"]["onnxruntime-cpu"]["mine_fp32"]["top1"] == pytest.approx(
        results["accuracy"]["top1"]
    )
    for pair in compared["pairs"]:
        on = compared["targets"][pair["target"]]
        assert pair["drop"] == pytest.approx(on["mine_fp32"]["top1"] - on["mine"]["top1"])
        assert pair["flipped_in_all"] == round(48 * (1 - pair["agreement"] / 100))
        assert len(pair["flipped"]) == pair["flipped_in_all"]
        assert all(flip["before"] != flip["after"] for flip in pair["flipped"])
        mean = np.mean(list(pair["drop_per_class"].values()))  # equally many of each
        assert mean == pytest.approx(pair["drop"])


def test_the_timed_file_is_the_scored_file(compared: Any, runs: Path) -> None:
    for target in ("onnxruntime-cpu", "openvino-cpu"):
        export = json.loads((runs / "mine" / "exports" / target / "export.json").read_text())
        assert compared["targets"][target]["mine"]["sha256"] == export["models"]["int8"]["sha256"]
    assert {(s["batch"], s["threads"] > 1) for s in compared["latency"]} >= {(1, False), (8, False)}
    assert all(setting["rows"] for setting in compared["latency"])


def test_every_layer_is_told_with_its_kind_and_its_time(compared: Any) -> None:
    on = compared["targets"]["openvino-cpu"]
    plain, rounded = on["mine_fp32"], on["mine"]
    for model in (plain, rounded):
        total = sum(layer["ms"] for layer in model["layers"])
        assert total == pytest.approx(model["layers_ms"]) and total > 0
        assert sum(one["ms"] for one in model["by_kind"].values()) == pytest.approx(total)
    assert plain["by_kind"]["integer products"]["layers"] == 0
    # 27 1x1 convs, 4 qk, stem and 3 downsamplings; depthwise convs run in float.
    assert rounded["by_kind"]["integer products"]["layers"] == 35
    stem = [layer for layer in rounded["layers"] if layer["sites"][:1] == ["stem.0"]]
    assert "u8" in {layer["precision"] for layer in stem if layer["group"] == "integer products"}
    assert compared["targets"]["onnxruntime-cpu"]["mine"]["layers"]
    orin = compared["targets"]["tensorrt-jetson-orin"]["mine"]
    assert "layers" not in orin, "no engine, no layers"


@pytest.mark.parametrize(
    ("options", "name"),
    [({"max_drop": 0.0}, "max_top1_drop"), ({"min_speedup": 1000.0}, "min_speedup")],
)
def test_a_budget_that_is_not_met_is_one_line_and_exit_code_1(
    runs: Path, compared: Any, options: dict[str, float], name: str, capsys: Any
) -> None:
    few = CompareOptions(targets=("onnxruntime-cpu",), latency=QUICK, **options)  # type: ignore[arg-type]
    met = options.get("max_drop") is not None and compared["pairs"][0]["drop"] <= 0
    code = compare(["mine_fp32", "mine"], runs, few, Console(width=200))
    lines = [line for line in capsys.readouterr().out.splitlines() if name in line]
    assert len(lines) >= 1 and "limit" in lines[0]
    assert code == (0 if met else 1)


def board_results(runs: Path) -> dict[str, Any]:
    """results.json of an Orin that built and measured the bundle of `mine`."""
    export = json.loads(
        (runs / "mine" / "exports" / "tensorrt-jetson-orin" / "export.json").read_text()
    )
    models = {}
    for name, p50 in (("int8", 1.0), ("fp16", 1.3)):
        models[name] = {
            "onnx_sha256": export["models"][name]["sha256"], "engine_sha256": "a" * 64,
            "size_bytes": 1000, "layers_from": "engine", "precisions": {"INT8": 3},
            "accuracy": {
                "images": 48, "top1": 31.25, "expected_top1": 31.25, "agreement": 100.0,
                "sqnr_db": 40.0, "max_deviation": 0.1, "passed": True, "measured_at": "2026-11-20",
            },
            "speed": {**engine_speed(p50, "15W"), "measured_at": "2026-11-20"},
        }  # fmt: skip
    return {
        "format": 2, "kind": "care-deploy-results", "target": "tensorrt-jetson-orin",
        "run": "mine", "recipe": "int8_ptq", "fingerprint": export["fingerprint"],
        "bundle_sha256": "b" * 64, "models": models, "measured_at": "2026-11-20",
        "board": {
            "name": "NVIDIA Jetson Orin Nano", "gpu": {"name": "Orin", "compute_capability": "8.7"},
            "library": "tensorrt", "library_version": "10.3.0.30", "cuda": {}, "l4t": "36.4.3",
            "jetpack": "6.2", "jetpack_from": "package", "container": False,
            "python": "3.10.12", "architecture": "aarch64",
        },
    }  # fmt: skip


def test_what_a_board_measured_stands_beside_the_rest(
    runs: Path, compared: Any, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(board_results(runs)))
    take_results(tmp_path / "results.json", runs, None, QUIET)
    file = tmp_path / "out.json"
    targets = ("onnxruntime-cpu", "tensorrt-jetson-orin")
    options = CompareOptions(targets=targets, json_file=file, latency=QUICK)
    compare(["mine_fp32", "mine"], runs, options, Console(width=200))
    on = json.loads(file.read_text())["targets"]["tensorrt-jetson-orin"]
    assert on["mine"]["latency_ms"]["p50"] == 1.0 and on["mine fp16"]["latency_ms"]["p50"] == 1.3
    where = on["mine"]["measured_on"]
    assert (where["board"], where["power_mode"]) == ("NVIDIA Jetson Orin Nano", "15W")
    assert "mine pays: 1.30x over FP16 on NVIDIA Jetson Orin Nano" in capsys.readouterr().out
    assert on["mine_fp32"]["available"] is False, "the board measured only what it was given"


def test_what_other_processors_measured_stands_beside_what_was_measured_here(
    runs: Path, compared: Any, tmp_path: Path, capsys: Any
) -> None:
    export = json.loads((runs / "mine" / "exports" / "onnxruntime-cpu" / "export.json").read_text())
    file = tmp_path / "results.json"
    for threads in (1, 4):
        found = cpu_results("mine", threads) | {"fingerprint": export["fingerprint"]}
        found["models"]["int8"]["sha256"] = export["models"]["int8"]["sha256"]
        file.write_text(json.dumps(found))
        take_results(file, runs, None, Console(width=200))
    assert "int8 on Raspberry Pi 5 Model B: p50 3.000 ms on 4 threads" in capsys.readouterr().out
    stale = found | {"fingerprint": "e" * 64, "measured_at": "2027"}
    (runs / "mine" / "measured" / "onnxruntime-cpu.old.json").write_text(json.dumps(stale))
    json_file = tmp_path / "out.json"
    few = CompareOptions(("onnxruntime-cpu",), json_file=json_file, latency=QUICK)
    compare(["mine_fp32", "mine"], runs, few, Console(width=200))
    on = json.loads(json_file.read_text())["targets"]["onnxruntime-cpu"]
    places = [f"Raspberry Pi 5 Model B, {count}" for count in ("1 thread", "4 threads")]
    assert set(on) == {
        *("mine_fp32", "mine"),  # measured here
        *(f"{name} on {place}" for name in ("mine", "mine fp32") for place in places),
    }
    there = on[f"mine on {places[1]}"]
    assert there["latency_ms"]["p50"] == 3.0 and there["measured_on"]["threads"] == 4
    printed = capsys.readouterr().out
    assert "Measured on devices" in printed and "onnxruntime 1.23.2, 4 threads" in printed
    assert f"mine pays: 1.50x over FP32 on {places[0]}" in printed
    shutil.rmtree(runs / "mine" / "measured")


def test_a_busy_machine_and_a_failed_check_decide_nothing_and_no() -> None:
    found = cpu_results("mine")
    found["models"]["int8"]["speed"]["before"]["load_average"] = 2.1  # of 4 cores
    said = device_verdict("mine", "int8", found)
    assert said is not None and said.pays is None and "other programs were at work" in said.text
    found["models"]["int8"]["accuracy"]["passed"] = False
    said = device_verdict("mine", "int8", found)
    assert said is not None and said.pays is False and "its file failed verify" in said.text
    assert device_verdict("mine", "fp32", cpu_results("mine")) is None


def test_files_can_be_compared_without_runs(runs: Path, start: list[str], compared: Any) -> None:
    files = [
        str(runs / run / "exports" / "onnxruntime-cpu" / f"{kind}.onnx")
        for run, kind in (("mine_fp32", "fp32"), ("mine", "int8"))
    ]
    source = next(item.partition("=")[2] for item in start if item.startswith("data.source"))
    data = DataSection(source=source, resolution=32, crop_pct=1.0, workers=0)
    file = runs.parent / "files.json"
    options = CompareOptions(json_file=file, data=data, images=16, latency=QUICK)
    assert compare(files, runs, options, QUIET) == 0, "no budget, so none is broken"
    assert json.loads(file.read_text())["images"] == 16
    mixed = [files[0], str(runs / "mine" / "exports" / "openvino-cpu" / "int8.xml")]
    with pytest.raises(TargetError, match="no target runs both"):
        compare(mixed, runs, options, QUIET)
    with pytest.raises(DataError, match="--data, --res and --crop"):
        compare(files, runs, CompareOptions(latency=QUICK), QUIET)


def test_other_images_give_no_drop(runs: Path, start: list[str], compared: Any) -> None:
    other = [*start, "data.crop_pct=0.9", "export.targets=[onnxruntime-cpu]"]
    run_recipe(load_recipe("fp32", other), runs, "cropped", QUIET)
    with pytest.raises(DataError, match="a drop between them means nothing"):
        compare(["cropped", "mine"], runs, CompareOptions(latency=QUICK), QUIET)


def test_every_file_is_read_back_here(compared: Any, runs: Path) -> None:
    for target in ("onnxruntime-cpu", "openvino-cpu"):
        for name in ("mine_fp32", "mine"):
            read = compared["targets"][target][name]["read_back"]
            assert read["holds"] and read["images"] == 8 and read["agreement"] >= 99.5
        export = json.loads((runs / "mine" / "exports" / target / "export.json").read_text())
        assert read["least_sqnr_db"] == export["models"]["int8"]["least_sqnr_db"]
    (check,) = compared["checks"]
    assert (check["check"], check["status"]) == ("files beside their models", "fine")
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev extra")
    schema = Path(write_report.__code__.co_filename).with_name("compare.schema.json")
    jsonschema.validate(compared, json.loads(schema.read_text()))


def test_a_file_that_is_not_its_model_here_is_told_and_does_not_pay(
    runs: Path, compared: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with weights of 8 bits on a processor that saturates; and one export that failed."""
    copy = tmp_path / "runs"
    shutil.copytree(runs, copy)
    folder = copy / "mine" / "exports" / "onnxruntime-cpu"
    path = folder / "int8.onnx"
    graph = onnx.load(path)
    (product,) = (one for one in graph.graph.node if one.name == "heads.fc/high_product")
    (head,) = (one for one in graph.graph.initializer if one.name == product.input[-1])
    head.CopyFrom(onnx.numpy_helper.from_array(np.float32([0, 50, 0, 0]), head.name))
    onnx.save(graph, path)
    export = json.loads((folder / "export.json").read_text())
    export["models"]["int8"]["sha256"] = digest_of(path)
    (folder / "export.json").write_text(json.dumps(export))
    results = json.loads((copy / "mine" / "results.json").read_text())
    results["exports"]["openvino-cpu"] = {"target": "openvino-cpu", "failed": "no such layer."}
    (copy / "mine" / "results.json").write_text(json.dumps(results))

    options = CompareOptions(targets=("onnxruntime-cpu", "openvino-cpu"), latency=QUICK)
    compare(["mine_fp32", "mine"], copy, options, Console(width=300), report=True)
    said = capsys.readouterr().out
    assert "take note: files beside their models: 2 of 4 files" in said
    assert "openvino-cpu: not measured here: the export of mine failed: no such layer." in said
    value = json.loads((copy / "mine" / "compare.json").read_text())
    read = value["targets"]["onnxruntime-cpu"]["mine"]["read_back"]
    assert not read["holds"] and read["top1"] == 25.0, "every image is of one class to it"
    assert value["targets"]["onnxruntime-cpu"]["mine_fp32"]["read_back"]["holds"]
    verdicts = {one["target"]: one for one in value["verdicts"]}
    assert [one["pays"] for one in verdicts.values()] == [False, False]
    assert "top-1 25.00 % where its model has" in verdicts["onnxruntime-cpu"]["text"]
    assert "the export failed: no such layer." in verdicts["openvino-cpu"]["text"]
    for name in ("report.md", "report.html"):
        report = (copy / "mine" / name).read_text()
        assert "✗ files beside their models: 2 of 4 files" in report, name
        assert "Nothing was found" not in report, name

    # A file of full range where sums saturate is left out with its reason, and the rest compared.
    (folder / "export.json").write_text(json.dumps({**export, "needs": DOT_PRODUCTS}))
    monkeypatch.setattr("care_compress.runtime.dot_products.onnxruntime_is_exact", lambda: False)
    refused = CompareOptions(targets=("onnxruntime-cpu",), latency=QUICK)
    compare(["mine_fp32", "mine"], copy, refused, QUIET)
    value = json.loads((copy / "mine" / "compare.json").read_text())
    left_out = value["targets"]["onnxruntime-cpu"]["mine"]
    assert not left_out["available"] and "its sums would overflow" in left_out["why"]
    (folder / "export.json").write_text(json.dumps(export))

    (folder / "expected_int8.npy").unlink()  # an export by an earlier version
    options = CompareOptions(targets=("onnxruntime-cpu",), latency=QUICK)
    compare(["mine_fp32", "mine"], copy, options, QUIET)
    value = json.loads((copy / "mine" / "compare.json").read_text())
    read = value["targets"]["onnxruntime-cpu"]["mine"]["read_back"]
    assert read["images"] == 48 and read["model_top1"] == results["accuracy"]["top1"]
    low, high = read["model_minus_file_ci95"]
    assert low < read["model_top1"] - 25.0 < high and read["holds"] is (low <= 0)


def test_a_changed_file_is_not_compared(runs: Path, compared: Any) -> None:
    path = runs / "mine" / "exports" / "onnxruntime-cpu" / "int8.onnx"
    before = path.read_bytes()
    path.write_bytes(before + b"\n")
    try:
        with pytest.raises(RunError, match=r"int8.onnx is not the file that was exported"):
            compare(["mine_fp32", "mine"], runs, CompareOptions(latency=QUICK), QUIET)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("names", "options", "error", "message"),
    [
        (["fp32", "nobody"], {}, RunError, "no run called nobody"),
        (["mine", "mine"], {}, RunError, "the same model"),
        (["absent.onnx", "mine"], {}, CareError, "absent.onnx is not a file"),
        (["fp32", "mine"], {"targets": ("openvino",)}, RecipeError, "no target 'openvino'"),
    ],
)
def test_mistakes_are_named(
    runs: Path, names: list[str], options: dict[str, Any], error: type, message: str, compared: Any
) -> None:
    with pytest.raises(error, match=message):
        compare(names, runs, CompareOptions(latency=QUICK, **options), QUIET)


def test_the_script_runs_from_any_directory(runs: Path, compared: Any, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable, str(ROOT / "eval" / "compare.py"), "fp32", "int8", "--runs", str(runs),
            "--images", "8", "--targets", "onnxruntime-cpu", "--json", "out.json",
            "--max-drop", "100", "--no-report",
        ],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads((tmp_path / "out.json").read_text())["images"] == 8


def test_models_take_turns() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
    found = measure_latency(runs, 4, LatencyPlan(0.0, least_runs=9, warmup=0, turns=3))
    assert [len(turn) for turn in found["a"].turns] == [3, 3, 3]
    # A run to warm up and three that count, of each in every turn.
    turns = ["".join(order[6 + 8 * turn : 14 + 8 * turn]) for turn in range(3)]
    assert set(turns) <= {"aaaabbbb", "bbbbaaaa"}


def test_no_model_is_always_the_first_of_a_turn() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    measure_latency(runs, 1, LatencyPlan(0.0, least_runs=30, warmup=0, turns=30))
    first = order[9::6]  # three models, each once more and once in earnest
    assert set(first) == set("abc") and max(first.count(name) for name in "abc") < 20


def test_latency_has_a_throughput() -> None:
    found = measure_latency({"a": lambda: None}, 4, LatencyPlan(0.0, 9, 0, 3))
    assert found["a"].throughput > 0


def test_answers_are_counted_as_they_are() -> None:
    labels = torch.tensor([0, 1, 2])
    images = torch.eye(3).reshape(3, 3, 1, 1)
    right = lambda x: 10 * x.flatten(1)  # noqa: E731
    shifted = lambda x: 10 * x.flatten(1).roll(1, dims=1)  # noqa: E731
    batches = [Batch(images, labels, torch.arange(3))]
    found = collect_answers(
        {"a": right, "b": shifted},
        {"a": "a", "b": "a"},
        batches,
        lambda count: None,  # type: ignore[dict-item]
    ).answers
    assert (found["a"].top1, found["b"].top1, found["b"].top5) == (100.0, 0.0, 100.0)
    assert found["a"].sqnr_db is None and found["b"].sqnr_db == pytest.approx(-3.01, abs=0.01)


DROP = Drop(0.1, -0.1, 0.2)
FAST, EQUAL, SLOW = (1.9, 1.8, 2.0), (1.1, 0.9, 1.3), (0.8, 0.6, 0.95)


def verdict_of(
    speedups: dict[str, Any], drop: Drop | None = DROP, limit: float | None = None, fault: str = ""
) -> Any:
    return judge("openvino-cpu", "int8", speedups, drop, 99.5, limit, fault)


@pytest.mark.parametrize(
    ("speedups", "drop", "limit", "pays", "words"),
    [
        ({"fp32": FAST, "bf16": (1.3, 1.2, 1.4)}, DROP, 0.3, True, "pays: 1.90x"),
        ({"fp32": FAST, "bf16": SLOW}, DROP, 0.3, False, "times the speed of bf16"),
        ({"fp32": FAST, "bf16": EQUAL}, DROP, 0.3, None, "within the noise"),
        ({"fp32": FAST}, Drop(1.2, 1.0, 1.4), 0.3, False, "loses more than 0.3"),
        ({"fp32": FAST}, Drop(0.2, 0.0, 0.4), 0.3, None, "too few to say"),
        ({"fp32": FAST}, Drop(0.4, 0.2, 0.6), 0.3, None, "too few to say"),
        ({"fp32": FAST}, Drop(47.0, 45.0, 49.0), None, None, "it loses accuracy"),
        ({"fp32": FAST}, Drop(-2.0, -3.0, -1.0), None, True, "drop -2.00 [-3.00, -1.00]"),
        ({"fp32": EQUAL}, DROP, None, None, "within the noise"),
        ({"fp32": (1.3, 1.05, 1.6)}, DROP, None, True, "pays"),
        ({"fp32": (1 / 1.3, 1 / 1.6, 1 / 1.05)}, DROP, None, False, "does not pay"),
        ({}, DROP, None, None, "nothing to compare"),
    ],
)
def test_a_verdict_says_what_was_found(
    speedups: Any, drop: Drop, limit: Any, pays: Any, words: str
) -> None:
    verdict = verdict_of(speedups, drop, limit)
    assert verdict.pays is pays and words in verdict.text


@given(st.floats(0.3, 3), st.floats(1, 2), st.floats(1, 2))
def test_faster_and_slower_are_judged_alike(value: float, up: float, down: float) -> None:
    """Turned round, what pays is what does not, and what is unknown stays so."""
    there = verdict_of({"fp32": (value, value / down, value * up)})
    back = verdict_of({"fp32": (1 / value, 1 / (value * up), down / value)})
    assert {True: False, False: True, None: None}[there.pays] is back.pays


def test_a_file_that_is_not_its_model_never_pays() -> None:
    verdict = verdict_of({"fp32": FAST}, Drop(-1.0, -2.0, -0.5), None, "it has 18.5 dB of 25.0")
    assert verdict.pays is False and "18.5 dB" in verdict.text


def test_a_verdict_tells_how_many_answers_are_the_same() -> None:
    assert "99.50 % of answers the same" in verdict_of({"fp32": FAST}).text


def test_one_drop_has_one_interval_wherever_it_is_told() -> None:
    """On the console and in results.json after a run, in compare.json, in the report."""
    right = np.arange(500) % 10 > 1
    wrong_now, right_now = np.flatnonzero(right)[:9], np.flatnonzero(~right)[:4]
    after = right.copy()
    after[wrong_now], after[right_now] = False, True
    drop = drop_between(right, after)
    counts = [Accuracy(500, int(hits.sum()), 500) for hits in (right, after)]
    pair = Paired(counts[0], counts[1], lost=9, gained=4, agreeing=480, distance=Distance())
    assert (pair.drop, pair.drop_ci95) == (drop.value, (drop.low, drop.high))
    assert drop.value == pytest.approx(1.0) and drop.low < 0 < drop.high


def test_the_widest_row_of_a_comparison_is_cut_nowhere() -> None:
    names = "care_s2_fp32", "care_s2_int8_fastact_qat"
    target = "tensorrt-jetson-orin"
    row = {
        "available": True, "top1": 100.0, "top5": 100.0, "size_bytes": 123_450_000,
        "peak_memory_bytes": 1_234_500_000,
    }  # fmt: skip
    pair = {
        "target": target, "candidate": names[1], "drop": -12.34, "drop_ci95": [-23.45, -11.11],
        "mcnemar_p": 1.2e-123, "agreement": 100.0, "sqnr_db": 123.4,
    }  # fmt: skip
    value = {"images": 1_000_000, "targets": {target: dict.fromkeys(names, row)}, "pairs": [pair]}
    text = StringIO()
    Console(file=text, width=WIDTH).print(accuracy_table(value))
    assert "…" not in text.getvalue() and "-12.34 [-23.45, -11.11]" in text.getvalue()
