"""Files that take camera bytes answer as those that take floats, in every runtime and program."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from PIL import Image
from quantized import SIZE, care, network, quantized, section, sqnr
from rich.console import Console
from tiny import image_folder
from torch import Tensor

from care_compress.data.transforms import normalize
from care_compress.device.build import BuildOptions, build_engine
from care_compress.device.cpu_app import main
from care_compress.device.library import load_library
from care_compress.errors import RecipeError, TargetError
from care_compress.evaluate.site_distance import first_divergence
from care_compress.export.bundle import unpack_bundle
from care_compress.export.byte_input import take_bytes
from care_compress.export.deploy import make_bundle
from care_compress.export.half import highest_half, write_half
from care_compress.export.result import About, Preprocessing
from care_compress.export.to_onnx import float_graph, put_integers, write_onnx
from care_compress.export.to_openvino import write_ir
from care_compress.model.checkpoint import save_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.ptq import planned
from care_compress.quantize.retarget import float_network
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import DataSection
from care_compress.run.stages import recipe_parts
from care_compress.runtime.artifact import input_size
from care_compress.runtime.feed import Feed, feed_for
from care_compress.runtime.memory import peak_memory
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.runtime.on_openvino import OpenVinoPredictor
from care_compress.runtime.on_tensorrt import EnginePredictor
from care_compress.runtime.probe import probe
from care_compress.runtime.profile import profile_layers
from care_compress.runtime.runners import open_runner

QUIET = Console(quiet=True)
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Channels that differ, and one of them hardly normalised: a mean or std in the wrong place shows.
ODD = DataSection(resolution=SIZE, mean=(0.9, 0.05, 0.4), std=(0.11, 0.93, 0.5))
EXACT_DB = 90.0  # only the order of float sums differs


def pixels(count: int = 6) -> Tensor:
    """Smooth pictures with noise, of all values."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")
    noise = 0.1 * torch.rand(count, 3, SIZE, SIZE, generator=generator)
    return ((smooth + noise) * 260 - 10).clamp(0, 255).to(torch.uint8)


def prepared(count: int = 6, data: DataSection = ODD) -> Tensor:
    return normalize(pixels(count), data.mean, data.std)


def written(
    graph: ir.Model, path: Path, data: DataSection, model: QuantizedCare | None, takes: Any
) -> Path:
    about = About("recipe", "f" * 64, tuple("abcde"), Preprocessing.of(data), input=takes)
    write_onnx(graph, about, path, model)
    return path


def float_files(folder: Path, data: DataSection = ODD, batch: Any = 1) -> dict[str, Path]:
    """The float network, taking floats and bytes."""
    made = {}
    for takes in ("float", "uint8"):
        graph = float_graph(network(), SIZE, batch)
        if takes == "uint8":
            take_bytes(graph, data)
        made[takes] = written(graph, folder / f"{takes}.onnx", data, None, takes)
    return made


def int8_files(folder: Path, *extra: dict[str, object]) -> tuple[QuantizedCare, dict[str, Path]]:
    chosen = section(*extra)
    model = quantized(chosen).model
    skeleton, _ = planned(network(), chosen, SIZE)
    made = {}
    for takes in ("float", "uint8"):
        graph = float_graph(float_network(model, skeleton), SIZE, 1)
        put_integers(graph, model)
        if takes == "uint8":
            take_bytes(graph, ODD)
        made[takes] = written(graph, folder / f"{takes}.onnx", ODD, model, takes)
    return model, made


def kinds(path: Path) -> list[str]:
    """The operations between the input and what multiplies or quantizes it."""
    nodes = onnx.load(path).graph.node
    return [node.op_type for node in nodes if node.name.startswith("images/")]


@pytest.mark.parametrize("data", [ODD, DataSection(resolution=SIZE)], ids=["odd", "ImageNet"])
def test_the_bytes_of_normalised_images_are_the_pixels_they_came_from(data: DataSection) -> None:
    every = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)
    found = Feed(True, data.mean, data.std)(normalize(every, data.mean, data.std))
    assert found.dtype == np.uint8 and found.shape == (1, 16, 16, 3)
    assert np.array_equal(found, every.permute(0, 2, 3, 1).numpy())


