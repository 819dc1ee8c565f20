"""The image size that a file was made for, read without running it."""

from pathlib import Path

import onnx

from care_compress.errors import TargetError
from care_compress.quantize.openvino_library import openvino_core
from care_compress.runtime.on_tensorrt import EnginePredictor
from care_compress.runtime.probe import MOST_SIDE

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
    if path.suffix == ".onnx":
        return _of_onnx(path)
    if path.suffix == ".xml":
        return _of_openvino(path)
    if path.suffix == ".engine":
        height, width = EnginePredictor(path).session.shape[2:]
        return height, width
    return None


def _of_onnx(path: Path) -> Size | None:
    try:
        (image, *_) = onnx.load(path, load_external_data=False).graph.input
    except Exception as error:  # a parser's own class, or a graph without an input
        raise TargetError(f"{path} is no ONNX model: {error}.", "export it again") from error
    sides = [side.dim_value for side in image.type.tensor_type.shape.dim[2:]]
    return (sides[0], sides[1]) if len(sides) == 2 and all(sides) else None


def _of_openvino(path: Path) -> Size | None:
    try:
        (image,) = openvino_core().read_model(path).inputs
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise TargetError(
            f"{path} is no OpenVINO model with one input: {reason}.", "make it again"
        ) from error
    sides = list(image.partial_shape)[2:]
    if len(sides) != 2 or any(side.is_dynamic for side in sides):
        return None
    return int(sides[0].get_length()), int(sides[1].get_length())
