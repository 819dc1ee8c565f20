"""An exported graph computes what the simulation computes, and holds what was planned."""

import copy
import json
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from quantized import (
    SIZE,
    W4,
    images,
    network,
    quantized,
    quantized_shipped,
    run,
    section,
    shipped_images,
    sqnr,
)

from care_compress.errors import ExportError, RecipeError
from care_compress.export.form import form_for, in_form
from care_compress.export.half import write_half
from care_compress.export.result import About, Preprocessing
from care_compress.export.to_onnx import float_graph, put_integers, write_onnx
from care_compress.export.to_openvino import write_ir
from care_compress.model.care import build_model
from care_compress.model.rewrite import rewrite
from care_compress.quantize.calibrate import set_weight_scales
from care_compress.quantize.placement import QuantizedCare, simulate
from care_compress.quantize.ptq import planned
from care_compress.quantize.retarget import float_network, retarget
from care_compress.recipe.quantize import QuantizeSection
from care_compress.recipe.sections import DataSection, RewriteSection
from care_compress.recipe.target import load_target
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.runtime.on_openvino import OpenVinoPredictor
from care_compress.runtime.profile_openvino import executed_layers, integer_macs

ABOUT = About("a recipe", "f" * 64, ("cat", "<dog>"), Preprocessing.of(DataSection()))
EXACT_DB = 60  # only the order of float sums differs


def graph_of(model: QuantizedCare, chosen: QuantizeSection, batch: object = 1) -> ir.Model:
    """The quantized graph of a model made from `network()`."""
    skeleton, _ = planned(network(), chosen, SIZE)
    graph = float_graph(float_network(model, skeleton), SIZE, batch)  # type: ignore[arg-type]
    put_integers(graph, model)
    return graph


