"""What ONNX Runtime executes in integers: the same network, without a convolution in its way."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from quantized import SIZE, images, network, quantized, section, sqnr

from care_compress.evaluate.site_outputs import TURNED, tap_file
from care_compress.export.form import form_for, in_form
from care_compress.export.ort_channels_last import NARROW, put_channels_last
from care_compress.export.ort_head import split_head_input
from care_compress.export.ort_products import use_integer_products
from care_compress.export.to_onnx import float_graph, put_integers
from care_compress.model.compact import CompactCare
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.ptq import planned
from care_compress.quantize.retarget import float_network, retarget
from care_compress.recipe.target import load_target

LARGER = 72  # 18, 9, 4 and 2 rows: one downsampling leaves a row over


def moved_by(
    rule: dict[str, object], target_rules: bool = True, **switches: bool
) -> tuple[QuantizedCare, CompactCare]:
    """A model as ONNX Runtime executes it, and the network inside."""
    chosen, target = section(rule), load_target("onnxruntime-cpu")
    start = network(**switches)
    skeleton, _ = planned(start, chosen, SIZE)
    model = quantized(chosen, start).model
    inner = float_network(model, skeleton)
    rules = (*chosen.rules, *target.rules) if target_rules else chosen.rules
    return retarget(model, inner, rules, target), inner


@pytest.fixture(scope="module")
def moved() -> tuple[QuantizedCare, CompactCare]:
    """With a head whose weights alone are quantized."""
    return moved_by({"role": "head", "input": "float"})


def graph_at(size: int, moved: tuple[QuantizedCare, CompactCare]) -> ir.Model:
    """Its graph before products are put in."""
    model, inner = moved
    form = form_for(load_target("onnxruntime-cpu"), model.plan)
    graph = float_graph(in_form(inner, form), size)
    put_integers(graph, model)
    return graph


@pytest.fixture(scope="module")
def exported(moved: tuple[QuantizedCare, CompactCare]) -> tuple[QuantizedCare, ir.Model]:
    """The model and its graph for images as calibrated on."""
    return moved[0], graph_at(SIZE, moved)


def copied(graph: ir.Model) -> ir.Model:
    """Another one, to be edited."""
    return ir.from_proto(ir.to_proto(graph))


def kinds_of(graph: ir.Model) -> list[str]:
    """What its nodes do."""
    return [node.op_type for node in graph.graph]


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
g (float[n, 32, H, 6] images) => (float[n, 40, OUT] logits) {
  q = QuantizeLinear(images, step, zero)
  x = DequantizeLinear(q, step, zero)
  w = DequantizeLinear<axis = 0>(weight, steps, zeros)
  [product] y = Conv<strides = [K, K]>(x, w, bias)
  logits = Identity(y)
}
"""


def convolution(kernel: int, rows: int, whole: bool = False, biased: bool = True) -> ir.Model:
    """A quantized convolution of patches that lie side by side."""
    draw = np.random.default_rng(0)
    steps = draw.uniform(0.001, 0.01, () if whole else 40).astype(np.float32)
    bias = draw.integers(-9000, 9000, 40) * steps * np.float32(0.02)
    constants = {
        "step": np.float32(0.02),
        "zero": np.uint8(117),
        "weight": draw.integers(-64, 64, (40, 32, kernel, kernel), dtype=np.int8),  # as targets say
        "steps": steps,
        "zeros": np.zeros(() if whole else 40, np.int8),
        # In whole steps of the sums, as `retarget` leaves it.
        "bias": bias.astype(np.float32),
    }
    text = CONVOLUTION.replace("H", str(rows)).replace("K", str(kernel))
    if not biased:
        del constants["bias"]
        text = text.replace(", bias)", ")")
    tensors = [ir.tensor(np.asarray(value), name=name) for name, value in constants.items()]
    return ir.from_onnx_text(text.replace("OUT", f"{rows // kernel}, {6 // kernel}"), tensors)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize("whole", [False, True], ids=["scales", "one-scale"])
