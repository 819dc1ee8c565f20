"""What NVIDIA's compiler makes of our graphs, read from its own listing, with no GPU."""

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch

from care_compress.device.build import BuildOptions, BuiltEngine, build_engine
from care_compress.device.kernels import Operand, parse_kernels, traffic
from care_compress.device.library import load_library
from care_compress.export.form import form_for, in_form
from care_compress.export.half import write_half
from care_compress.export.to_onnx import float_graph
from care_compress.model.care import build_model
from care_compress.model.rewrite import rewrite
from care_compress.recipe.target import load_target

LISTING = """Layers:
Name: stem.0_myl0_1, LayerType: correlation, Inputs: [ { Name: t0, Dimensions: [1,4,8,8], Strides: \
[256,1,32,4], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], \
Constants: [ { Name: w, Dimensions: [32,4,4,4], Strides: [64,1,16,4], StrideOrder: [3,0,2,1], \
Datatype: Int8, Format: (NHWC) Channel major format }], Outputs: [ { Name: t1, Dimensions: \
[1,32,2,2], Strides: [128,1,64,32], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) \
Channel major format }], TacticName: sm86_conv, a, b, StreamId: 0, Metadata: [ONNX Layer: stem.0]\
[ONNX Layer: stem.0/input_q]
Name: __myl_Add_myl0_2, LayerType: kgen, Inputs: [ { Name: t1, Dimensions: [1,32,2,2], Datatype: \
Float, Format: (Linear) }, { Name: t1, Dimensions: [1,32,2,2], Datatype: Float, Format: (Linear) \
}], Constants: [ { Name: w, Dimensions: [32,4,4,4], Datatype: Int8, Format: (Linear) }], Outputs: \
[ { Name: logits, Dimensions: [1,32], Datatype: Half, Format: (Linear) }], TacticName: , \
StreamId: 0, Metadata:

I/O Tensors:
 Name: images, IOMode: Input, DataType: Float, Dimensions: [1,3,8,8], Location: Device
"""


def test_a_listing_tells_every_kernel_and_what_it_moves() -> None:
    conv, add = parse_kernels(LISTING)
    assert conv.inputs == (Operand("t0", (1, 4, 8, 8), "INT8"),)
    assert conv.origin == ("stem.0", "stem.0/input_q")
    assert (conv.row.precision, conv.row.output) == ("INT8", "FP32")
    assert add.row.origin == (add.name,)  # it names no node
    moved = traffic([conv, add])
    assert moved.kernels == 2
    assert moved.activation_bytes == 256 + 512 + (512 + 512 + 64)
    assert moved.constant_bytes == 32 * 4 * 4 * 4  # read by both, there once


def test_a_text_without_kernels_has_none() -> None:
    assert parse_kernels("Layers:\nnothing of ours") == ()


@pytest.fixture(scope="module")
def rtx() -> Any:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    return load_library("tensorrt_rtx")


def compiled(rtx: Any, arch: str, resolution: int, folder: Path) -> BuiltEngine:
    """The float16 engine of a network, for compute capability 8.6."""
    network = rewrite(build_model(arch, 1000).eval())
    form = form_for(load_target("tensorrt-rtx"), None)
    graph = float_graph(in_form(network, form), resolution, 1)
    write_half(graph)
    path = folder / "fp16.onnx"
    onnx.save(ir.to_proto(graph), path)
    options = BuildOptions("fp16", compute_capabilities=("8.6",))
    return build_engine(rtx, path, options, lambda phase, done: None)


def test_the_float16_engine_of_care_s0_is_lean(rtx: Any, tmp_path: Path) -> None:
    """Of the published layout it was 313 kernels and 16.5 MB of constants."""
    torch.manual_seed(0)
    built = compiled(rtx, "care_s0", 224, tmp_path)
    assert built.moved is not None
    assert built.moved.kernels <= 270
    assert built.moved.constant_bytes <= 13.5e6
    assert built.moved.activation_bytes <= 54e6
    convolutions = [row for row in built.layers if row.type == "correlation"]
    assert convolutions and {row.output for row in convolutions} == {"FP16"}
    # Nothing that is the same for every image is computed for every image.
    pooling = [node for row in built.layers for node in row.origin if node.startswith("pool/")]
    assert pooling and not any(node.startswith("pool/Unsqueeze") for node in pooling)
