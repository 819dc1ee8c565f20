"""A form for a runtime is the same function; what the plan quantizes keeps its module and name."""

from collections.abc import Iterable
from itertools import product

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
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


def answers(
    graph: ir.Model,
    level: onnxruntime.GraphOptimizationLevel,
    batches: Iterable[NDArray[np.float32]] | None = None,
) -> torch.Tensor:
    if batches is None:
        batches = [batch.numpy() for batch in images(6, seed=9).split(3)]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
    found = [session.run(None, {"images": batch})[0] for batch in batches]
    return torch.from_numpy(np.concatenate(found))


CONVOLUTION = """
<ir_version: 9, opset_import: ["" : 20]>
g (float[n, 24, 6, 6] images) => (float[n, 40, 6, 6] logits) {
  q = QuantizeLinear(images, step, zero)
  x = DequantizeLinear(q, step, zero)
  w = DequantizeLinear<axis = 0>(weight, steps, zeros)
  [product] y = Conv(x, w, bias)
  logits = Identity(y)
}
"""


@pytest.mark.parametrize("whole", [False, True], ids=["scales", "one-scale"])
def test_a_product_computes_what_the_convolution_did(whole: bool) -> None:
    draw = np.random.default_rng(0)
    steps = draw.uniform(0.001, 0.01, () if whole else 40).astype(np.float32)
    bias = draw.integers(-9000, 9000, 40) * steps * np.float32(0.02)
    constants = {
        "step": np.float32(0.02),
        "zero": np.uint8(117),
        "weight": draw.integers(-127, 128, (40, 24, 1, 1), dtype=np.int8),
        "steps": steps,
        "zeros": np.zeros(() if whole else 40, np.int8),
        # In whole steps of the sums, as `retarget` leaves it.
        "bias": bias.astype(np.float32),
    }
    tensors = [ir.tensor(np.asarray(value), name=name) for name, value in constants.items()]
    graph = ir.from_onnx_text(CONVOLUTION, tensors)
    after = ir.from_proto(ir.to_proto(graph))
    use_integer_products(after)
    assert "Conv" not in {node.op_type for node in after.graph}
    pixels = draw.normal(0, 1, (3, 24, 6, 6)).astype(np.float32)
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected, found = (answers(one, level, [pixels]) for one in (graph, after))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_products_leave_the_simulation_what_it_was(
    exported: tuple[QuantizedCare, ir.Model],
) -> None:
    model, before = exported
    after = ir.from_proto(ir.to_proto(before))
    use_integer_products(after)
    with torch.no_grad():
        simulated = model(images(6, seed=9))
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        level = getattr(onnxruntime.GraphOptimizationLevel, level)
        assert sqnr(answers(after, level), simulated) > 30


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
    assert kinds.count("MatMulIntegerToFloat") == len(pointwise) > 10
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