@pytest.mark.parametrize(
    "chosen",
    [
        section(),
        section({"input": {"bits": 8, "symmetric": True, "granularity": "tensor"}}),
        section(W4),
        section({"role": "pointwise", "weight": {"bits": 4, "group": 4}}),
        section({"role": "attention.*", "weight": 8, "input": 8}),
        section({"role": "attention.*", "weight": 8, "input": 8}, covariance=False),
        section(
            {"role": "attention.kv", "input": {"bits": 8, "granularity": "channel"}},
            {"role": "attention.out", "input": {"bits": 8, "granularity": "channel"}},
        ),
        section(
            {"role": "pointwise", "site": "*fc1", "input": {"bits": 8, "granularity": "channel"}}
        ),
        section({"role": "residual_add", "input": 8}),
        section({"role": "head", "input": "float"}),
    ],
    ids=[
        "int8", "symmetric", "w4", "groups", "attention", "fused", "heads", "prenorm", "adds",
        "weight only",
    ],
)  # fmt: skip
def test_the_graph_computes_what_was_simulated(chosen: QuantizeSection) -> None:
    model = quantized(chosen).model
    x = images(8, seed=9)
    with torch.no_grad():
        simulated = model(x)
    found = run(graph_of(model, chosen), x)
    # A float sum in another order moves a value that lies between two steps by a whole one, so a
    # few images differ a little; most are equal.
    nearness = sorted(sqnr(a, b) for a, b in zip(found, simulated, strict=True))
    assert nearness[len(nearness) // 2] > EXACT_DB and nearness[0] > 20
    assert sqnr(simulated, network()(x)) > 3, "and that is still the network"


def test_a_free_batch_computes_the_same(tmp_path: Path) -> None:
    model = quantized(section()).model
    x = images(5, seed=9)
    path = tmp_path / "model.onnx"
    write_onnx(graph_of(model, section(), "dynamic"), ABOUT, path, model)
    predict = OnnxPredictor(path)
    assert predict.input.shape[0] == "batch"
    with torch.no_grad():
        expected = model(x)
    assert torch.equal(predict(x).argmax(1), expected.argmax(1))
    assert len(predict(x[:1])) == 1


@pytest.mark.parametrize("name", ["openvino-cpu", "tensorrt-gpu"])
def test_a_free_batch_is_not_mistaken_for_another_length_of_two(name: str) -> None:
    """The example holds two images; so do two classes and the smallest maps, of 2x2."""
    inside = rewrite(build_model("care_nano", 2), RewriteSection(fold_norms=False)).eval()
    inside = in_form(inside, form_for(load_target(name), None))
    graph = float_graph(inside, 64)
    for count in (1, 2, 5):
        x = torch.randn(count, 3, 64, 64)
        with torch.no_grad():
            assert sqnr(run(graph, x), inside(x)) > EXACT_DB


def test_the_file_holds_int8_weights_a_pair_for_every_tensor_and_who_made_it(
    tmp_path: Path,
) -> None:
    chosen = section()
    model = quantized(chosen).model
    path = tmp_path / "model.onnx"
    write_onnx(graph_of(model, chosen), ABOUT, path, model)
    proto = onnx.load(path)
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    weights = sum(q.operand == "weight" for q in model.integers())
    pairs = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
    integers = [stored[node.input[0]] for node in pairs if node.input[0] in stored]
    assert len(integers) == weights
    assert {tensor.data_type for tensor in integers} == {onnx.TensorProto.INT8}
    assert len(pairs) - weights == len(list(model.integers())) - weights
    assert proto.opset_import[0].version == 20
    known = {prop.key: prop.value for prop in proto.metadata_props}
    assert json.loads(known["care_compress.classes"]) == ["cat", "<dog>"]
    assert json.loads(known["care_compress.preprocessing"])["resize"] == 256
    names = {node.name for node in proto.graph.node}
    assert all(decision.site.name in names for decision in model.plan.decisions)


def test_four_bit_weights_are_stored_in_four_bits(tmp_path: Path) -> None:
    chosen = section(W4)
    model = quantized(chosen).model
    path = tmp_path / "model.onnx"
    write_onnx(graph_of(model, chosen), ABOUT, path, model)
    proto = onnx.load(path)
    assert proto.opset_import[0].version == 21
    kinds = [tensor.data_type for tensor in proto.graph.initializer]
    assert onnx.TensorProto.INT4 in kinds


def test_a_lost_pair_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    model = quantized(section()).model
    graph = graph_of(model, section())
    pair = next(node for node in graph.graph if node.op_type == "QuantizeLinear")
    after = pair.outputs[0].uses()[0].node
    source = pair.inputs[0]
    for use in list(after.outputs[0].uses()):
        use.node.replace_input_with(use.idx, source)
    graph.graph.remove([after, pair], safe=True)
    with pytest.raises(ExportError, match=r"quantized activations, planned are"):
        write_onnx(graph, ABOUT, tmp_path / "model.onnx", model)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def shipped() -> tuple[QuantizedCare, QuantizeSection]:
    """The included network in the default placement, for OpenVINO."""
    chosen = section({"role": "head", "input": "float"}, target="openvino-cpu")
    return quantized_shipped(chosen), chosen


def retargeted(shipped: tuple[QuantizedCare, QuantizeSection], name: str) -> QuantizedCare:
    model, chosen = shipped
    target = load_target(name)
    return retarget(model, inner(shipped), (*chosen.rules, *target.rules), target)


def inner(shipped: tuple[QuantizedCare, QuantizeSection]) -> torch.nn.Module:
    from quantized import shipped_network

    model, chosen = shipped
    return float_network(model, planned(shipped_network(), chosen, 64)[0])


def test_the_same_target_is_the_same_model(shipped: tuple[QuantizedCare, QuantizeSection]) -> None:
    x, _ = shipped_images("val", 64)
    model, chosen = shipped
    same = retarget(model, inner(shipped), chosen.rules, load_target("openvino-cpu"))
    with torch.no_grad():
        assert torch.equal(same(x), shipped[0](x))


@pytest.mark.parametrize(
    "name", ["onnxruntime-cpu", "tensorrt-jetson-orin", "openvino-npu", "tensorrt-rtx"]
)
def test_another_target_gets_what_it_executes_and_answers_the_same(
    shipped: tuple[QuantizedCare, QuantizeSection], name: str
) -> None:
    target, x = load_target(name), shipped_images("val", 256)[0]
    moved = retargeted(shipped, name)
    for quantizer in moved.integers():
        if quantizer.operand == "weight":
            continue
        assert quantizer.spec.symmetric == target.activations.symmetric
        assert target.activations.per_channel_depthwise or len(quantizer.scale) == 1
        if target.activations.symmetric:
            assert not quantizer.calculate_qparams()[1].any(), "TensorRT refuses a zero point"
    with torch.no_grad():
        before, after = shipped[0](x), moved(x)
    assert (before.argmax(1) == after.argmax(1)).float().mean() >= 0.98


def test_symmetric_ranges_cover_what_asymmetric_ones_did(
    shipped: tuple[QuantizedCare, QuantizeSection],
) -> None:
    before = {(q.site, q.operand): q for q in shipped[0].integers()}
    for quantizer in retargeted(shipped, "tensorrt-gpu").integers():
        source = before[quantizer.site, quantizer.operand]
        (scale, zero), (s, _) = source.calculate_qparams(), quantizer.calculate_qparams()
        low, high = scale * (source.quant_min - zero), scale * (source.quant_max - zero)
        assert (s * quantizer.quant_max >= high * 0.999).all()
        assert (s * quantizer.quant_min <= low * 0.999 + 1e-6).all()


def test_a_target_that_cannot_says_why() -> None:
    model, chosen = quantized(section(W4)).model, section(W4)
    skeleton = planned(network(), chosen, SIZE)[0]
    with pytest.raises(RecipeError, match="tensorrt-gpu has no 4-bit weights"):
        retarget(model, skeleton, chosen.rules, load_target("tensorrt-gpu"))


def typed(shipped: tuple[QuantizedCare, QuantizeSection]) -> tuple[ir.Model, QuantizedCare]:
    moved = retargeted(shipped, "tensorrt-jetson-orin")
    graph = float_graph(inner(shipped), 64, 1)  # type: ignore[arg-type]
    put_integers(graph, moved)
    write_half(graph)
    return graph, moved


def test_the_tensorrt_graph_is_typed_in_float16_with_attention_and_head_in_float32(
    shipped: tuple[QuantizedCare, QuantizeSection], tmp_path: Path
) -> None:
    graph, moved = typed(shipped)
    write_onnx(graph, ABOUT, tmp_path / "model.onnx", moved)
    proto = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "model.onnx"), strict_mode=True)
    kinds = {info.name: info.type.tensor_type.elem_type for info in proto.graph.value_info}
    half, single = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
    for node in proto.graph.node:
        kind = kinds.get(node.output[0])
        wide = ".core" in node.name or node.name.startswith(("pool", "heads"))
        if node.op_type in ("Conv", "Gelu", "Concat") and not wide:
            assert kind == half, node.name
        if node.op_type in ("Exp", "Div", "LayerNormalization"):
            assert kind == single, node.name
    assert proto.graph.input[0].type.tensor_type.elem_type == single
    x = shipped_images("val", 64)[0]
    with torch.no_grad():
        expected = moved(x)
    found = run(graph, x)
    assert sqnr(found, expected) > 25
    assert (found.argmax(1) == expected.argmax(1)).float().mean() >= 0.98