def test_a_float_stem_takes_the_normalization_in(tmp_path: Path) -> None:
    files = float_files(tmp_path, batch="dynamic")
    with torch.no_grad():
        expected = network()(prepared())
    predict = OnnxPredictor(files["uint8"])
    assert kinds(files["uint8"]) == ["Cast", "Transpose"]
    assert predict.input.shape == ["batch", SIZE, SIZE, 3] and predict.input.type == "tensor(uint8)"
    assert sqnr(predict(prepared()), expected) > EXACT_DB
    assert sqnr(predict(prepared())[:1], predict(prepared()[:1])) > EXACT_DB, "and a free batch"
    write_ir(
        files["uint8"], About("r", "f", ("a",), Preprocessing.of(ODD)), tmp_path / "m.xml", False
    )
    assert sqnr(OpenVinoPredictor(tmp_path / "m.xml")(prepared()), expected) > EXACT_DB


def test_a_quantized_stem_keeps_the_integers_it_was_trained_with(tmp_path: Path) -> None:
    model, files = int8_files(tmp_path)
    assert kinds(files["uint8"]) == ["Cast", "Transpose", "Mul", "Add"]
    stored = [
        {
            t.name: t
            for t in onnx.load(path).graph.initializer
            if t.data_type == onnx.TensorProto.INT8
        }
        for path in files.values()
    ]
    assert stored[0] == stored[1]
    x = prepared()
    for suffix, opened in ((".onnx", OnnxPredictor), (".xml", OpenVinoPredictor)):
        paths = [path.with_suffix(suffix) for path in files.values()]
        if suffix == ".xml":
            for path in paths:
                about = About("r", "f", ("a",), Preprocessing.of(ODD))
                write_ir(path.with_suffix(".onnx"), about, path, half=False)
        as_float, as_bytes = (opened(path)(x) for path in paths)
        assert sqnr(as_bytes, as_float) > 40, suffix  # a step that a last bit moves, if any
    assert model.plan.decisions


def test_layer_by_layer_a_file_is_its_model(tmp_path: Path) -> None:
    """A file whose stem is wrong is said to part there, one that is right is near everywhere."""
    path = float_files(tmp_path)["uint8"]
    names = [name for name, _ in network().named_modules()]
    proto = onnx.load(path)
    (weight,) = (t for t in proto.graph.initializer if t.name == "images_weight")
    weight.CopyFrom(
        onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(weight), weight.name)
    )
    onnx.save(proto, path)
    assert first_divergence(network(), path, names, prepared(1)).startswith("stem.0")


def test_everything_that_runs_files_runs_these(tmp_path: Path) -> None:
    path = float_files(tmp_path)["uint8"]
    ov = tmp_path / "m.xml"
    write_ir(path, About("r", "f", ("a",), Preprocessing.of(ODD)), ov, half=False)
    for file in (path, ov):
        probe(file, SIZE)
        assert input_size(file, None) == (SIZE, SIZE)
        assert profile_layers(file, prepared(2), seconds=0.01).layers
        assert open_runner(file, prepared(3), 1, "f32").load_seconds > 0
    assert peak_memory(path, size=(SIZE, SIZE)) > 0
    assert peak_memory(ov, size=(SIZE, SIZE)) > 0


def half_file(folder: Path, model: QuantizedCare | None) -> Path:
    if model is None:
        graph = float_graph(network(), SIZE, 1)
    else:
        skeleton, _ = planned(network(), section(SYMMETRIC), SIZE)
        graph = float_graph(float_network(model, skeleton), SIZE, 1)
        put_integers(graph, model)
    take_bytes(graph, ODD)
    write_half(graph)
    return written(graph, folder / "half.onnx", ODD, model, "uint8")


SYMMETRIC: dict[str, object] = {"input": {"bits": 8, "symmetric": True, "granularity": "tensor"}}


