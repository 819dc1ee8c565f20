"""What sites compute, read from networks and files of a few operations, worked out by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from care_compress.evaluate.site_outputs import TURNED, run_graph, run_module, tap_file
from care_compress.quantize.fakequant import HalfRounding, IntQuantizer, TensorQuantizer
from care_compress.quantize.placement import QuantizedCare
from care_compress.quantize.spec import TensorSpec
from care_compress.runtime.feed import PREPROCESSING

STEP = 0.5
IMAGE = torch.arange(12.0).reshape(1, 3, 2, 2)


def rounding(operand: str) -> IntQuantizer:
    """To whole steps of a half."""
    made = IntQuantizer(TensorSpec(8), "fc", operand, scales=1)
    made.set_qparams(torch.tensor([STEP]), torch.zeros(1))
    return made


def quantized() -> QuantizedCare:
    """One product, fc, of a rounded input and a rounded weight; then another, last, in float16."""
    parts: dict[str, TensorQuantizer | nn.Parameter] = {
        "on_input": rounding("input"),
        "on_weight": rounding("weight"),
        "in_half": HalfRounding(TensorSpec("fp16"), "last", "left"),
        "weight": nn.Parameter(torch.tensor([[0.9, 0.0], [0.0, 2.1]])),
    }
    root = nn.Module()
    for name, part in parts.items():
        setattr(root, name, part)
    graph = Graph()
    x = graph.call_module("on_input", (graph.placeholder("x"),))
    weight = graph.call_module("on_weight", (graph.get_attr("weight"),))
    fc = graph.call_function(torch.ops.aten.linear.default, (x, weight))
    fc.meta["nn_module_stack"] = {"a": ("network", None), "b": ("network.fc", None)}
    turned = graph.call_function(torch.ops.aten.neg.default, (fc,))
    turned.meta["nn_module_stack"] = {"a": ("network", None), "b": ("network.act", None)}
    half = graph.call_module("in_half", (turned,))
    last = graph.call_function(torch.ops.aten.add.Tensor, (half, fc))
    last.meta["nn_module_stack"] = {"a": ("network", None), "b": ("network.last", None)}
    graph.output((last, fc))
    made_from: Any = SimpleNamespace(task="classification", arch="tiny", num_classes=2, widths=None)
    plan: Any = SimpleNamespace(resolution=2)
    return QuantizedCare(GraphModule(root, graph), plan, made_from)


def pixels(*values: float) -> Tensor:
    """An image of the model's size, (1, 1, 2, 2), whose rows are the same."""
    return torch.tensor(values).expand(1, 1, 2, 2)


def test_products_of_a_quantized_model_are_kept_by_the_names_of_their_sites() -> None:
    model, x = quantized(), pixels(0.6, 1.2)
    # 0.6 and 1.2 become 0.5 and 1.0, 0.9 and 2.1 become 1.0 and 2.0.
    for taken in (run_graph(model, x), run_module(model, x)):
        assert list(taken.sites) == ["fc", "last"], "a negation is no site"
        assert torch.equal(taken.sites["fc"], pixels(0.5, 2.0))
        assert torch.equal(taken.logits, pixels(0.0, 0.0))
    model.enable(False)
    torch.testing.assert_close(run_graph(model, x).sites["fc"], pixels(0.54, 2.52))


def test_a_watcher_sees_activations_before_and_after_their_rounding() -> None:
    seen, x = [], pixels(0.6, 1.2)
    run_graph(quantized(), x, lambda one, before, after: seen.append((one, before, after)))
    ((quantizer, before, after),) = seen  # weights are none, and 16-bit floats have no range
    assert (quantizer.site, quantizer.operand) == ("fc", "input")
    assert torch.equal(before, x) and torch.equal(after, pixels(0.5, 1.0))


class Doubled(nn.Module):
    """A float model of two layers, one of them inside another module."""

    def __init__(self) -> None:
        super().__init__()
        first = nn.Linear(2, 2, bias=False)
        first.weight.data.copy_(torch.tensor([[2.0, 0.0], [0.0, -2.0]]))
        self.inner = nn.Sequential(first)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > 1:
            raise ValueError("one at a time")
        out: Tensor = self.act(self.inner(x))
        return out + 1


def test_sites_of_a_float_model_are_its_innermost_modules() -> None:
    model = Doubled()
    taken = run_module(model, torch.ones(1, 2))
    assert taken.sites.keys() == {"inner.0", "act"}
    assert torch.equal(taken.sites["inner.0"], torch.tensor([[2.0, -2.0]]))
    assert torch.equal(taken.sites["act"], torch.tensor([[2.0, 0.0]]))
    assert torch.equal(taken.logits, torch.tensor([[3.0, 1.0]]))


