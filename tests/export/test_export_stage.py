"""One run's exports, as a user finds them, and the way to a device and back."""

import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fakeboard import fake_host
from quantized import SIZE, care, images, spoil_weights
from rich.console import Console
from tiny import image_folder

from care_compress.cli import main
from care_compress.data.transforms import normalize
from care_compress.device.app import main as on_device
from care_compress.device.manifest import open_bundle
from care_compress.errors import ExportError, RecipeError, RunError
from care_compress.evaluate.agreement import Agreement, compare_logits, held_to
from care_compress.evaluate.device_measurements import import_results
from care_compress.evaluate.readback import Peak, what_failed
from care_compress.export import stage as exporting
from care_compress.export.bundle import unpack_bundle
from care_compress.export.deploy import bundle_content, make_bundle
from care_compress.export.half import highest_half, write_half
from care_compress.export.result import About, Exported, File, Preprocessing
from care_compress.export.stage import check_exports
from care_compress.export.to_onnx import float_graph, write_onnx
from care_compress.files import digest_of, json_text, sha256_file
from care_compress.model.checkpoint import save_checkpoint
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import DataSection, RewriteSection
from care_compress.recipe.target import all_targets, load_target
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.runtime.on_openvino import OpenVinoPredictor

pytest.importorskip("openvino", reason="needs the openvino extra")
QUIET = Console(quiet=True)
TINY = ["data.resolution=32", "data.workers=0", "quantize.calibrate.images=32"]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides that point a recipe at four classes of small images and a model for them."""
    folder = tmp_path_factory.mktemp("start")
    patches = image_folder(folder / "images")
    checkpoint = folder / "four.safetensors"
    save_checkpoint(care(4), checkpoint, {})
    return [*TINY, f"model.checkpoint={checkpoint}", f"data.source={patches}"]


@pytest.fixture(scope="module")
def runs(start: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    run_recipe(load_recipe("int8_ptq", start), runs, "int8", QUIET)
    return runs


def export_of(runs: Path, target: str, run: str = "int8") -> Any:
    return json.loads((runs / run / "exports" / target / "export.json").read_text())


def test_every_target_has_files_that_agree_with_the_model(runs: Path) -> None:
    results = json.loads((runs / "int8" / "results.json").read_text())
    assert set(results["exports"]) == {target.name for target in all_targets()}
    manifest = json.loads((runs / "int8" / "manifest.json").read_text())
    for target in all_targets():
        export = export_of(runs, target.name)
        assert "fp16" in export["models"] or not target.is_engine, "the baseline INT8 has to beat"
        for entry in export["models"].values():
            path = runs / "int8" / "exports" / target.name / entry["file"]
            assert digest_of(path) == entry["sha256"]
            assert str(path.relative_to(runs / "int8")) in manifest["outputs"]
            assert entry["holds"] and entry["images"] == 48
        assert export["classes"] == ["blue", "green", "grey", "red"]
        assert export["preprocessing"]["resolution"] == 32
    assert export_of(runs, "openvino-cpu")["integer_macs"]["share"] >= 0.95
    assert export_of(runs, "openvino-npu")["integer_macs"]["executed"] is None, "no NPU here"


def test_boards_of_one_kind_share_one_graph(runs: Path) -> None:
    digests = {
        export_of(runs, target.name)["models"]["int8"]["sha256"]
        for target in all_targets()
        if target.is_engine
    }
    assert len(digests) == 1


def test_the_graph_for_tensorrt_is_one_it_reads(runs: Path) -> None:
    graph = onnx.load(runs / "int8" / "exports" / "tensorrt-jetson-orin" / "int8.onnx")
    assert graph.opset_import[0].version <= 20, "TensorRT 10.3 reads no later one"
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.graph.initializer}
    pairs = [n for n in graph.graph.node if n.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs
    for node in pairs:
        assert not values[node.input[2]].any(), f"{node.name} has a zero point"
        assert values[node.input[2]].dtype == np.int8


def test_rtx_engines_are_built_without_a_gpu(runs: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the tensorrt-rtx extra")
    folder = runs / "int8" / "exports" / "tensorrt-rtx"
    engines = export_of(runs, "tensorrt-rtx")["engines"]
    assert set(engines) == {"int8", "fp16"}
    for name, about in engines.items():
        assert sha256_file(folder / f"{name}.engine") == about["engine_sha256"]
    layers = json.loads((folder / "int8.engine.json").read_text())["layers"]
    kinds = {node: row["precision"] for row in layers for node in row["origin"]
             if row["type"] == "correlation"}  # fmt: skip
    assert kinds["stages.0.blocks.0.inter_layer.inter1_fc1"] == "INT8"
    assert kinds["stages.0.blocks.0.inter_layer.inter1_conv"] == "FP16", "depthwise is faster so"


def test_without_the_library_the_graph_is_there_and_the_engine_is_explained(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    only = ["export.targets=[tensorrt-rtx]", "export.images=8"]
    run_recipe(load_recipe("fp32", [*start[:2], *start[3:], *only]), tmp_path, "run", Console())
    assert "no engine for tensorrt-rtx: tensorrt-rtx is not installed" in capsys.readouterr().out
    assert "not installed" in export_of(tmp_path, "tensorrt-rtx", "run")["engines_missing"]
    assert not list(tmp_path.rglob("*.engine"))


def test_a_free_batch_serves_any_number_of_images(start: list[str], tmp_path: Path) -> None:
    wanted = "export.targets=[onnxruntime-cpu, openvino-cpu, tensorrt-rtx]"
    recipe = load_recipe("int8_ptq", [*start, wanted, "export.batch=dynamic"])
    run_recipe(recipe, tmp_path, "run", QUIET)
    exports = tmp_path / "run" / "exports"
    x = torch.randn(5, 3, 32, 32)
    onnx_model = OnnxPredictor(exports / "onnxruntime-cpu" / "int8.onnx")
    ir_model = OpenVinoPredictor(exports / "openvino-cpu" / "int8.xml")
    assert onnx_model.input.shape[0] == "batch" and ir_model.shape[0].is_dynamic
    assert onnx_model(x).shape == ir_model(x).shape == (5, 4)


def test_bits_no_runtime_has_are_said_and_not_exported(
    start: list[str], tmp_path: Path, capsys: Any
) -> None:
    recipe = load_recipe("w4a8_ptq", [*start, "quantize.reconstruct=null", "export.images=16"])
    results = run_recipe(recipe, tmp_path, "run", Console())
    made = {name for name, export in results["exports"].items() if "skipped" not in export}
    assert made == {"openvino-npu"}
    assert "no 4-bit weights" in results["exports"]["tensorrt-gpu"]["skipped"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "no export for" in line]
    told = {name for line in lines for name in re.findall(r"[a-z]+-[a-z-]+", line.split(":")[0])}
    assert told == results["exports"].keys() - made
    assert not (tmp_path / "run" / "exports" / "tensorrt-gpu").exists()


def test_a_file_that_computes_something_else_names_its_first_layer(
    start: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = "stages.1.blocks.0.inter_layer.inter2_fc1"
    spoil_weights(monkeypatch, site)
    for target in ("onnxruntime-cpu", "openvino-cpu"):
        wanted = [f"export.targets=[{target}]", "export.batch=2"]
        recipe = load_recipe("int8_ptq", [*start, *wanted])
        with pytest.raises(ExportError, match=rf"{target}: int8.* it parts at {site} "):
            run_recipe(recipe, tmp_path, target, QUIET)
    (tmp_path / "openvino-cpu" / "exports" / "tensorrt-gpu").mkdir()
    export = export_of(tmp_path, "openvino-cpu", "openvino-cpu")
    (tmp_path / "openvino-cpu" / "exports" / "tensorrt-gpu" / "export.json").write_text(
        json.dumps(export)
    )
    (tmp_path / "openvino-cpu" / "exports" / "tensorrt-gpu" / "int8.xml").write_text("x")
    with pytest.raises(RunError, match="does not compute what its model does"):
        bundle_content(tmp_path / "openvino-cpu", "run", load_target("tensorrt-gpu"))


def test_a_tie_is_no_disagreement_and_nan_is_no_agreement() -> None:
    reference = torch.tensor([[1.0, 0.999999], [3.0, 1.0], [0.0, 2.0]])
    near = compare_logits(reference, reference + torch.tensor([[-1e-6, 1e-5], [0, 0], [0, 0]]))
    assert (near.same, near.ties, near.holds) == (2, 1, True)
    far = compare_logits(reference, reference.flip(1))
    assert not far.holds
    lost = compare_logits(reference, torch.full_like(reference, torch.nan))
    assert not lost.holds and lost.percent == 0
    assert compare_logits(reference, reference).exact


@pytest.mark.parametrize("follow", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_targets_own_rules_can_be_left_out(
    start: list[str], tmp_path: Path, follow: bool
) -> None:
    wanted = ["export.targets=[tensorrt-jetson-orin]", f"export.target_rules={follow}".lower()]
    run_recipe(load_recipe("int8_ptq", [*start, *wanted]), tmp_path, "run", QUIET)
    path = tmp_path / "run" / "exports" / "tensorrt-jetson-orin" / "int8.onnx"
    graph = onnx.load(path).graph
    (conv,) = (n for n in graph.node if n.name == "stages.0.blocks.0.inter_layer.inter1_conv")
    made_by = {output: node.op_type for node in graph.node for output in node.output}
    quantized = [made_by.get(name) == "DequantizeLinear" for name in conv.input[:2]]
    assert quantized == ([False, False] if follow else [True, True])


def test_a_target_named_that_cannot_is_refused_before_any_work(
    start: list[str], tmp_path: Path
) -> None:
    recipe = load_recipe("w4a8_ptq", [*start, "export.targets=[openvino-cpu]"])
    with pytest.raises(RecipeError, match=r"export.targets: rule \d+ .* has no 4-bit weights"):
        run_recipe(recipe, tmp_path, "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_one_target_that_fails_leaves_the_others_and_the_results(
    start: list[str], tmp_path: Path
) -> None:
    broken = care(4)
    with torch.no_grad():
        broken.stem[1].bias[0] = 1e7  # type: ignore[index]
    checkpoint = tmp_path / "wide.safetensors"
    save_checkpoint(broken, checkpoint, {})
    given = [*(s for s in start if "checkpoint" not in s and "quantize" not in s)]
    targets = "export.targets=[tensorrt-gpu, onnxruntime-cpu]"
    recipe = load_recipe("fp32", [*given, f"model.checkpoint={checkpoint}", targets])
    with pytest.raises(ExportError, match=r"tensorrt-gpu: .* reaches 1e\+07, float16 ends"):
        run_recipe(recipe, tmp_path, "run", QUIET)
    exports = json.loads((tmp_path / "run" / "results.json").read_text())["exports"]
    assert "float16" in exports["tensorrt-gpu"]["failed"]
    assert exports["onnxruntime-cpu"]["models"]["fp32"]["holds"]


@pytest.fixture(scope="module")
def wide() -> CompactCare:
    """One channel of a depthwise conv is 3e4 times as large, and its readers make up for it."""
    network = rewrite(care(4), RewriteSection())
    inter = network.get_submodule("stages.1.blocks.0.inter_layer")
    with torch.no_grad():
        producer, reader = inter.inter1_conv, inter.inter1_fc2
        producer.weight[3] *= 3e4
        if producer.bias is not None:
            producer.bias[3] *= 3e4
        reader.weight[:, 3] /= 3e4
    return network


def written_in_half(network: CompactCare, path: Path) -> Path:
    graph = float_graph(network, SIZE, 1)
    write_half(graph)
    prepared = Preprocessing.of(DataSection(resolution=SIZE))
    write_onnx(graph, About("test", "0", ("a", "b", "c", "d"), prepared), path, None)
    return path


def test_what_float16_overflows_is_found_though_no_answer_shows_it(
    wide: CompactCare, tmp_path: Path
) -> None:
    sound = written_in_half(rewrite(care(4), RewriteSection()), tmp_path / "sound.onnx")
    path = written_in_half(wide, tmp_path / "wide.onnx")
    x = images(8)
    assert bool(torch.isfinite(OnnxPredictor(path)(x)).all()), "ONNX Runtime hides it"
    peak = highest_half(path, [x])
    assert peak is not None and not peak.fits
    assert "stages.1.blocks.0.inter_layer.inter1" in peak.layer and peak.layer in str(peak)
    usual = highest_half(sound, [x])
    assert usual is not None and usual.fits and 0 < usual.value < 1000


def test_the_peak_is_that_of_all_images_and_none_where_nothing_is_half(tmp_path: Path) -> None:
    network = rewrite(care(4), RewriteSection())
    path = written_in_half(network, tmp_path / "half.onnx")
    x = images(6)
    each = [highest_half(path, [image[None]]) for image in x]
    together = highest_half(path, [x[:4], x[4:]])
    assert together is not None and together.value == max(one.value for one in each if one)
    plain = float_graph(network, SIZE, 1)
    prepared = Preprocessing.of(DataSection(resolution=SIZE))
    write_onnx(plain, About("t", "0", ("a", "b", "c", "d"), prepared), tmp_path / "f.onnx", None)
    assert highest_half(tmp_path / "f.onnx", [x]) is None


def test_a_peak_needs_room_for_images_that_nobody_looked_at() -> None:
    assert Peak(65504 / 2, "conv").fits
    assert not Peak(65504 / 2 + 1, "conv").fits and not Peak(math.inf, "conv").fits
    for value in (123.0, math.inf):
        assert Peak.of_json(json.loads(json_text(Peak(value, "a").as_json()))) == Peak(value, "a")


def test_a_file_whose_float16_overflows_is_refused_with_its_layer() -> None:
    near = Agreement(images=8, same=8, ties=0, sqnr_db=80.0, least_db=50.0)
    file = File(Path("fp16.onnx"), near, "", Peak(9e5, "stages.1.blocks.0.fc1"))
    done = Exported(load_target("tensorrt-jetson-orin"), {"fp16": file})
    with pytest.raises(ExportError, match=r"float16 values reach 9e\+05 at stages.1.blocks.0.fc1"):
        check_exports([done])
    model = {
        "file": "fp16.onnx", **near.as_json(), "holds": file.holds,
        "float16_peak": Peak(9e5, "stages.1.blocks.0.fc1").as_json(),
    }  # fmt: skip
    failed = what_failed({"target": "t", "models": {"fp16": model}})
    assert "stages.1.blocks.0.fc1" in failed["fp16.onnx"]


def test_a_misspelt_target_is_named_before_any_work(start: list[str], tmp_path: Path) -> None:
    recipe = load_recipe("int8_ptq", [*start, "export.targets=[tensorrt-orin]"])
    with pytest.raises(RecipeError, match="no target 'tensorrt-orin'.*tensorrt-jetson-orin"):
        run_recipe(recipe, tmp_path, "run", QUIET)
    assert not (tmp_path / "run").exists()


def test_a_bundle_has_the_same_bytes_again_and_its_samples_belong_to_its_graphs(
    runs: Path, tmp_path: Path
) -> None:
    path = make_bundle(runs, "int8", "tensorrt-jetson-orin", QUIET)
    before = path.read_bytes()
    path.unlink()
    assert make_bundle(runs, "int8", "tensorrt-jetson-orin", QUIET).read_bytes() == before
    bundle = open_bundle(unpack_bundle(path, tmp_path), ("tensorrt",))
    # What the board may choose among; unasked it builds the two that a run exports.
    placed = ("int8-hidden", "int8-late", "int8-late-hidden")
    assert bundle.models == ("fp16", "int8", *placed)
    assert bundle.usual_models == ("fp16", "int8")
    graphs = export_of(runs, "tensorrt-jetson-orin")["models"]
    assert all(bundle.sha256(name) == graphs[name]["sha256"] for name in bundle.usual_models)
    assert len({bundle.sha256(name) for name in bundle.models}) == 5
    mean, std = tuple(bundle.manifest["mean"]), tuple(bundle.manifest["std"])
    images = normalize(torch.from_numpy(bundle.array("pixels")), mean, std)
    for name in bundle.models:
        found = OnnxPredictor(bundle.file(name))(images)
        expected = torch.from_numpy(bundle.array(f"logits_{name}"))
        assert held_to(bundle.limits(name)["sqnr_db"], expected, found).holds


@pytest.mark.slow  # ten engines, each run some hundred times
def test_a_board_tunes_the_bundle_and_its_field_comes_home(runs: Path, tmp_path: Path) -> None:
    """The real graphs on a stand-in that answers by ONNX Runtime; its times mean nothing."""
    path = make_bundle(runs, "int8", "tensorrt-jetson-orin", QUIET)
    folder = unpack_bundle(path, tmp_path)
    root = tmp_path / "root"
    root.mkdir()
    tune = ["tune", "--bundle", str(folder), "--seconds", "0.02"]
    assert on_device(tune, fake_host(root)) == 0
    at_home = tmp_path / "int8"
    shutil.copytree(runs / "int8" / "exports", at_home / "exports")
    found = import_results(folder / "results.json", at_home)
    rows = found["candidates"].values()
    assert {row["model"] for row in rows} == set(open_bundle(folder, ("tensorrt",)).models)
    assert {row["optimization_level"] for row in rows} == {3, 5}
    assert all(row["state"] == "passed" and row["speed"] for row in rows)
    assert found["winner"] in found["candidates"]


def test_a_bundle_for_a_cpu_gets_the_float_model_and_has_the_same_bytes_again(
    runs: Path, tmp_path: Path
) -> None:
    path = make_bundle(runs, "int8", "openvino-cpu", QUIET)
    before = path.read_bytes()
    assert make_bundle(runs, "int8", "openvino-cpu", QUIET).read_bytes() == before
    folder = unpack_bundle(path, tmp_path)
    bundle = open_bundle(folder, ("openvino",))
    names = {"int8.xml", "int8.bin", "fp32.xml", "fp32.bin"}
    assert names < bundle.manifest["files"].keys()
    assert bundle.sha256("int8") == export_of(runs, "openvino-cpu")["models"]["int8"]["sha256"]
    # A process of its own: it makes another Core of OpenVINO.
    script = [sys.executable, "-I", str(folder / "care_deploy.py"), "verify"]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "results.json").read_text())
    # A processor that has bfloat16 runs the floats of a file in it, which is told.
    exact = {"f32": 80, "bf16": 30}[found["models"]["fp32"]["floats_in"]]
    assert found["models"]["fp32"]["accuracy"]["sqnr_db"] > exact, "every rewrite is exact"
    assert not list(path.parent.glob(".*")), "nothing is left behind"


def test_a_changed_export_is_not_bundled(runs: Path, tmp_path: Path) -> None:
    copy = tmp_path / "int8"
    for path in (runs / "int8" / "exports").rglob("*"):
        if path.is_file():
            to = copy / path.relative_to(runs / "int8")
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    broken = copy / "exports" / "tensorrt-gpu" / "fp16.onnx"
    broken.write_bytes(broken.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="fp16.onnx is not the file that was exported"):
        bundle_content(copy, "int8", load_target("tensorrt-gpu"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bundle", "tensorrt-jetson-orin", "--run", "absent"], "no finished run called absent"),
        (["bundle", "openvino-npu", "--run", "int8"], "no bundle is made for openvino-npu"),
        (["engine", "openvino-cpu", "--run", "int8"], "needs no engine"),
        (["bundle", "jetson", "--run", "int8"], "there is no target 'jetson'"),
        (["import-results", "absent.json"], "absent.json cannot be read"),
    ],
)
def test_mistakes_on_the_way_to_a_device_end_in_one_line(
    runs: Path, arguments: list[str], message: str, capsys: Any
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--runs", str(runs)])
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1


def test_engines_need_their_tensorrt(runs: Path, capfd: Any) -> None:
    if importlib.util.find_spec("tensorrt") is not None:
        pytest.skip("TensorRT is installed here")
    with pytest.raises(SystemExit) as ended:
        main(["engine", "tensorrt-gpu", "--run", "int8", "--runs", str(runs)])
    assert ended.value.code == 2
    assert "TensorRtMissingError" in capfd.readouterr().err
    assert not list((runs / "int8" / "engines").rglob("*.engine"))


def test_without_targets_nothing_is_exported(start: list[str], tmp_path: Path) -> None:
    recipe = load_recipe("int8_ptq", [*start, "export.targets=[]"])
    results = run_recipe(recipe, tmp_path, "run", QUIET)
    assert results["exports"] == {} and not (tmp_path / "run" / "exports").exists()
    assert exporting.chosen_targets(recipe) == ()
