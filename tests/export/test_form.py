"""A form for a runtime is the same function; what the plan quantizes keeps its module and name."""

from itertools import product

import onnx_ir as ir
import pytest
import torch
from quantized import SIZE, images, network, section

from care_compress.evaluate.agreement import HeldImages
from care_compress.export.form import Form, form_for, in_form
from care_compress.export.variants import Variants
from care_compress.model.care import build_model
from care_compress.model.rewrite import rewrite
from care_compress.quantize.ptq import planned
from care_compress.recipe.sections import DataSection, ExportSection
from care_compress.recipe.target import load_target

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


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_keeps_biases_and_scales_that_training_left(form: Form) -> None:
    """A network fresh from its initialisation has no bias that could go astray."""
    model = network().double()
    with torch.no_grad():
        expected, found = model(images(2).double()), in_form(model, form)(images(2).double())
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()


def test_what_is_quantized_keeps_its_form() -> None:
    openvino, onnxruntime_cpu = (load_target(f"{name}-cpu") for name in ("openvino", "onnxruntime"))
    assert form_for(openvino, None) == Form(windows=True, tokens=True)
    assert form_for(load_target("tensorrt-rtx"), None) == Form(windows=True, tokens=True)
    assert form_for(load_target("openvino-gpu"), None) == Form()
    everything = planned(network(), section({"role": "attention.*", "weight": 8, "input": 8}), SIZE)
    assert form_for(onnxruntime_cpu, everything[1]) == Form()
    floating = section({"role": "depthwise", "weight": "float", "input": "float"})
    _, plan = planned(network(), floating, SIZE)
    assert form_for(onnxruntime_cpu, plan) == Form(windows=True, tokens=True)
    # Weights alone are quantized too: they are stored as integers.
    _, plan = planned(network(), section({"role": "depthwise", "input": "float"}), SIZE)
    assert form_for(openvino, plan) == Form(windows=False, tokens=True)


def test_a_float16_graph_has_the_form_and_float32_where_it_is_needed() -> None:
    """A Split that the exporter makes of the core belongs to the core: float16 overflows there."""
    model = build_model("care_nano", 5).eval()
    variants = Variants(
        model, rewrite(model), None, held, DataSection(resolution=SIZE), ExportSection()
    )
    nodes = list(variants.baseline.graph.graph)
    assert not any(node.name.endswith("dwconv1") for node in nodes if node.name)
    core = [node for node in nodes if node.name and ".tokens_first/Split" in node.name]
    assert core
    assert all(value.dtype == ir.DataType.FLOAT for node in core for value in node.outputs)


def held() -> HeldImages:
    """Two images, with labels."""
    pixels = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    return HeldImages(pixels, torch.zeros(2, dtype=torch.long), DataSection(resolution=SIZE))
