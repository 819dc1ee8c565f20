"""What a runtime executes, counted by hand: multiplications, shares, sizes that are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graphs import onnx_file

from care_compress.runtime import dot_products
from care_compress.runtime.layer_times import FLOAT, GROUPS, INTEGER, OTHER, LayerTime, Profile
from care_compress.runtime.layer_times import modules_of as of
from care_compress.runtime.probe import MOST_BATCH, MOST_SIDE, check_shape
from care_compress.runtime.profile_onnxruntime import _layers as onnx_layers
from care_compress.runtime.profile_openvino import executed_layers, integer_macs, quantized_macs
from care_compress.runtime.runners import batched_onnx

openvino = pytest.importorskip("openvino", reason="needs the openvino extra")


def quantized(ops: Any, value: Any, low: float = 0.0, high: float = 2.55) -> Any:
    ends = (np.float32(low), np.float32(high))
    return ops.fake_quantize(value, *ends, *ends, 256)


def network(folder: Path, integers: bool) -> Path:
    """A 3x3 convolution of 4 to 8 channels over 6x10 pixels, one in 2 groups, and a matrix."""
    ops: Any = openvino.opset13
    draw = np.random.default_rng(0)
    image = ops.parameter([-1, 4, 6, 10], np.float32)
    stored = ops.constant(draw.integers(-63, 64, (8, 4, 3, 3)).astype(np.int8))
    kernel = ops.multiply(ops.convert(stored, "f32"), np.full((8, 1, 1, 1), 0.01, np.float32))
    data = quantized(ops, image) if integers else image
    wide = ops.convolution(data, kernel, [1, 1], [1, 1], [1, 1], [1, 1])
    groups = ops.constant(draw.normal(size=(2, 4, 4, 3, 3)).astype(np.float32))
    deep = ops.group_convolution(wide, groups, [2, 2], [1, 1], [1, 1], [1, 1])
    flat = ops.reshape(deep, np.array([0, -1], np.int64), True)
    head = ops.constant(draw.normal(size=(8 * 3 * 5, 7)).astype(np.float32))
    model = openvino.Model([ops.matmul(flat, head, False, False)], [image])
    path = folder / "model.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


WIDE, GROUPED, HEAD = 8 * 6 * 10 * 4 * 9, 8 * 3 * 5 * 4 * 9, 8 * 3 * 5 * 7


def test_multiplications_are_those_of_one_image(tmp_path: Path) -> None:
    path = network(tmp_path, True)
    assert quantized_macs(path) == WIDE, "the groups and the matrix are of floats"
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    layers = executed_layers(openvino.Core().compile_model(str(path), "CPU", settings))
    assert sorted(layer.macs for layer in layers) == sorted([WIDE, GROUPED, HEAD])
    assert integer_macs(layers) in (WIDE, 0), "some processors have no kernel for it"


def test_stored_integers_alone_make_no_integer_product(tmp_path: Path) -> None:
    path = network(tmp_path, False)
    assert quantized_macs(path) == 0
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    layers = executed_layers(openvino.Core().compile_model(str(path), "CPU", settings))
    assert integer_macs(layers) == 0


def layer(group: str, ms: float | None) -> LayerTime:
    return LayerTime("a", "b", (), "f32", group, ms)


def test_shares_of_the_kinds_are_of_all_layers() -> None:
    profile = Profile((layer(INTEGER, 1.0), layer(FLOAT, 2.0), layer(INTEGER, 5.0)), 9.0)
    found = profile.by_kind()
    assert found[INTEGER] == {"layers": 2, "ms": 6.0, "share": 0.75}
    assert found[FLOAT]["share"] == 0.25 and found[OTHER] == {"layers": 0, "ms": 0.0, "share": 0.0}
    assert list(found) == list(GROUPS)
    told = profile.as_json()
    assert told["layers_ms"] == 8.0 and told["profiled_ms"] == 9.0
    assert [one["share"] for one in told["layers"]] == [0.125, 0.25, 0.625]
    untimed = Profile((layer(FLOAT, None),), None)
    assert not untimed.is_timed and untimed.by_kind()[FLOAT]["share"] is None


def test_a_module_is_named_once_for_all_its_operations() -> None:
    assert of(["stem.0", "stem.0/Gelu", "", "stem.1/q", "/layer/Conv"]) == (
        *("stem.0", "stem.1"),
        "/layer/Conv",
    )


def event(name: str, kind: str, index: int, microseconds: float, type_: str) -> dict[str, Any]:
    about = {"node_index": index, "op_name": kind, "input_type_shape": [{type_: [1, 3]}]}
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": microseconds, "args": about}


def test_a_layers_time_is_the_middle_of_its_runs_without_the_first_three() -> None:
    """Of six runs the profiler saw, three warmed up; its times are in microseconds."""
    events = [
        event(*node, microseconds, kind)
        for microseconds in (900.0, 800.0, 700.0, 10.0, 30.0, 20.0)
        for node, kind in (
            (("stem.0", "Conv", 0), "float"),
            (("fc_token_3", "QLinearMatMul", 1), "uint8"),
            (("last", "Gather", 2), "float"),
        )
    ]
    found = onnx_layers([{"cat": "Session", "name": "model_run", "dur": 1}, *events], {})
    assert [one.ms for one in found] == pytest.approx([0.02] * 3)
    assert [(one.name, one.group, one.precision) for one in found] == [
        ("stem.0", FLOAT, "f32"),
        ("fc", INTEGER, "u8"),
        ("last", OTHER, "f32"),
    ]


def test_a_file_is_timed_at_the_batch_that_was_asked_for(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(batched_onnx(onnx_file(tmp_path / "m.onnx"), 5))
    (image,), (logits,) = model.graph.input, model.graph.output
    for value, rest in ((image, [3, 32, 32]), (logits, [4])):
        assert [one.dim_value for one in value.type.tensor_type.shape.dim] == [5, *rest]


@pytest.mark.parametrize(
    ("shape", "fine"),
    [
        ((1, 3, 1, 1), True),
        ((MOST_BATCH, 3, MOST_SIDE, MOST_SIDE), True),
        ((MOST_BATCH + 1, 3, 8, 8), False),
        ((1, 3, MOST_SIDE + 1, 8), False),
        ((1, 3, 8, MOST_SIDE + 1), False),
        ((1, 4, 8, 8), False),
        ((0, 3, 8, 8), False),
        ((1, 3, 0, 8), False),
    ],
)
def test_only_batches_of_images_are_run(shape: tuple[int, ...], fine: bool) -> None:
    if fine:
        check_shape(shape)
    else:
        with pytest.raises(ValueError, match="no batch of images"):
            check_shape(shape)


class Products:
    """ONNX Runtime on a processor that adds products exactly, or in 16 bits that saturate."""

    saturates = False

    def __init__(self, content: bytes, providers: object) -> None:
        (weight,) = onnx.load_model_from_string(content).graph.initializer
        self.weight = onnx.numpy_helper.to_array(weight).astype(int)

    def run(self, outputs: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        products = feed["input"].astype(int)[:, :, None] * self.weight
        pairs = products[:, ::2] + products[:, 1::2]
        return [(pairs.clip(-32768, 32767) if self.saturates else pairs).sum(axis=1)]


@pytest.mark.parametrize("saturates", [False, True])
def test_the_largest_products_tell_whether_a_processor_saturates(
    saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Products, "saturates", saturates)
    monkeypatch.setattr(dot_products.onnxruntime, "InferenceSession", Products)
    assert dot_products.onnxruntime_is_exact.__wrapped__() is not saturates
