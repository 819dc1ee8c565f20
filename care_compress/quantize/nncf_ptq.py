"""Post-training quantization by NNCF: from the rewritten float model to an OpenVINO model.

NNCF decides what is quantized; settings of the recipe's ``quantize.nncf`` section go to it as they
are. Its result is a file of integers and scales that OpenVINO runs, no simulation.
"""

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from care_compress.data.loader import Batch
from care_compress.data.transforms import normalize
from care_compress.errors import RunError
from care_compress.files import atomic_file, temporary_folder
from care_compress.libraries import (
    load_nncf,
    load_openvino,
    openvino_core,
    signal_stack_kept,
    silent,
)
from care_compress.model.care import Care
from care_compress.model.compact import CompactCare
from care_compress.model.predictor import TASK
from care_compress.quantize.calibrate import Batches
from care_compress.quantize.equalize import norms_to_affine
from care_compress.recipe.quantize import NncfSection
from care_compress.recipe.sections import DataSection
from care_compress.recipe.target import DOT_PRODUCTS, NEEDS
from care_compress.tasks.task import Score, Task, value_of

# Bounds of the search for layers to keep in float; beyond them a model is not worth quantizing.
CONTROL_IMAGES = 1000
MOST_LAYERS = 20
RANKING_BATCHES = 2  # that tell which layer hurts most


@dataclass(frozen=True)
class Calibration:
    """Calibration batches as NNCF counts them: ranges are taken over whole batches.

    So each statistic sees the extremes of many images. Told the batch size, NNCF would average
    ranges over single images, which clips: 18.8 instead of 30.3 dB on care_nano.
    """

    batches: Batches
    count: int

    def __iter__(self) -> Iterator[Tensor]:
        """A new pass, on the CPU."""
        for images in self.batches():
            yield images.cpu()


@dataclass(frozen=True)
class AccuracyControl:
    """What the search for layers to keep in float is judged on."""

    task: Task
    max_drop: float  # points of its metric
    items: list[Batch]  # of pixels
    data: DataSection

    def validate(
        self, compiled: Any, items: Iterable[Batch]
    ) -> tuple[float, list[list[NDArray[np.float32]]]]:
        """The task's metric in percent and, for NNCF to rank layers by, the answers to every batch.

        The task counts an answer that is no number as wrong.
        """
        scores, outputs = list[Score](), []
        for batch in items:
            (answer,) = compiled(self.prepare(batch)).values()
            outputs.append([answer.copy()])
            scores.append(self.task.count(torch.from_numpy(outputs[-1][0]), batch))
        first, *others = scores
        return value_of(sum(others, first), self.task.metric), outputs

    def prepare(self, batch: Batch) -> NDArray[np.float32]:
        """Pixels as the network takes them."""
        prepared: NDArray[np.float32] = normalize(
            batch.images, self.data.mean, self.data.std
        ).numpy()
        return np.ascontiguousarray(prepared)


def quantize_openvino(
    network: CompactCare,
    section: NncfSection,
    full_range: bool,
    resolution: int,
    calibration: Calibration,
    control: AccuracyControl | None,
    path: Path,
) -> None:
    """Quantize a float network on calibration images and write it to `path` (and a ``.bin``)."""
    nncf = load_nncf()
    model = to_openvino(prepared(network), resolution)
    dataset = nncf.Dataset(calibration, Tensor.numpy)
    settings = nncf_settings(section, full_range, section.ignored_types)
    settings["fast_bias_correction"] = section.fast_bias_correction
    settings["subset_size"] = calibration.count
    with silent(), signal_stack_kept():
        if control is None:
            quantized = nncf.quantize(model, dataset, **settings)
        else:
            # Quantize, then return the layers that hurt most to float until the drop is small.
            advanced = settings.pop("advanced_parameters")
            quantized = nncf.quantize_with_accuracy_control(
                model,
                dataset,
                nncf.Dataset(control.items, control.prepare),
                control.validate,
                max_drop=control.max_drop,
                drop_type=nncf.DropType.ABSOLUTE,
                advanced_quantization_parameters=advanced,
                advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                    max_num_iterations=MOST_LAYERS,
                    ranking_subset_size=RANKING_BATCHES,
                    num_ranking_workers=1,  # several would each use every core
                ),
                **settings,
            )
    mark(quantized, network.task, full_range)
    save_openvino(quantized, path)


def mark(model: Any, task: str, full_range: bool) -> None:
    """Note in an OpenVINO model what it answers, unless it is a classifier, which says nothing.

    And that its weights are right only where there are dot products.
    """
    if task != Care.task:
        model.set_rt_info(task, TASK.split("."))
    if full_range:
        model.set_rt_info(DOT_PRODUCTS, NEEDS.split("."))


def prepared(network: CompactCare) -> CompactCare:
    """A copy on the CPU without BatchNorms: training would go on moving their statistics."""
    # In one layout, whoever ran it before: another one's sums round otherwise.
    layout = torch.contiguous_format
    network = copy.deepcopy(network).cpu().to(memory_format=layout)  # type: ignore[call-overload]
    norms_to_affine(network)
    return network


def nncf_settings(section: NncfSection, full_range: bool, ignored: Iterable[str]) -> dict[str, Any]:
    """The keyword arguments that `nncf.quantize` takes for any kind of model.

    Unasked, NNCF keeps the weights of the first layer alone in half of their range; all the others
    overflow on processors without dot products just as well.
    """
    nncf = load_nncf()
    alpha = section.smooth_quant_alpha
    smooth = {} if alpha is None else {"convolution": alpha, "matmul": alpha}
    types = list(ignored)
    return {
        "preset": nncf.QuantizationPreset(section.preset),
        "model_type": section.model_type and nncf.ModelType(section.model_type),
        "ignored_scope": nncf.IgnoredScope(types=types, validate=False) if types else None,
        "advanced_parameters": nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.DISABLE if full_range else nncf.OverflowFix.ENABLE,
            smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(**smooth),
        ),
    }


def to_openvino(model: nn.Module, resolution: int) -> Any:
    """A float or simulated model as an OpenVINO one, for any batch size."""
    openvino = load_openvino()
    example = torch.zeros(2, 3, resolution, resolution)
    batch = torch.export.Dim("batch", min=1)
    with silent(), torch.no_grad():
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        converted = openvino.convert_model(program)
    # The exporter's sizes are lost on the way; with them a wrong image is refused before it runs.
    converted.reshape([-1, 3, resolution, resolution])
    converted.set_friendly_name("care")  # otherwise numbered through the process
    converted.inputs[0].get_tensor().set_names({"images"})
    converted.outputs[0].get_tensor().set_names({"logits"})
    return converted


def save_openvino(model: Any, path: Path, half: bool = False) -> None:
    """Write ``path`` and the weights beside it, each whole or not at all, the weights first.

    OpenVINO's default would round what stayed in float to float16; here only `half` does.
    """
    openvino = load_openvino()
    with temporary_folder(path) as folder:
        made = folder / path.name
        try:
            openvino.save_model(model, made, compress_to_fp16=half)
            # It does not notice a full disk; what it can read back is whole.
            openvino_core().read_model(made)
        except RuntimeError as error:
            raise RunError(
                f"cannot write {path}: OpenVINO could not save all of it.", "make room there"
            ) from error
        for suffix in (".bin", ".xml"):
            with atomic_file(path.with_suffix(suffix)) as temporary:
                made.with_suffix(suffix).replace(temporary)
