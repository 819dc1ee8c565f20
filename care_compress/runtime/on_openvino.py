"""Predictions by an OpenVINO model."""

import functools
from pathlib import Path
from typing import Any

from torch import Tensor

from care_compress.errors import TargetError
from care_compress.libraries import load_openvino, openvino_core
from care_compress.model.predictor import (
    NOT_CLASSES,
    RANKS,
    TASK,
    answers,
    as_answers,
    failed,
    in_slices,
)
from care_compress.recipe.target import NEEDS
from care_compress.runtime.dot_products import check_needs
from care_compress.runtime.feed import PREPROCESSING, Feed, feed_for


def read_to_run(path: Path, device: str = "CPU") -> Any:
    """An IR file's model; TargetError if its answers would be wrong on this processor."""
    model = openvino_core().read_model(path)
    key = NEEDS.split(".")
    if device == "CPU" and model.has_rt_info(key):
        check_needs(path, model.get_rt_info(key).astype(str), "openvino")
    return model


def openvino_feed(model: Any, path: Path) -> Feed:
    """How the images of a model that was read are given to it."""
    image, key = model.inputs[0], PREPROCESSING.split(".")
    said = model.get_rt_info(key).astype(str) if model.has_rt_info(key) else None
    sizes = list(image.partial_shape) if _rank(image) is not None else []
    shape = [None if size.is_dynamic else int(size.get_length()) for size in sizes]
    return feed_for(path, image.get_element_type().to_string() == "u8", shape, said)


class OpenVinoPredictor:
    """Runs an IR file with one image input and one output, on the CPU unless told.

    What the file leaves in float is computed in float32 unless `precision` says otherwise: where
    a CPU has bfloat16, OpenVINO would round to that on its own, and accuracy would measure both.
    """

    def __init__(
        self,
        model: Path,
        threads: int | None = None,
        precision: str = "f32",
        device: str = "CPU",
    ) -> None:
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        try:
            network = read_to_run(model, device)
            self.compiled = openvino_core().compile_model(network, device, settings)
        except RuntimeError as error:  # OpenVINO raises nothing else
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
            raise TargetError(
                f"{model} is no model that OpenVINO can run: {reason.strip()[:200]}.",
                "make it again; the .bin file beside the .xml belongs to it",
            ) from error
        inputs, outputs = self.compiled.inputs, self.compiled.outputs
        single = len(inputs) == 1 and len(outputs) == 1
        key = TASK.split(".")
        said = network.get_rt_info(key).astype(str) if network.has_rt_info(key) else None
        self.task = answers(said)
        self.rank = RANKS[self.task]
        if not single or _rank(inputs[0]) != 4 or _rank(outputs[0]) != self.rank:
            told = ", ".join(str(one.partial_shape) for one in (*inputs, *outputs)[:4])
            raise TargetError(
                f"{model} has {len(inputs)} inputs and {len(outputs)} outputs ({told}).",
                "give a classifier with one (B, 3, H, W) input and one (B, K) output of logits",
            )
        classes = outputs[0].partial_shape[1]
        if classes.is_dynamic:
            raise TargetError(f"{model} does not state its number of classes.", "make it again")
        self.path = model
        self.feed = openvino_feed(network, model)
        self.shape = self.feed.as_images(list(inputs[0].partial_shape))
        self.rows = int(classes.get_length())
        self.num_classes = self.rows - NOT_CLASSES.get(self.task, 0)

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        """Answers (B, ...); a model of fixed batch size is fed slice by slice."""
        shaped = load_openvino().PartialShape
        if not shaped([-1, *self.shape[1:]]).compatible(shaped(list(images_BCHW.shape))):
            raise TargetError(
                f"{self.path} wants {shaped(self.shape)} images, these are "
                f"{list(images_BCHW.shape)}.",
                "set data.resolution to the model's",
            )

        def run(part_BCHW: Tensor) -> Tensor:
            try:
                (logits,) = self.compiled([self.feed(part_BCHW)]).values()
            except RuntimeError as error:
                raise failed(self.path, error) from error
            # OpenVINO uses its memory again for the next batch.
            return as_answers(logits.copy(), part_BCHW, self.rows, self.rank, self.path)

        fixed = None if self.shape[0].is_dynamic else int(self.shape[0].get_length())
        return in_slices(run, images_BCHW, fixed)


def _rank(port: Any) -> int | None:
    """How many dimensions, where the file says."""
    rank = port.partial_shape.rank
    return None if rank.is_dynamic else int(rank.get_length())


@functools.cache
def openvino_devices() -> frozenset[str]:
    """What OpenVINO sees here: CPU, GPU, NPU."""
    return frozenset(name.partition(".")[0] for name in openvino_core().available_devices)


def unasked_precision() -> str:
    """What OpenVINO rounds the floats of a file to on this CPU unless it is told."""
    return "bf16" if has_bfloat16() else "f32"


@functools.cache
def has_bfloat16() -> bool:
    """Whether this CPU computes in bfloat16, which OpenVINO then does unasked."""
    core = openvino_core()
    return "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
