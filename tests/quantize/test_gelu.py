"""Every form of GELU is the same function to within a tenth of a step of 8 bits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from quantized import SIZE, network, section
from torch import Tensor, nn
from torch.nn import functional as F

from care_compress import machine
from care_compress.errors import RecipeError
from care_compress.export.gelu import write_gelu
from care_compress.export.stage import chosen_targets
from care_compress.export.to_onnx import float_graph
from care_compress.quantize.gelu import gelu_by_products, gelu_by_tanh, use_gelu
from care_compress.quantize.placement import simulate
from care_compress.quantize.ptq import planned
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.target import AS_SHIPPED, TARGETS_DIR, load_target, read_target

NEAR = 5e-4


class Activated(nn.Module):
    """GELU of an image, and of a vector, as in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, groups=3, bias=False)
        self.conv.weight.data.fill_(1.0)

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        pixels = F.gelu(self.conv(x_BCHW))
        return F.gelu(pixels.flatten(1) - 0.1)


def kinds_of(graph: ir.Model) -> list[str]:
    return [node.op_type for node in graph.graph]


def middle(graph: ir.Model) -> ir.Value:
    """What the head's part of the network reads."""
    (subtraction,) = (node for node in graph.graph if node.op_type == "Reshape")
    value = subtraction.inputs[0]
    assert value is not None
    return value


@pytest.mark.parametrize("form", ["erf", "products", "tanh"])
def test_a_form_is_gelu_everywhere(form: str) -> None:
    graph = float_graph(Activated(), 64)
    write_gelu(graph, form)
    assert kinds_of(graph).count("Gelu") == (1 if form == "products" else 2), "the vector's stays"
    graph.graph.outputs[0] = middle(graph)
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    x = torch.linspace(-12, 12, 3 * 64 * 64).reshape(1, 3, 64, 64)
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    wanted = F.gelu(x.double()).numpy()
    assert np.abs(found - wanted).max() < NEAR
    # Far out nothing is left of the difference, so large values stay as exact as they were.
    far = np.abs(x.numpy()) > 7
    assert np.abs(found - wanted)[far].max() < 1e-6


@pytest.mark.parametrize("form", [gelu_by_products, gelu_by_tanh])
def test_what_is_simulated_is_gelu_everywhere_too(form: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-12, 12, 10_001)
    assert (form(x) - F.gelu(x)).abs().max() < NEAR


def test_a_simulation_takes_the_form_of_the_target_for_images_and_not_in_the_head() -> None:
    """Of one vector a table costs nothing, so files keep the function itself there."""
    model = simulate(*planned(network(), section(), SIZE))
    use_gelu(model, "products")
    found = [node.target for node in model.graph.graph.nodes]
    assert found.count(torch.ops.aten.gelu.default) == 1, "the head's"
    assert found.count(gelu_by_products) > 1 and gelu_by_tanh not in found


def test_a_processor_without_dot_products_takes_the_placement_of_its_class() -> None:
    target = load_target("openvino-cpu")
    assert target.placement_for(True) == target.placement_for(None) == AS_SHIPPED
    assert target.placed(AS_SHIPPED).gelu == "erf"
    placed = target.placed(target.placement_for(False))
    assert (placed.placement, placed.gelu) == (target.without_dot_products, "products")
    assert placed.rules == target.placements[placed.placement].rules


def test_a_placement_that_says_nothing_of_gelu_keeps_the_targets() -> None:
    for name, form in (("openvino-cpu", "erf"), ("onnxruntime-cpu", "tanh")):
        target = load_target(name)
        for placement, chosen in target.placements.items():
            assert target.placed(placement).gelu == (chosen.gelu or form)
    assert load_target("onnxruntime-cpu").placement_for(False) == AS_SHIPPED


def test_a_hidden_instruction_set_counts_for_openvino_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    strong = machine.Cpu("one", 1, 1, {"avx2": True, "avx512_vnni": True})
    monkeypatch.setattr(machine, "_read_processor", lambda usable: strong)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    assert machine.dot_products_in("openvino") is True
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert machine.dot_products_in("openvino") is False
    assert machine.dot_products_in("onnxruntime") is True
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx512_core")
    assert machine.dot_products_in("openvino") is False, "in any letters"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_VNNI")
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    assert machine.dot_products_in("openvino") is True, "the first that is set is heeded"


@pytest.mark.parametrize("here", [True, False])
def test_files_are_laid_out_for_other_processors_on_request(
    here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "dot_products_in", lambda runtime: here)
    for asked in (None, True, False):
        recipe = load_recipe("int8_ptq", [], {"export.dot_products": asked})
        wanted = here if asked is None else asked
        for target in chosen_targets(recipe):
            assert target.placement == load_target(target.name).placement_for(wanted)


def test_a_class_whose_placement_is_missing_is_refused(tmp_path: Path) -> None:

    text = (TARGETS_DIR / "openvino-cpu.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("without_dot_products: ", "without_dot_products: nearly "))
    with pytest.raises(RecipeError, match="no placement 'nearly without dot products'"):
        read_target(path)
