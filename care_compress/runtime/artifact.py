"""From a file on disk to a predictor, by its suffix."""

import os
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from onnx import TensorProto

from care_compress.errors import TargetError
from care_compress.libraries import openvino_core
from care_compress.model.checkpoint import load_checkpoint, resolve_checkpoint
from care_compress.model.predictor import Predictor
from care_compress.model.rewrite import rewrite
from care_compress.quantize.artifact import load_quantized, quantized_header
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.runtime.on_openvino import OpenVinoPredictor
from care_compress.runtime.on_tensorrt import EnginePredictor
from care_compress.runtime.on_torch import TorchPredictor
from care_compress.runtime.probe import MOST_SIDE, probe

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors")
GRAPH_SUFFIXES = (".onnx", ".xml", ".engine")
HUB_PICKLE = "pytorch_model.bin"  # any other .bin is the second file of an OpenVINO model


def artifact_path(artifact: str) -> Path:
    """The file behind an artifact's name, if it is there and of a kind that can be run."""
    path = resolve_checkpoint(artifact)
    if path.suffix not in (*CHECKPOINT_SUFFIXES, *GRAPH_SUFFIXES) and path.name != HUB_PICKLE:
        raise TargetError(
            f"{artifact} is of no kind that can be run.",
            f"give a checkpoint ({', '.join(CHECKPOINT_SUFFIXES)}), builtin:NAME, "
            "hf-hub:owner/name, an .onnx, an .xml or an .engine file",
        )
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        raise TargetError(f"{path} is not a file.", "check the path")
    return path


def open_predictor(
    artifact: str,
    device: torch.device,
    threads: int | None = None,
    precision: str = "f32",
    plugin: str = "CPU",
) -> Predictor:
    """Anything this package writes or reads, ready to run.

    A float checkpoint in any form `load_checkpoint` reads, a quantized ``.safetensors`` (in
    simulation), an ``.onnx`` file, an OpenVINO ``.xml`` or a TensorRT ``.engine``. `threads` are
    those of ONNX Runtime and OpenVINO, all if left out; torch has its own setting. `precision` and
    `plugin` are OpenVINO's: what it may round floats to, and what it runs on.
    """
    path = artifact_path(artifact)
    if path.suffix == ".onnx":
        return OnnxPredictor(path, threads)
    if path.suffix == ".xml":
        return OpenVinoPredictor(path, threads, precision, plugin)
    if path.suffix == ".engine":
        return EnginePredictor(path)
    if path.suffix == ".safetensors" and quantized_header(path) is not None:
        quantized = load_quantized(path)
        return TorchPredictor(quantized, quantized.num_classes, device)
    model = load_checkpoint(artifact)
    return TorchPredictor(rewrite(model), model.num_classes, device)


def teacher_opener(resolution: int, device: torch.device) -> Callable[[str], Predictor]:
    """What opens the teacher of a training, should there be one to do."""

    def open_teacher(artifact: str) -> Predictor:
        probe(artifact_path(artifact), resolution)
        return open_predictor(artifact, device)

    return open_teacher


Size = tuple[int, int]


def input_size(path: Path, resolution: int | None) -> Size:
    """Height and width of a file's images; `resolution` where the file leaves them open."""
    own = _own_size(path)
    if own is not None and not all(1 <= side <= MOST_SIDE for side in own):
        raise TargetError(f"{path} wants {own[0]}x{own[1]} images.", "give a classifier of images")
    if own is None and resolution is None:
        raise TargetError(f"{path} takes images of any size.", "say which: --res 224")
    if own is None:
        assert resolution is not None
        return resolution, resolution
    if resolution is not None and own != (resolution, resolution):
        raise TargetError(
            f"{path} wants {own[0]}x{own[1]} images, not {resolution}x{resolution}.",
            "leave --res out",
        )
    return own


def _own_size(path: Path) -> Size | None:
    """Height and width that a file is bound to."""
    if path.suffix == ".engine":
        predict = EnginePredictor(path)
        _, _, height, width = predict.feed.as_images(predict.session.shape)
        return height, width
    if path.suffix == ".onnx":
        try:
            (image, *_) = onnx.load(path, load_external_data=False).graph.input
        except Exception as error:  # a parser's own class, or a graph without an input
            raise TargetError(f"{path} is no ONNX model: {error}.", "export it again") from error
        kind = image.type.tensor_type
        sides = [
            side.dim_value for side in kind.shape.dim[_sides(kind.elem_type == TensorProto.UINT8)]
        ]
        free = not all(sides)
    elif path.suffix == ".xml":
        try:
            (image,) = openvino_core().read_model(path).inputs
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise TargetError(
                f"{path} is no OpenVINO model with one input: {reason}.", "make it again"
            ) from error
        is_bytes = image.get_element_type().to_string() == "u8"
        shape = list(image.partial_shape)[_sides(is_bytes)]
        free = any(side.is_dynamic for side in shape)
        sides = [] if free else [int(side.get_length()) for side in shape]
    else:
        return None
    return None if free or len(sides) != 2 else (sides[0], sides[1])


def _sides(is_bytes: bool) -> slice:
    """Where height and width stand in the shape of an input."""
    return slice(1, 3) if is_bytes else slice(2, 4)