@pytest.mark.parametrize("images", [1, 2], ids=["that runs", "that fails"])
def test_a_model_is_left_without_hooks(images: int) -> None:
    model = Doubled()
    try:
        run_module(model, torch.ones(images, 2))
    except ValueError:
        assert images == 2
    assert not any(module._forward_hooks for module in model.modules())


def onnx_of(
    path: Path, nodes: Sequence[onnx.NodeProto], batch: int | str, takes_bytes: bool
) -> Path:
    """A file with these nodes; its input is `images`, or bytes of them, its output `logits`."""
    kind, shape = (TensorProto.UINT8, [2, 2, 3]) if takes_bytes else (TensorProto.FLOAT, [3, 2, 2])
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("images", kind, [batch, *shape])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
        [
            numpy_helper.from_array(torch.tensor(2.0).numpy(), "two"),
            numpy_helper.from_array(torch.tensor(1.0).numpy(), "one"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    said = json.dumps({"mean": [0.0] * 3, "std": [1.0] * 3})
    model.metadata_props.add(key=PREPROCESSING, value=said)
    onnx.save(model, path)
    return path


def steps(first: str) -> list[onnx.NodeProto]:
    """Times two and plus one; the addition is what the file answers."""
    return [
        helper.make_node("Mul", [first, "two"], ["t0"], "double"),
        helper.make_node("Add", ["t0", "one"], ["logits"], "plus"),
    ]


@pytest.mark.parametrize("batch", ["batch", 1, 3])
def test_an_onnx_file_shows_the_sites_it_has_for_one_image(
    batch: int | str, tmp_path: Path
) -> None:
    tap = tap_file(onnx_of(tmp_path / "m.onnx", steps("images"), batch, False), ["plus", "double"])
    for image in (IMAGE, IMAGE + 100):  # the second does not show the first again
        found = tap(image)
        assert found.keys() == {"double", "plus"}
        assert torch.equal(found["double"], 2 * image)
        assert torch.equal(found["plus"], 2 * image + 1)
    other = tap_file(tmp_path / "m.onnx", ["double", "absent"])(IMAGE)
    assert other.keys() == {"double"}, "only what is asked for and there"


def test_a_site_that_was_turned_is_shown_channels_first(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["images"], ["t9"], "a/Transpose", perm=[0, 2, 3, 1]),
        helper.make_node("Mul", ["t9", "two"], ["t0"], f"double{TURNED}"),
        helper.make_node("Transpose", ["t0"], ["t1"], "b/Transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Add", ["t1", "one"], ["logits"], "plus"),
    ]
    path = onnx_of(tmp_path / "m.onnx", nodes, 1, False)
    found = tap_file(path, {"double", "plus"})(IMAGE)
    assert found.keys() == {"double", "plus"}
    assert torch.equal(found["double"], 2 * IMAGE)
    assert torch.equal(found["plus"], 2 * IMAGE + 1)


def test_a_file_that_takes_bytes_is_given_bytes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["images"], ["t8"], "a/Transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Cast", ["t8"], ["t9"], "a/Cast", to=TensorProto.FLOAT),
        *steps("t9"),
    ]
    path = onnx_of(tmp_path / "m.onnx", nodes, 1, True)
    assert torch.equal(tap_file(path, {"double"})(IMAGE / 255)["double"], 2 * IMAGE)


@pytest.mark.parametrize("batch", [-1, 1, 3])
def test_an_ir_shows_the_sites_it_has_for_one_image(batch: int, tmp_path: Path) -> None:
    openvino = pytest.importorskip("openvino", reason="needs the openvino extra")
    from openvino import opset13 as op

    images = op.parameter([batch, 3, 2, 2], np.float32, name="images")
    double = op.multiply(images, op.constant([2.0], np.float32))
    halved = op.multiply(double, op.constant([0.25], np.float32))
    plus = op.add(halved, op.constant([1.0], np.float32))
    for node, name in ((double, "double"), (halved, "halved"), (plus, "plus")):
        node.set_friendly_name(name)
    path = tmp_path / "m.xml"
    openvino.save_model(openvino.Model([plus], [images], "m"), path, compress_to_fp16=False)
    wanted = {"double": 2 * IMAGE, "halved": IMAGE / 2, "plus": IMAGE / 2 + 1}
    # With what the file answers anyway among them, and without.
    for names in (["double", "halved"], ["plus", "halved", "double"], ["plus"]):
        found = tap_file(path, [*names, "absent"])(IMAGE)
        assert found.keys() == set(names)
        for name in names:
            torch.testing.assert_close(found[name], wanted[name])
    assert tap_file(path, ["absent"])(IMAGE) == {}, "a file of other names"
    tap = tap_file(path, ["double"])
    first = tap(IMAGE)["double"]
    tap(IMAGE + 100)
    assert torch.equal(first, wanted["double"]), "kept while the next image runs"
