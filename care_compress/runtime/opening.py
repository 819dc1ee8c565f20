"""From a file on disk to a predictor, by its suffix."""

import torch

from care_compress.errors import TargetError
from care_compress.model.checkpoint import load_checkpoint, resolve_checkpoint
from care_compress.model.rewrite import rewrite
from care_compress.predictor import Predictor
from care_compress.runtime.on_onnxruntime import OnnxPredictor
from care_compress.runtime.on_torch import TorchPredictor

CHECKPOINT_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors")


def open_predictor(artifact: str, device: torch.device) -> Predictor:
    """A float checkpoint (any form `load_checkpoint` reads) or an ``.onnx`` file, ready to run."""
    path = resolve_checkpoint(artifact)
    if path.suffix == ".onnx":
        return OnnxPredictor(path)
    if path.suffix in CHECKPOINT_SUFFIXES:
        model = load_checkpoint(path)
        return TorchPredictor(rewrite(model), model.num_classes, device)
    raise TargetError(
        f"{artifact} is of no kind that can be run.",
        f"give a checkpoint ({', '.join(CHECKPOINT_SUFFIXES)}), builtin:NAME or an .onnx file",
    )