@pytest.mark.parametrize("kind", ["fp16", "int8"])
def test_nvidias_compiler_takes_them(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    model = quantized(section(SYMMETRIC)).model if kind == "int8" else None
    path = half_file(tmp_path, model)
    options = BuildOptions(kind, compute_capabilities=("8.6",))
    built = build_engine(load_library("tensorrt_rtx"), path, options, lambda phase, done: None)
    assert built.plan
    first = built.layers[0]
    assert first.precision == "UINT8", "the bytes go in as they are"


def test_the_range_of_float16_is_looked_at_with_bytes(tmp_path: Path) -> None:
    path = half_file(tmp_path, None)
    peak = highest_half(path, [prepared(3)])
    assert peak is not None and 255 <= peak.value < 65504
    near = OnnxPredictor(path)(prepared())
    with torch.no_grad():
        assert sqnr(near, network()(prepared())) > 50


def test_normalization_stays_in_float32_where_the_rest_is_float16(tmp_path: Path) -> None:
    path = half_file(tmp_path, quantized(section(SYMMETRIC)).model)
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    made = {node.name: types.get(node.output[0]) for node in model.graph.node}
    assert made["images/Mul"] == made["images/Add"] == onnx.TensorProto.FLOAT
    assert made["stem.0"] == onnx.TensorProto.FLOAT16


def test_a_model_of_somebody_elses_format_takes_bytes_too(tmp_path: Path) -> None:
    """As NNCF's is: OpenVINO puts the normalization in front of it."""
    path = float_files(tmp_path, batch="dynamic")["float"]
    about = About("r", "f", ("a",), Preprocessing.of(ODD), input="uint8")
    write_ir(path, about, tmp_path / "m.xml", half=False, bytes_in=True)
    predict = OpenVinoPredictor(tmp_path / "m.xml")
    assert predict.feed.takes_bytes
    with torch.no_grad():
        assert sqnr(predict(prepared()), network()(prepared())) > EXACT_DB


def test_the_kind_of_input_is_part_of_what_an_export_was_made_from() -> None:
    as_float, as_bytes = (
        recipe_parts(load_recipe("int8_ptq", [f"export.input={takes}"]))
        for takes in ("float", "uint8")
    )
    assert [key for key in as_float if as_float[key] != as_bytes[key]] == ["export"]


@pytest.mark.parametrize(
    ("shape", "said", "why"),
    [
        ((1, 32, 32, 3), None, "care_compress.preprocessing"),
        ((1, 32, 32, 3), "not JSON", "care_compress.preprocessing"),
        ((1, 32, 32, 3), '{"mean": [0, 0, 0], "std": [1, 0, 1]}', "care_compress.preprocessing"),
        ((1, 32, 32, 3), '{"mean": [0, 0], "std": [1, 1]}', "care_compress.preprocessing"),
        ((1, 3, 32, 32), '{"mean": [0, 0, 0], "std": [1, 1, 1]}', r"\(B, H, W, 3\)"),
    ],
)
def test_bytes_of_unknown_meaning_are_refused(shape: Any, said: str | None, why: str) -> None:
    with pytest.raises(TargetError, match=why):
        feed_for(Path("m.onnx"), True, shape, said)


def test_a_file_without_its_preprocessing_is_refused_by_name(tmp_path: Path) -> None:
    path = float_files(tmp_path)["uint8"]
    proto = onnx.load(path)
    del proto.metadata_props[:]
    onnx.save(proto, path)
    with pytest.raises(TargetError, match=r"uint8\.onnx takes bytes and has no usable"):
        OnnxPredictor(path)


@pytest.mark.parametrize("value", ["int8", "UINT8", "true", "null"])
def test_another_kind_of_input_is_refused_in_one_line(value: str) -> None:
    with pytest.raises(RecipeError, match=r"export\.input") as caught:
        load_recipe("int8_ptq", [f"export.input={value}"])
    assert "\n" not in str(caught.value)


# ---- A whole run ---------------------------------------------------------------------------------

TARGETS = ["openvino-cpu", "onnxruntime-cpu", "tensorrt-jetson-orin"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One quantized model, exported with floats and with bytes."""
    folder = tmp_path_factory.mktemp("byte_runs")
    checkpoint = folder / "four.safetensors"
    save_checkpoint(care(4), checkpoint, {})
    start = [
        f"model.checkpoint={checkpoint}", f"data.source={image_folder(folder / 'images')}",
        "data.resolution=32", "data.workers=0", "quantize.calibrate.images=32",
        "data.mean=[0.6, 0.3, 0.4]", "data.std=[0.2, 0.5, 0.3]",
        f"export.targets=[{','.join(TARGETS)}]",
    ]  # fmt: skip
    for takes in ("float", "uint8"):
        recipe = load_recipe("int8_ptq", [*start, f"export.input={takes}"])
        run_recipe(recipe, folder / "runs", takes, QUIET)
    return folder / "runs"


def export_of(runs: Path, target: str, run: str = "uint8") -> Any:
    return json.loads((runs / run / "exports" / target / "export.json").read_text())


def test_every_target_gets_files_that_hold(runs: Path) -> None:
    for target in TARGETS:
        export, floats = export_of(runs, target), export_of(runs, target, "float")
        assert (export["input"], export["layout"]) == ("uint8", "NHWC")
        assert (floats["input"], floats["layout"]) == ("float", "NCHW")
        for name, entry in export["models"].items():
            assert entry["holds"], (target, name)
            assert entry["sha256"] != floats["models"][name]["sha256"]
    share = export_of(runs, "openvino-cpu")["integer_macs"]["share"]
    assert share == export_of(runs, "openvino-cpu", "float")["integer_macs"]["share"] >= 0.95
    held = onnx.load(runs / "uint8/exports/tensorrt-jetson-orin/int8.onnx")
    about = {one.key: one.value for one in held.metadata_props}
    assert about["care_compress.input"] == "uint8 NHWC"
    kind = held.graph.input[0].type.tensor_type
    assert kind.elem_type == onnx.TensorProto.UINT8
    assert [one.dim_value for one in kind.shape.dim] == [1, 32, 32, 3]


def test_files_of_floats_say_and_are_what_they_were(runs: Path) -> None:
    held = onnx.load(runs / "float/exports/onnxruntime-cpu/int8.onnx")
    assert "care_compress.input" not in {one.key for one in held.metadata_props}
    assert held.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("target", ["onnxruntime-cpu", "openvino-cpu"])
def test_a_bundle_for_a_cpu_verifies_and_times_bytes(
    runs: Path, target: str, tmp_path: Path
) -> None:
    folder = unpack_bundle(make_bundle(runs, "uint8", target, QUIET), tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["input"] == {"name": "images", "shape": [1, 32, 32, 3], "type": "uint8"}
    assert main(["verify", "--bundle", str(folder)]) == 0
    assert main(["bench", "--bundle", str(folder), "--seconds", "0.05"]) == 0
    found = json.loads((folder / "results.json").read_text())["models"]
    # ONNX Runtime has one way to compute, OpenVINO says which.
    exact = {"f32": 60, "bf16": 30}[found["fp32"]["floats_in"]]
    assert set(found) == {"int8", "fp32"} and found["fp32"]["accuracy"]["sqnr_db"] > exact


def test_a_bundle_for_tensorrt_says_bytes_to_other_programs(runs: Path, tmp_path: Path) -> None:
    folder = unpack_bundle(make_bundle(runs, "uint8", "tensorrt-jetson-orin", QUIET), tmp_path)
    text = (folder / "examples/triton/care_int8/config.pbtxt").read_text()
    assert re.search(r'name: "images"\s+data_type: TYPE_UINT8\s+dims: \[ 1, 32, 32, 3 \]', text)
    assert text.count("TYPE_FP32") == 1, "the logits"
    assert not (folder / "examples/deepstream").exists()
    page = (folder / "README.md").read_text()
    assert "Nothing for DeepStream" in page and "`deepstream/`" not in page


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_the_examples_answer_as_with_floats(runs: Path, runtime: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = tmp_path / "p.png"
    Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(picture)
    suffix = ".xml" if runtime == "openvino" else ".onnx"
    said = []
    for run in ("float", "uint8"):
        file = runs / run / "exports" / f"{runtime}-cpu" / f"int8{suffix}"
        command = [
            sys.executable,
            str(EXAMPLES / f"classify_{runtime}.py"),
            str(file),
            str(picture),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said[0] == said[1]


def test_an_engine_is_fed_by_the_graph_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a stand-in for the session: what reaches it are the pixels."""
    graph = float_files(tmp_path)["uint8"]
    engine = graph.with_suffix(".engine")
    engine.write_bytes(b"plan")
    engine.with_name("uint8.engine.json").write_text('{"library": "tensorrt"}')
    seen = []

    def run(images: Any) -> Any:
        seen.append(images)
        return np.zeros((len(images), 5), np.float32)

    session = SimpleNamespace(takes_bytes=True, shape=(1, SIZE, SIZE, 3), classes=5, run=run)
    place = "care_compress.runtime.on_tensorrt"
    monkeypatch.setattr(f"{place}.Session", lambda *given: session)
    monkeypatch.setattr(f"{place}.read_engine", lambda *given: (b"plan", {}))
    host: Any = SimpleNamespace(
        load_library=lambda name: None, load_cuda=lambda: SimpleNamespace(gpu=lambda: None)
    )
    assert len(EnginePredictor(engine, host)(prepared(2))) == 2
    assert np.array_equal(seen[0], pixels(2).permute(0, 2, 3, 1).numpy())
    assert seen[0].dtype == np.uint8