def test_channels_with_tiny_weights_survive_float16_scales(
    shipped: tuple[QuantizedCare, QuantizeSection],
) -> None:
    """A scale of 1e-6 is off by 2 % as the nearest float16; the integers are made to fit it."""
    model, chosen = copy.deepcopy(shipped[0]), shipped[1]
    site = "stages.2.blocks.0.inter_layer.inter1_fc2"
    (quantizer,) = (q for q in model.integers("weight") if q.site == site)
    with torch.no_grad():
        model.weight(site)[:4] *= 1e-4
        quantizer.scale[:4] *= 1e-4
    moved = retargeted((model, chosen), "tensorrt-gpu")
    (quantizer,) = (q for q in moved.integers("weight") if q.site == site)
    scale, _ = quantizer.calculate_qparams()
    assert torch.equal(scale.half().float(), scale), "float16 holds it"
    weight = moved.weight(site).detach()
    assert sqnr(quantizer(weight)[:4], weight[:4]) > 35


def test_a_dead_channel_is_not_blown_up_beyond_float16() -> None:
    """A channel that a GELU has shut is 1e-6 wide; evening it out would scale it by 1e6."""
    start = network()
    site = "stages.2.blocks.0.inter_layer.inter1"
    with torch.no_grad():
        start.get_submodule(f"{site}_fc1").bias[:3] = -40.0  # type: ignore[index]
    chosen = section({"role": "head", "input": "float"}, equalize=1.0)
    model = quantized(chosen, start).model
    depthwise = model.weight(f"{site}_conv").detach()
    assert float(depthwise.abs().max()) < 65504 / 2
    with torch.no_grad():
        assert sqnr(model(images(8)), start(images(8))) > 5, "and that is still the network"


