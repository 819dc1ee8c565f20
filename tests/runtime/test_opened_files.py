"""Files as they are opened: their size, batch, threads and precision, in both runtimes."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from care_compress.errors import TargetError
from care_compress.libraries import openvino_core
from care_compress.model.predictor import TASK
from care_compress.runtime.artifact import input_size, open_predictor
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.runtime.on_openvino import OpenVinoPredictor, has_bfloat16

openvino = pytest.importorskip("openvino", reason="needs the openvino extra")
CPU = torch.device("cpu")
MEANS = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[BATCH, 3, HIGH, WIDE] image) => (float[BATCH, 3] logits) {
  means = GlobalAveragePool(image)
  logits = Flatten(means)
}
"""
PLACES = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[1, 7, 4, 6] image) => (float[1, 7, 24] output) <int64[3] shape = {1, 7, 24}> {
  output = Reshape(image, shape)
}
"""


def both(folder: Path, text: str, task: str | None = None) -> tuple[Path, Path]:
    """The same graph as an ONNX file and as OpenVINO's."""
    paths = folder / "model.onnx", folder / "model.xml"
    onnx.save(onnx.parser.parse_model(text), paths[0])
    model: Any = openvino_core().read_model(paths[0])
    if task is not None:
        model.set_rt_info(task, TASK.split("."))
    openvino.save_model(model, paths[1], compress_to_fp16=False)
    return paths


def means(folder: Path, batch: object = 2, high: object = 4, wide: object = 6) -> tuple[Path, Path]:
    sizes = (("BATCH", batch), ("HIGH", high), ("WIDE", wide))
    text = MEANS
    for name, size in sizes:
        text = text.replace(name, str(size))
    return both(folder, text)


def test_a_picture_may_be_wider_than_it_is_high(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 4, 6)
    for path in means(tmp_path):
        assert input_size(path, None) == (4, 6)
        predict = open_predictor(str(path), CPU)
        torch.testing.assert_close(predict(images), images.mean((2, 3)))
        with pytest.raises(TargetError, match="wants"):
            predict(images.transpose(2, 3))


def test_one_side_may_be_free(tmp_path: Path) -> None:
    for path in means(tmp_path, wide="free"):
        assert input_size(path, 4) == (4, 4)
        with pytest.raises(TargetError, match="images of any size"):
            input_size(path, None)


def test_a_fixed_batch_answers_every_image(tmp_path: Path) -> None:
    """Slice by slice; the last one is filled up, and what fills it answers nothing."""
    images = torch.randn(5, 3, 4, 6)
    for kind, path in zip((OnnxPredictor, OpenVinoPredictor), means(tmp_path), strict=True):
        torch.testing.assert_close(kind(path)(images), images.mean((2, 3)))


def test_the_sides_of_a_box_are_no_classes(tmp_path: Path) -> None:
    _, path = both(tmp_path, PLACES, "detection")
    predict = OpenVinoPredictor(path)
    assert (predict.task, predict.num_classes) == ("detection", 3)
    images = torch.randn(1, 7, 4, 6)
    assert torch.equal(predict(images), images.flatten(2))


def test_files_are_opened_with_the_threads_and_the_precision_that_are_asked_for(
    tmp_path: Path,
) -> None:
    as_onnx, as_ir = means(tmp_path)
    for threads in (1, 2):
        session: Any = open_predictor(str(as_onnx), CPU, threads)
        assert session.session.get_session_options().intra_op_num_threads == threads
        predict: Any = open_predictor(str(as_ir), CPU, threads)
        assert predict.compiled.get_property("INFERENCE_NUM_THREADS") == threads
    for precision in ("f32", "bf16") if has_bfloat16() else ("f32",):
        predict = open_predictor(str(as_ir), CPU, 1, precision)
        found = predict.compiled.get_property("INFERENCE_PRECISION_HINT")
        assert found.to_string() == precision
