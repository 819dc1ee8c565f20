"""Files of 8-bit floats: what ONNX Runtime computes of them, and what NVIDIA's compiler builds."""

import functools
from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto
from quantized import KEPT, SIZE, care, images, network, quantized, sqnr

from care_compress.device.build import BuildOptions, build_engine
from care_compress.device.library import load_library
from care_compress.device.problems import BuildFailedError, TensorRtMissingError, UntypedModelError
from care_compress.errors import RecipeError
from care_compress.evaluate.agreement import HALF_BITS, HeldImages, Rounded
from care_compress.export.form import form_for, in_form
from care_compress.export.half import write_half
from care_compress.export.result import About, Preprocessing
from care_compress.export.stage import _options
from care_compress.export.to_onnx import float_graph, put_integers, write_onnx
from care_compress.export.variants import Variants
from care_compress.quantize.artifact import save_quantized
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.ptq import planned
from care_compress.quantize.retarget import float_network, retarget
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import DataSection, ExportSection
from care_compress.recipe.target import load_target
from care_compress.runtime.on_onnxruntime import OnnxPredictor

ABOUT = About("a recipe", "f" * 64, ("cat",), Preprocessing.of(DataSection()))
RTX = load_target("tensorrt-rtx")


@functools.cache
def made() -> tuple[QuantizedCare, ir.Model]:
    """The shipped recipe's model as a GPU executes it, and its graph in float32."""
    section = load_recipe("fp8_ptq").quantize
    assert section is not None
    model = quantized(section).model
    inside = float_network(model, planned(network(), section, SIZE)[0])
    moved = retarget(model, inside, (*section.rules, *RTX.rules), RTX)
    graph = float_graph(in_form(inside, form_for(RTX, moved.plan)), SIZE, 1)
    graph.opset_imports[""] = RTX.opset
    put_integers(graph, moved)
    return moved, graph


@pytest.fixture
def half(tmp_path: Path) -> Path:
    model, graph = made()
    typed = ir.from_proto(ir.to_proto(graph))
    write_half(typed)
    path = tmp_path / "fp8.onnx"
    write_onnx(typed, ABOUT, path, model)
    return path


def test_the_file_computes_what_was_simulated(tmp_path: Path, half: Path) -> None:
    model, graph = made()
    write_onnx(graph, ABOUT, tmp_path / "wide.onnx", model)
    x = images(8, seed=9)
    with torch.no_grad():
        simulated, rounded = model(x), Rounded(model, HALF_BITS)(x)
    wide, narrow = (OnnxPredictor(path)(x) for path in (tmp_path / "wide.onnx", half))
    # A float sum in another order moves a value that lies between two numbers by a whole step, so
    # most images are equal, and a few differ a little.
    nearness = sorted(sqnr(a, b) for a, b in zip(wide, simulated, strict=True))
    assert nearness[len(nearness) // 2] > 50 and nearness[0] > 20
    assert sqnr(narrow, simulated) > sqnr(rounded, simulated) - 3, "as float16 promises"


def test_the_file_holds_8_bit_floats_and_the_rest_in_float16(half: Path) -> None:
    model, _ = made()
    proto = onnx.load(half)
    assert proto.opset_import[0].version == 21
    stored = {one.name: one for one in proto.graph.initializer}
    kinds = Counter(one.data_type for one in stored.values() if len(one.dims) == 4)
    weights = len(list(model.integers("weight")))
    assert kinds[TensorProto.FLOAT8E4M3FN] == weights and TensorProto.INT8 not in kinds
    makers = {node.output[0]: node for node in proto.graph.node}
    eight = set()
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert stored[node.input[1]].data_type == TensorProto.FLOAT16
            zero = stored[node.input[2]]
            assert zero.data_type == TensorProto.FLOAT8E4M3FN and not any(zero.raw_data)
        if node.op_type in ("Conv", "Gemm"):
            from_ = [makers[name].op_type for name in node.input[:2] if name in makers]
            if from_.count("DequantizeLinear") == 2:
                eight.add(node.name)
    assert eight == {decision.site.name for decision in model.plan.decisions if decision.quantized}
    assert not any("dwconv" in name or "_conv" in name or "head" in name for name in eight)


def test_nvidias_compiler_builds_it_for_gpus_that_multiply_8_bit_floats(half: Path) -> None:
    try:
        library = load_library("tensorrt_rtx")
    except TensorRtMissingError:
        pytest.skip("tensorrt-rtx is not installed")
    options = _options("fp8", RTX)
    assert options.compute_capabilities == ("8.9", "12.0")
    built = build_engine(library, half, options, lambda phase, part: None)
    model, _ = made()
    kernels = Counter(row.precision for row in built.layers)
    assert kernels["FP8"] == len(list(model.integers("weight"))), "one for every such product"
    assert kernels["INT8"] == 0 and kernels["FP16"] > kernels["FP8"]
    with pytest.raises(BuildFailedError, match="fp8"):
        older = BuildOptions("fp8", compute_capabilities=("8.6",))
        build_engine(library, half, older, lambda phase, part: None)
    with pytest.raises(UntypedModelError, match="from INT8"):
        build_engine(library, half, BuildOptions("int8"), lambda phase, part: None)


def test_other_models_are_built_for_every_gpu() -> None:
    assert _options("fp16", RTX) == BuildOptions("fp16")
    assert _options("int8", RTX) == BuildOptions("int8")


def test_a_gpu_without_such_products_takes_nothing_over_from_one_with_them(tmp_path: Path) -> None:
    section, kept = load_recipe("fp8_ptq").quantize, tmp_path / "model.safetensors"
    assert section is not None
    save_quantized(quantized(section).model, section, KEPT, kept)
    pixels = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    data = DataSection(resolution=SIZE)
    variants = Variants(
        care(),
        network(),
        kept,
        lambda: HeldImages(pixels, torch.zeros(2), data),
        data,
        ExportSection(),
    )
    thor, orin = (load_target(f"tensorrt-jetson-{board}") for board in ("thor", "orin"))
    assert variants.of(thor).graph.opset_imports[""] == 21
    with pytest.raises(RecipeError, match="tensorrt-jetson-orin has no products of 8-bit floats"):
        variants.of(orin)
    assert variants.of(load_target("tensorrt-gpu")) is variants.of(thor)