@pytest.mark.parametrize("kernel", [1, 2])
def test_a_product_computes_what_the_convolution_did(
    kernel: int, whole: bool, biased: bool
) -> None:
    graph = convolution(kernel, 8, whole, biased)
    after = copied(graph)
    use_integer_products(after)
    assert "Conv" not in kinds_of(after)
    pixels = np.random.default_rng(1).normal(0, 1, (3, 32, 8, 6)).astype(np.float32)
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected, found = (answers(one, level, [pixels]) for one in (graph, after))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_patches_that_do_not_fill_the_image_stay_a_convolution() -> None:
    """One pixel of a row is left over; in one of even length the same one becomes a product."""
    for rows, stays in ((7, True), (8, False)):
        graph = copied(convolution(2, rows))
        use_integer_products(graph)
        assert ("Conv" in kinds_of(graph)) is stays


def test_products_leave_the_simulation_what_it_was(
    exported: tuple[QuantizedCare, ir.Model],
) -> None:
    model, before = exported
    after = copied(before)
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
    graph = copied(exported[1])
    pointwise = [
        decision.site.name
        for decision in exported[0].plan.decisions
        if decision.in_integers and decision.site.role in ("pointwise", "attention.qk")
    ]
    patches = ["stages.2.downsample.1", "stages.3.downsample.1"]  # the first is too narrow
    use_integer_products(graph)
    options = onnxruntime.SessionOptions()
    path = tmp_path_factory.mktemp("optimized") / "optimized.onnx"
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
    kinds = [node.op_type for node in ir.load(path).graph]
    assert kinds.count("MatMulIntegerToFloat") == len(pointwise + patches) > 10
    assert kinds.count("DequantizeLinear") < len(pointwise) // 2


def test_a_product_keeps_the_name_and_shape_of_its_site(
    exported: tuple[QuantizedCare, ir.Model],
) -> None:
    graph = copied(exported[1])
    shapes = {node.name: node.outputs[0].shape for node in graph.graph if node.op_type == "Conv"}
    use_integer_products(graph)
    named = {node.name: node for node in graph.graph}
    for site, shape in shapes.items():
        assert named[site].outputs[0].shape == shape


@pytest.fixture(scope="module")
def turned(moved: tuple[QuantizedCare, CompactCare]) -> tuple[ir.Model, ir.Model]:
    """The graph of larger images with products, and the same with wide stages channels last."""
    before = graph_at(LARGER, moved)
    use_integer_products(before)
    after = copied(before)
    put_channels_last(after)
    return before, after


def test_channels_last_compute_the_same(turned: tuple[ir.Model, ir.Model]) -> None:
    pixels = np.random.default_rng(0).normal(0, 1, (3, 3, LARGER, LARGER)).astype(np.float32)
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected, found = (answers(graph, level, [pixels]) for graph in turned)
    assert torch.equal(found, expected)


def test_a_wide_stage_transposes_less(turned: tuple[ir.Model, ir.Model], tmp_path: Path) -> None:
    def transposes(graph: ir.Model) -> int:
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        # What comes behind is for this processor; transposes are gone before.
        level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.graph_optimization_level = level
        onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
        return kinds_of(ir.load(tmp_path / "optimized.onnx")).count("Transpose")

    before, after = turned
    widths = {node.outputs[0].shape[1] for node in before.graph if node.op_type == "Gelu"}
    assert max(widths) > NARROW
    assert transposes(after) < transposes(before)


def test_narrow_stages_are_not_turned(turned: tuple[ir.Model, ir.Model]) -> None:
    joins = [node for node in turned[1].graph if node.op_type in ("Add", "Mul", "Concat", "Slice")]
    stages = {(node.name or "")[:8] for node in joins if TURNED in (node.name or "")}
    assert stages == {"stages.3"}, "of care_nano: 16, 32, 64 and 128 channels"


def test_layers_are_shown_channels_first(
    turned: tuple[ir.Model, ir.Model], exported: tuple[QuantizedCare, ir.Model], tmp_path: Path
) -> None:
    named = {node.name for node in turned[1].graph}
    planned_sites = {decision.site.name for decision in exported[0].plan.decisions}
    sites = {site for site in planned_sites if f"{site}{TURNED}" in named}
    assert {"stages.3.blocks.0.add", "stages.3.blocks.0.inter_layer.inter1_fc2"} <= sites
    image = torch.randn(1, 3, LARGER, LARGER, generator=torch.Generator().manual_seed(0))
    shown = []
    for number, graph in enumerate(turned):
        path = tmp_path / f"{number}.onnx"
        ir.save(graph, path)
        shown.append(tap_file(path, sites)(image))
    expected, found = shown
    assert expected.keys() == found.keys() == sites
    for site in sites:
        assert found[site].shape == expected[site].shape
        # Other kernels round otherwise; in another order it would be below 0 dB.
        assert sqnr(found[site], expected[site]) > 20


