"""Which quantizers have a quantized product in front of them, counted on graphs of our own."""

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from quantized import SIZE, images, network

from care_compress.device.build import BuildOptions, build_engine
from care_compress.device.library import load_library
from care_compress.export.edges import count_edges
from care_compress.export.half import write_half
from care_compress.export.to_onnx import float_graph, put_integers
from care_compress.quantize.calibrate import calibrate
from care_compress.quantize.placement import QuantizedCare, simulate
from care_compress.quantize.ptq import planned
from care_compress.quantize.retarget import retarget
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.target import load_target

ORIN = load_target("tensorrt-jetson-orin")


@pytest.fixture(scope="module")
def graphs() -> dict[str, onnx.ModelProto]:
    """Care_nano as the Orin gets it, in every placement and in float16."""
    section = load_recipe("int8_ptq").quantize
    assert section is not None
    net, plan = planned(network(), section, SIZE)
    model = simulate(net, plan)
    calibrate(model, [images(4)], 99.99)
    found = {}
    for name in ("as shipped", *ORIN.placements):
        target = ORIN.placed(name)
        graph = float_graph(net, SIZE, 1)
        moved: QuantizedCare = retarget(model, net, (*section.rules, *target.rules), target)
        put_integers(graph, moved)
        write_half(graph)
        found[name] = ir.to_proto(graph)
    floating = float_graph(net, SIZE, 1)
    write_half(floating)
    found["float16"] = ir.to_proto(floating)
    return found


def test_only_a_quantized_product_hands_integers_on(graphs: dict[str, onnx.ModelProto]) -> None:
    blocks = 1 + 2 + 2 + 2
    edges = {name: count_edges(graph) for name, graph in graphs.items()}
    assert edges["float16"].integer == edges["float16"].alone == 0
    # With the depthwise in float, every quantizer stands behind a norm or that depthwise.
    assert edges["as shipped"].integer == edges["late"].integer == 0
    # With it in integers, fc1 hands on to it, and it to fc2; the last block has no second fc2 and
    # its depthwise is part of the pool.
    assert edges["hidden"].integer == 2 * (2 * blocks - 1)
    assert edges["late-hidden"].integer == 2 * (2 * 4 - 1)
    assert edges["hidden"].alone < edges["as shipped"].alone
    assert edges["late"].alone < edges["as shipped"].alone


def test_integers_between_products_move_fewer_bytes(graphs: dict[str, onnx.ModelProto]) -> None:
    moved = {name: count_edges(graph).product_bytes for name, graph in graphs.items()}
    assert moved["hidden"] < 0.8 * moved["as shipped"] < moved["float16"]
    assert moved["late-hidden"] < moved["late"] < moved["float16"]


def test_a_product_in_float16_moves_two_bytes_a_value() -> None:
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], "conv")
    value, half = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT16
    weight = onnx.helper.make_tensor("w", half, [4, 2, 1, 1], [0.0] * 8)
    graph = onnx.helper.make_graph(
        [node], "g", [value("x", half, [1, 2, 3, 3])], [value("y", half, [1, 4, 3, 3])], [weight]
    )
    assert count_edges(onnx.helper.make_model(graph)).product_bytes == 2 * (18 + 36)


def test_nvidias_compiler_multiplies_what_each_placement_quantizes(
    graphs: dict[str, onnx.ModelProto], tmp_path: Path
) -> None:
    """Every convolution behind a quantizer is an INT8 kernel, and nothing else is."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    library = load_library("tensorrt_rtx")
    moved = {}
    for name, graph in graphs.items():
        path = tmp_path / "m.onnx"
        onnx.save(graph, path)
        precision = "fp16" if name == "float16" else "int8"
        options = BuildOptions(precision, compute_capabilities=("8.6",))
        built = build_engine(library, path, options, lambda phase, done: None)
        assert built.moved is not None
        moved[name] = built.moved
        found = [row for row in built.layers if row.type == "correlation"]
        integers = [row for row in found if row.precision == "INT8"]
        edges = count_edges(graph)
        assert len(integers) == edges.integer + edges.alone
    # Weights in integers are half of those in float16; the last two stages hold most of them.
    assert moved["as shipped"].constant_bytes < 0.85 * moved["float16"].constant_bytes
    assert moved["late"].constant_bytes < 0.85 * moved["float16"].constant_bytes
    assert moved["late"].kernels < moved["as shipped"].kernels
