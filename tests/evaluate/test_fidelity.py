"""Fidelity tells the step that lost something, and the layer where it began."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from quantized import care, small_start
from rich.console import Console

from care_compress.cli import main
from care_compress.errors import CheckpointError, DataError, RunError
from care_compress.evaluate import fidelity
from care_compress.evaluate import fidelity as fidelity_module
from care_compress.evaluate.site_distance import sharpest_fall
from care_compress.model.checkpoint import save_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import load_recipe
from care_compress.report.write import write_report
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.tasks.distance import EXACT_DB, Distance

pytest.importorskip("openvino", reason="needs the openvino extra")
QUIET = Console(quiet=True)
TARGETS = "export.targets=[onnxruntime-cpu, openvino-cpu, tensorrt-jetson-orin]"
SCHEMA = Path(write_report.__code__.co_filename).parent / "fidelity.schema.json"
FORMED = re.compile(r"token_mixer\.(dwconv[12]|core\.(kv|out))$")
SCALED = re.compile(r"inter2_(fc2|add)$")
SPOILED = "stages.1.blocks.0.inter_layer.inter2_fc1"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("start")
    return small_start(folder)


@pytest.fixture(scope="module")
def runs(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    few = [*start, TARGETS, "quantize.calibrate.images=32"]
    run_recipe(load_recipe("int8_ptq", few), runs, "mine", QUIET)
    return runs


def versions_of(runs: Path, name: str, targets: tuple[str, ...] | None = None) -> dict[str, Any]:
    value = fidelity.run_fidelity(runs, name, targets, 4, None, QUIET)
    return {row["rung"]: row for row in value["rungs"]}


@pytest.fixture(scope="module")
def versions(runs: Path) -> dict[str, Any]:
    return versions_of(runs, "mine")


def test_exact_steps_are_exact_and_files_compute_their_simulation(versions: dict[str, Any]) -> None:
    rewritten = versions["rewritten"]
    assert rewritten["sqnr_db"] > 80 and rewritten["parts_at"] is None
    assert len(rewritten["sites"]) > 40 and min(rewritten["sites"].values()) > 80
    assert "stem.0" in rewritten["sites"], "its norm was folded; what it computes can be compared"
    assert not any(re.search(r"inter\d_conv", site) for site in rewritten["sites"])
    quantized = versions["simulated"]
    assert quantized["sqnr_db"] < 60 and quantized["parts_at"]["site"] in quantized["sites"]
    for file in ("int8.onnx for onnxruntime-cpu", "int8.xml for openvino-cpu"):
        assert versions[file]["sqnr_db"] > 25 and versions[file]["before"].startswith("simulated")
        found = set(versions[file]["sites"]) | {"heads.fc"}  # the logits themselves, in an IR
        # A CPU's form joins the windows and takes attention in one product of all heads.
        formed = {site for site in quantized["sites"] if FORMED.search(site)}
        if "openvino" in file:  # gamma is part of its second 1x1s
            formed |= {site for site in quantized["sites"] if SCALED.search(site)}
        assert found == set(quantized["sites"]) - formed, "every other site is found by name"


def test_a_target_with_other_limits_has_a_simulation_of_its_own(versions: dict[str, Any]) -> None:
    for target in ("onnxruntime-cpu", "openvino-cpu"):
        own = versions[f"simulated for {target}"]
        assert own["before"] == "simulated" and own["targets"] == [target]
        assert own["sqnr_db"] < EXACT_DB, "its depthwise convolutions are float"


def test_an_engine_that_is_not_here_says_how_to_get_it(versions: dict[str, Any]) -> None:
    why = versions["engine of tensorrt-jetson-orin"]["missing"]
    assert "make bundle TARGET=tensorrt-jetson-orin" in why


def test_an_engine_that_runs_shows_its_logits(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "mine", tmp_path / "mine")
    (tmp_path / "mine/exports/tensorrt-jetson-orin/int8.engine").touch()
    # Stands for a GPU: the engine answers as its graph does.
    graph = lambda path, device: OnnxPredictor(Path(path).with_suffix(".onnx"))  # noqa: E731
    monkeypatch.setattr(fidelity_module, "open_predictor", graph)
    found = versions_of(tmp_path, "mine", ("tensorrt-jetson-orin",))[
        "engine of tensorrt-jetson-orin"
    ]
    assert found["before"] == "int8.onnx for tensorrt-jetson-orin"
    assert (found["sqnr_db"], found["sites"]) == (EXACT_DB, {})
    assert found["note"] == "an engine gives logits only"


def test_a_spoiled_file_is_named_at_the_layer_that_was_spoiled(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "mine", tmp_path / "mine")
    path = tmp_path / "mine" / "exports" / "onnxruntime-cpu" / "int8.onnx"
    model = onnx.load(path)
    (product,) = (node for node in model.graph.node if node.name == f"{SPOILED}/product")
    (scale,) = (one for one in model.graph.initializer if one.name == product.input[3])
    wrong = numpy_helper.to_array(scale) * np.float32(3)
    scale.CopyFrom(numpy_helper.from_array(wrong, scale.name))
    onnx.save(model, path)
    versions = versions_of(tmp_path, "mine", ("onnxruntime-cpu",))
    assert "int8.xml for openvino-cpu" not in versions, "it was not asked for"
    found = versions["int8.onnx for onnxruntime-cpu"]
    assert found["parts_at"]["site"] == SPOILED
    assert found["parts_at"]["sqnr_db"] < 0 < found["parts_at"]["before_db"]


@pytest.mark.slow
def test_a_float_run_and_one_without_exports_have_fewer_versions(
    start: list[str], tmp_path: Path
) -> None:
    wanted = "export.targets=[onnxruntime-cpu, openvino-cpu]"
    run_recipe(load_recipe("fp32", [*start, wanted]), tmp_path, "plain", QUIET)
    plain = versions_of(tmp_path, "plain")
    assert [row["before"] for row in plain.values()] == [None, "published", *["rewritten"] * 2]
    assert all(row["sqnr_db"] > 80 for row in plain.values() if row["before"])
    assert all(row["parts_at"] is None for row in plain.values())
    narrow = ["quantize.calibrate.images=32", "quantize.reconstruct=null", "export.targets=[]"]
    run_recipe(load_recipe("w4a8_ptq", [*start, *narrow]), tmp_path, "narrow", QUIET)
    assert list(versions_of(tmp_path, "narrow")) == [
        "published",
        "rewritten",
        "rescaled",
        "simulated",
    ]


@pytest.mark.slow
def test_nncf_has_logits_only_and_says_so(start: list[str], tmp_path: Path) -> None:
    pytest.importorskip("nncf", reason="needs the openvino extra")
    few = ["quantize.calibrate.images=32", "export.targets=[openvino-cpu]"]
    run_recipe(load_recipe("int8_ptq_nncf", [*start, *few]), tmp_path, "nncf", QUIET)
    found = versions_of(tmp_path, "nncf")["int8.xml for openvino-cpu"]
    assert found["before"] == "quantized by NNCF" and found["sqnr_db"] > 25
    assert found["sites"] == {} and "logits only" in found["note"]


def test_an_unknown_run_is_one_line_and_exit_code_2(runs: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fidelity", "nobody", "--runs", str(runs)])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "no finished run called nobody" in error and "mine" in error
    assert len(error.splitlines()) == 1


def test_what_moved_away_is_named(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "mine", tmp_path / "mine")
    recipe = tmp_path / "mine" / "recipe.yaml"
    before = recipe.read_text()
    recipe.write_text(re.sub(r"source: .*", "source: gone/away", before))
    with pytest.raises(DataError, match="gone/away"):
        versions_of(tmp_path, "mine")
    recipe.write_text(re.sub(r"checkpoint: .*", "checkpoint: gone.pth", before))
    with pytest.raises(CheckpointError, match=r"float model of mine, gone.pth, is gone"):
        versions_of(tmp_path, "mine")
    save_checkpoint(care(4, seed=1), tmp_path / "other.safetensors", {})
    other = f"checkpoint: {tmp_path / 'other.safetensors'}"
    recipe.write_text(re.sub(r"checkpoint: .*", other, before))
    with pytest.raises(CheckpointError, match="is not the float model that mine was made from"):
        versions_of(tmp_path, "mine")
    recipe.write_text(before)
    (tmp_path / "mine" / "ptq" / "model.safetensors").unlink()
    with pytest.raises(RunError, match="quantized model .* is gone"):
        versions_of(tmp_path, "mine")
    with pytest.raises(RunError, match="no export for tensorrt-gpu"):
        versions_of(runs, "mine", ("tensorrt-gpu",))


def test_the_report_shows_it_names_and_all(
    runs: Path, versions: dict[str, Any], tmp_path: Path
) -> None:
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev extra")
    run = tmp_path / "mine"
    shutil.copytree(runs / "mine", run)
    value = json.loads((run / "fidelity.json").read_text())
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(value)
    evil = "</script><script>window.pwned=1</script>"
    value["rungs"][1]["rung"] = value["rungs"][2]["before"] = evil
    (run / "fidelity.json").write_text(json.dumps(value))
    write_report(run, QUIET)
    page = (run / "report.html").read_text()
    assert page.count("<script") == 1 and "&lt;/script&gt;&lt;script&gt;window.pwned=1" in page
    assert "simulated for onnxruntime-cpu" in page
    (run / "fidelity.json").write_text(json.dumps({**value, "results_sha256": "0" * 64}))
    write_report(run, QUIET)
    assert "fidelity.json is of an earlier run" in (run / "report.html").read_text()
    (run / "fidelity.json").unlink()
    write_report(run, QUIET)
    assert "Not measured: care-compress fidelity mine." in (run / "report.html").read_text()


def test_the_sharpest_fall_is_where_it_begins() -> None:
    assert sharpest_fall({"a": 120.0, "b": 95.0}) is None
    fall = sharpest_fall({"a": 70.0, "b": 30.0, "c": 12.0, "d": 25.0})
    assert fall is not None and (fall.site, fall.before_db) == ("b", 70.0)


def test_a_distance_has_no_logarithm_of_nothing() -> None:
    exact, lost, silent = Distance(), Distance(), Distance()
    exact.add(torch.ones(3), torch.ones(3))
    assert (exact.sqnr_db, exact.known_db, exact.shown_db) == (float("inf"), None, EXACT_DB)
    lost.add(torch.ones(3), torch.full((3,), torch.nan))
    assert (lost.sqnr_db, lost.known_db, lost.shown_db) == (float("-inf"), None, -EXACT_DB)
    silent.add(torch.zeros(3), torch.ones(3))
    assert silent.shown_db == EXACT_DB, "nothing to lose"
    parts = Distance()
    for scale in (1.0, 3.0):
        parts.add(torch.full((4,), scale), torch.full((4,), scale + 0.1))
    assert parts.sqnr_db == pytest.approx(10 * np.log10(40 / 0.08), abs=1e-4)
