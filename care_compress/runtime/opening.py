"""From a file on disk to a predictor, by its suffix."""

import os
from pathlib import Path

import torch

from care_compress.errors import TargetError
from care_compress.model.checkpoint import load_checkpoint, resolve_checkpoint
from care_compress.model.rewrite import rewrite
from care_compress.predictor import Predictor
from care_compress.quantize.artifact import load_quantized, quantized_header
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.runtime.on_openvino import OpenVinoPredictor
from care_compress.runtime.on_tensorrt import EnginePredictor
from care_compress.runtime.on_torch import TorchPredictor

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors")


def artifact_path(artifact: str) -> Path:
    """The file behind an artifact's name, if it is there and of a kind that can be run."""
    path = resolve_checkpoint(artifact)
    if path.suffix not in (*CHECKPOINT_SUFFIXES, ".onnx", ".xml", ".engine"):
        raise TargetError(
            f"{artifact} is of no kind that can be run.",
            f"give a checkpoint ({', '.join(CHECKPOINT_SUFFIXES)}), builtin:NAME, an .onnx, an "
            ".xml or an .engine file",
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
    model = load_checkpoint(path)
    return TorchPredictor(rewrite(model), model.num_classes, device)