def test_what_float16_cannot_hold_is_named() -> None:
    broken = network()
    with torch.no_grad():
        broken.get_submodule("stages.1.blocks.0.inter_layer.inter1_fc1").weight[0] = 1e6  # type: ignore[index]
    graph = float_graph(broken, SIZE, 1)
    with pytest.raises(ExportError, match=r"inter1_fc1\.weight reaches 1e\+06, float16 ends"):
        write_half(graph)


@pytest.mark.parametrize("half", [False, True])
def test_openvino_runs_every_planned_product_in_integers(
    shipped: tuple[QuantizedCare, QuantizeSection], tmp_path: Path, half: bool
) -> None:
    pytest.importorskip("openvino", reason="needs the openvino extra")
    moved = retargeted(shipped, "openvino-cpu")
    graph = float_graph(inner(shipped), 64, 1)  # type: ignore[arg-type]
    put_integers(graph, moved)
    write_onnx(graph, ABOUT, tmp_path / "model.onnx", moved)
    write_ir(tmp_path / "model.onnx", ABOUT, tmp_path / "model.xml", half)
    predict = OpenVinoPredictor(tmp_path / "model.xml")
    planned_macs = sum(d.site.macs for d in moved.plan.decisions if d.in_integers)
    executed = integer_macs(executed_layers(predict.compiled))
    assert 0.95 * planned_macs <= executed <= planned_macs
    x = shipped_images("val", 64)[0]
    with torch.no_grad():
        expected = moved(x)
    assert sqnr(predict(x), expected) > 30


def test_float_layers_are_not_counted_as_integers(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs the openvino extra")
    model = rewrite(build_model("care_nano", 5))
    write_onnx(float_graph(model, SIZE, 1), ABOUT, tmp_path / "f.onnx", None)
    write_ir(tmp_path / "f.onnx", ABOUT, tmp_path / "f.xml", half=False)
    layers = executed_layers(OpenVinoPredictor(tmp_path / "f.xml").compiled)
    assert integer_macs(layers) == 0
    assert sum(layer.macs for layer in layers) > 1e6


@pytest.mark.slow
def test_an_int8_care_s0_takes_little_more_than_a_byte_for_each_weight(tmp_path: Path) -> None:
    chosen = section({"role": "head", "input": "float"}, target="onnxruntime-cpu")
    start = rewrite(build_model("care_s0"), RewriteSection(fold_norms=False))
    inside, plan = planned(start, chosen, 64)
    model = simulate(inside, plan)
    set_weight_scales(model, {})
    graph = float_graph(inside, 64, 1)
    put_integers(graph, model)
    path = tmp_path / "s0.onnx"
    write_onnx(graph, ABOUT, path, model)
    weights = sum(parameter.numel() for parameter in start.parameters())
    assert path.stat().st_size <= min(8.0e6, 1.1 * 1.05 * weights)