@pytest.mark.parametrize(
    "rule",
    [{"role": "residual_add", "input": 8}, {"stage": 3, "weight": "float", "input": "float"}],
    ids=["integer-additions", "no-products"],
)
def test_other_stages_keep_their_transposes(rule: dict[str, object]) -> None:
    graph = graph_at(SIZE, moved_by(rule, target_rules=False))
    use_integer_products(graph)
    assert "MatMulIntegerToFloat" in kinds_of(graph), "in narrower stages"
    put_channels_last(graph)
    joins = [node for node in graph.graph if node.op_type in ("Add", "Mul", "Concat", "Slice")]
    assert not [node.name for node in joins if TURNED in (node.name or "")]


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "none"])
def test_the_head_reads_integers_and_keeps_its_accuracy(
    exported: tuple[QuantizedCare, ir.Model], biased: bool
) -> None:
    before = copied(exported[1])
    (head,) = (node for node in before.graph if node.op_type == "Gemm")
    head.resize_inputs(3 if biased else 2)  # a bias of zeros is left out
    after = copied(before)
    split_head_input(after)
    stored = {value.name for value in after.graph.initializers.values()}
    assert "heads.fc.weight" not in stored  # nothing expands it
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    expected, found = (answers(graph, level) for graph in (before, after))
    assert sqnr(found, expected) > 80
    # The scales of its input come from the whole batch.
    alone = answers(after, level, (image.numpy() for image in images(6, seed=9).split(1)))
    assert sqnr(alone, found) > 80


HEAD = """
<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 32] images) => (float[n, 6] logits) {
  DATA
  w = DequantizeLinear<AXIS>(weight, steps, zeros)
  logits = Gemm<transB = 1>(x, w)
}
"""
IN_FLOAT = "x = Identity(images)"
IN_INTEGERS = "q = QuantizeLinear(images, step) x = DequantizeLinear(q, step)"


@pytest.mark.parametrize(
    ("data", "groups", "bits", "split"),
    [
        (IN_FLOAT, 1, 8, True),
        (IN_FLOAT, 2, 8, False),
        (IN_FLOAT, 1, 4, False),
        (IN_INTEGERS, 1, 8, False),
    ],
    ids=["plain", "groups", "4 bits", "integers"],
)
def test_other_heads_stay_as_they_are(data: str, groups: int, bits: int, split: bool) -> None:
    """No such product has scales of groups or 4 bits; an input in integers needs no second one."""
    draw = np.random.default_rng(0)
    steps = draw.uniform(0.01, 0.02, (6, groups) if groups > 1 else 6).astype(np.float32)
    kind = ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
    stored = draw.integers(-8, 8, (6, 32), dtype=np.int8)
    tensors = [
        ir.tensor(stored, dtype=kind, name="weight"),
        ir.tensor(steps, name="steps"),
        ir.tensor(np.zeros(steps.shape, np.int8), dtype=kind, name="zeros"),
    ]
    if data == IN_INTEGERS:
        tensors.append(ir.tensor(np.float32(0.1), name="step"))
    axis = "axis = 1, block_size = 16" if groups > 1 else "axis = 0"
    before = ir.from_onnx_text(HEAD.replace("DATA", data).replace("AXIS", axis), tensors)
    graph = copied(before)
    split_head_input(graph)
    assert ("Gemm" not in kinds_of(graph)) is split
    rows = [draw.normal(size=(3, 32)).astype(np.float32)]
    level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    assert sqnr(answers(graph, level, rows), answers(before, level, rows)) > 60


def test_two_heads_are_read_as_integers_too() -> None:
    before = graph_at(SIZE, moved_by({"role": "head", "input": "float"}, merge_heads=False))
    after = copied(before)
    split_head_input(after)
    assert "Gemm" not in kinds_of(after)
    level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    assert sqnr(answers(after, level), answers(before, level)) > 80
