"""A comparison of two segmentation networks, from counts of pixels that can be followed by hand."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from care_compress.evaluate.comparison import CompareOptions, Comparison, Entry
from care_compress.evaluate.resolve import NamedModel
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import DataSection
from care_compress.tasks.dense import DenseAnswers, Records
from care_compress.tasks.distance import Distance
from care_compress.tasks.known import task_called
from care_compress.tasks.segmentation import MaskRecord
from care_compress.tasks.task import Collected

TARGET = "onnxruntime-cpu"
CLASSES = ("background", "road", "car")
PIXELS = 1000  # of each of the first two classes, in every image; no image shows a car


def answers(wrong: Sequence[int], same: Sequence[int]) -> DenseAnswers:
    """Pixels of road that were taken for background, and places of 100 as the baseline's."""
    records = [
        MaskRecord(
            right_K=np.array([PIXELS, PIXELS - one, 0]),
            found_K=np.array([PIXELS + one, PIXELS - one, 0]),
            labelled_K=np.array([PIXELS, PIXELS, 0]),
            broken=False,
        )
        for one in wrong
    ]
    agreed = [(places, 100) for places in same]
    task: Any = task_called("segmentation")
    return DenseAnswers(Records(task, records), agreed, Distance(100.0, 1.0))


def compared(folder: Path, wrong: Sequence[int], same: Sequence[int], **more: Any) -> Comparison:
    """A float network that is right everywhere beside one that is not."""
    models = []
    recipe = load_recipe("seg_int8_ptq", ["model.checkpoint=none.safetensors"])
    for name in ("float", "mine"):
        path = folder / name / f"{name}.onnx"
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(1000))
        models.append(NamedModel(name, {TARGET: path}, path.parent, recipe))
    samples: Any = SimpleNamespace(
        classes=CLASSES,
        fingerprint=lambda: "images",
        name=lambda index: f"val/{index}.png",
        image=lambda index: Image.new("RGB", (64, 32), (index, 90, 90)),
    )
    sound = answers([0] * len(wrong), [100] * len(wrong))
    found = {f"{TARGET}/float": sound, f"{TARGET}/mine": answers(wrong, same)}
    return Comparison(
        task_called("segmentation"),
        DataSection(source="builtin:scenes", resolution=64),
        samples,
        CompareOptions(**more),
        models,
        [Entry(TARGET, one.name, one.files[TARGET], "f32") for one in models],
        {},
        Collected(np.zeros(len(wrong)), np.arange(len(wrong)) * 10, found),
    )
