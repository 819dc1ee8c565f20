"""A form for a runtime is the same function; what the plan quantizes keeps its module and name."""

from itertools import product

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from quantized import SIZE, images, network, quantized, section, sqnr

from care_compress.export.float_graph import float_graph
from care_compress.export.forms import Form, form_for, in_form
from care_compress.export.integers import put_integers
from care_compress.export.products import use_integer_products
from care_compress.model.care import build_model
from care_compress.model.compact import CompactCare
from care_compress.model.rewrite import rewrite
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.ptq import planned
from care_compress.quantize.retarget import float_network, retarget
from care_compress.target import load_target

FORMS = [Form(windows, tokens) for windows, tokens in product((False, True), repeat=2)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("arch", "size"), [("care_nano", 64), ("care_s0", 96), ("care_s2", 64)])
def test_every_form_is_the_same_function(arch: str, size: int, form: Form) -> None:
    torch.manual_seed(0)
    model = rewrite(build_model(arch, 7).eval().double())
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        difference = (in_form(model, form)(x) - expected).abs().max() / expected.abs().max()
    # The mask of the heads is exact in any float type.
    assert difference < 1e-12


def test_what_is_quantized_keeps_its_form() -> None:
    openvino, onnxruntime_cpu = (load_target(f"{name}-cpu") for name in ("openvino", "onnxruntime"))
    assert form_for(openvino, None) == Form(windows=True, tokens=True)
    assert form_for(load_target("tensorrt-rtx"), None) == Form()
    everything = planned(network(), section({"role": "attention.*", "weight": 8, "input": 8}), SIZE)
    assert form_for(onnxruntime_cpu, everything[1]) == Form()
    floating = section({"role": "depthwise", "weight": "float", "input": "float"})
    _, plan = planned(network(), floating, SIZE)
    assert form_for(onnxruntime_cpu, plan) == Form(windows=True, tokens=True)
    # Weights alone are quantized too: they are stored as integers.
    _, plan = planned(network(), section({"role": "depthwise", "input": "float"}), SIZE)
    assert form_for(openvino, plan) == Form(windows=False, tokens=True)


@pytest.fixture(scope="module")
def exported() -> tuple[QuantizedCare, ir.Model]:
    """A model as ONNX Runtime gets it, and its graph before products are put in."""
    chosen, target = section(), load_target("onnxruntime-cpu")
    model = quantized(chosen).model
    skeleton, _ = planned(network(), chosen, SIZE)
    inner: CompactCare = float_network(model, skeleton)
    moved = retarget(model, inner, (*chosen.rules, *target.rules), target)
    graph = float_graph(in_form(inner, form_for(target, moved.plan)), SIZE)
    put_integers(graph, moved)
    return moved, graph


def answers(graph: ir.Model, level: onnxruntime.GraphOptimizationLevel) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
    found = [session.run(None, {"images": x.numpy()})[0] for x in images(6, seed=9).split(3)]
    return torch.from_numpy(np.concatenate(found))


def test_products_compute_what_the_convolutions_did(
    exported: tuple[QuantizedCare, ir.Model],
) -> None:
    model, before = exported
    after = ir.from_proto(ir.to_proto(before))
    use_integer_products(after)
    exact = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    with torch.no_grad():
        simulated = model(images(6, seed=9))
    assert sqnr(answers(after, exact), answers(before, exact)) > 60
    fused = answers(after, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)
    assert sqnr(fused, simulated) > 30


def test_no_pointwise_convolution_is_left_in_float(
    exported: tuple[QuantizedCare, ir.Model], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """ONNX Runtime runs every quantized 1x1 as an integer product, which a Conv would not be."""
    graph = ir.from_proto(ir.to_proto(exported[1]))
    pointwise = [
        decision.site.name
        for decision in exported[0].plan.decisions
        if decision.in_integers and decision.site.role in ("pointwise", "attention.qk")
    ]
    use_integer_products(graph)
    options = onnxruntime.SessionOptions()
    path = tmp_path_factory.mktemp("optimized") / "optimized.onnx"
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
    kinds = [node.op_type for node in ir.load(path).graph]
    assert kinds.count("QGemm") == len(pointwise) > 10
    assert kinds.count("DequantizeLinear") < len(pointwise) // 2


def test_a_product_keeps_the_name_and_shape_of_its_site(
    exported: tuple[QuantizedCare, ir.Model],
) -> None:
    graph = ir.from_proto(ir.to_proto(exported[1]))
    shapes = {node.name: node.outputs[0].shape for node in graph.graph if node.op_type == "Conv"}
    use_integer_products(graph)
    named = {node.name: node for node in graph.graph}
    for site, shape in shapes.items():
        assert named[site].outputs[0].shape == shape
