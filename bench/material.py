"""What the speed bench measures: a checkpoint, images, and real runs of them.

Trained weights of the published sizes do not come with the product, and speed does not ask for
them. It does ask for 1,000 classes and for channels as uneven as trained ones: even weights would
give ranges that no trained network has. So the weights are random between BatchNorms that have
seen the images, and the images are those of builtin:shapes, as files of a 1,000-class folder.
Where a trained checkpoint is given, all is its own, and its answers count, too. Networks for masks
are made the same way, for the scenes that the product draws.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from care_compress.data.loader import BadImages, prepared_batches
from care_compress.data.shapes import Shapes
from care_compress.data.sources import open_samples
from care_compress.errors import RunError
from care_compress.files import digest_of, fingerprint, write_text
from care_compress.model.care import Care, build_model
from care_compress.model.checkpoint import load_checkpoint, save_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.quantize.selection import CalibrationSet, read_list
from care_compress.recipe.reading import read_yaml
from care_compress.recipe.recipe import Recipe, load_recipe, parse
from care_compress.recipe.sections import DataSection, Task
from care_compress.tasks.classification import Classification
from care_compress.tasks.known import task_called

CLASSES = 1000  # as the published heads have
IMAGES = {"train": 128, "val": 64}
CALIBRATION = 64  # images; ours and the peers' are the same ones
TRAINED_CALIBRATION = 256  # where the answers count
TARGETS = ("openvino-cpu", "onnxruntime-cpu")
# Enough where only speed is asked: it depends on the form of the graph, not on its scales.
FEW = ("evaluate.images=8", "export.images=8")
FEW_CALIBRATED = ("quantize.calibrate.images=8", *FEW)


@dataclass(frozen=True)
class Trained:
    """A trained checkpoint, and its images."""

    checkpoint: Path
    data: DataSection
    images: int  # validation images that files are scored on


@dataclass(frozen=True)
class Scale:
    """One network at one size of images; its weights are random unless it is `trained`."""

    arch: str  # or the name of the trained checkpoint
    resolution: int
    trained: Trained | None = None
    task: Task = "classification"

    @property
    def name(self) -> str:
        """Its measurements' name."""
        return self.arch if self.trained is None else f"{self.arch}_{self.resolution}"

    @property
    def folder(self) -> str:
        """Where its files lie; those of another checkpoint or of other images lie elsewhere."""
        if self.trained is None:
            return self.arch if self.task == Classification.name else f"{self.arch}_{self.task}"
        about = [digest_of(self.trained.checkpoint), self.trained.data.model_dump(mode="json")]
        return f"{self.name}_{fingerprint(about)[:8]}"


@dataclass(frozen=True)
class Finished:
    """A run that is through."""

    path: Path
    recipe: Recipe
    results: dict[str, Any]

    def file(self, target: str) -> Path:
        """The exported file, if it is still the one that was compared with the model."""
        model = self.results["exports"][target]["models"][self.recipe.precision]
        path = self.path / "exports" / target / str(model["file"])
        if digest_of(path) != model["sha256"]:
            raise RunError(f"{path} is not the file that was evaluated.", "rm -r runs/bench")
        return path

    def network(self) -> Care:
        """The float network that it began with, as published."""
        assert self.recipe.model.checkpoint is not None
        return load_checkpoint(self.recipe.model.checkpoint)

    @property
    def revision(self) -> str:
        """The commit that made it."""
        manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        return str(manifest["git_revision"])

    def calibration(self) -> CalibrationSet:
        """The images it was calibrated on."""
        return read_list(self.path / "calibration.json", open_samples(self.recipe.data, "train"))


def image_folder(root: Path) -> DataSection:
    """Images of the built-in set as PNG files, and a list of 1,000 classes that has theirs."""
    names = Shapes("train").classes
    others = tuple(f"unused_{number:03d}" for number in range(CLASSES - len(names)))
    listed = root / "classes.txt"
    if not listed.is_file():
        for split in ("train", "val"):
            shapes = Shapes(split)
            for index in range(IMAGES[split]):
                path = root / split / names[shapes.labels[index]] / f"{index:03d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                shapes.image(index).save(path)
        write_text(listed, "\n".join((*names, *others)) + "\n")
    return DataSection(source=str(root), crop_pct=1.0, classes=str(listed), workers=0)


def lifelike(
    arch: str,
    images_BCHW: Tensor,
    seed: int = 0,
    kind: type[Care] = Care,
    classes: int = CLASSES,
) -> Care:
    """A random network whose channels differ as those of trained ones do."""
    torch.manual_seed(seed)
    model = build_model(arch, classes, kind=kind)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data.normal_(0, module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.data.normal_(0, 0.1)
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.copy_(torch.exp(torch.randn(module.num_features) * 0.7))
            module.bias.data.normal_(0, 0.3)
            module.momentum = 1.0  # statistics of these images, not of those before
    with torch.no_grad():
        model.train()(images_BCHW)
    return model.eval()


def first_images(data: DataSection, count: int, task: Task = "classification") -> Tensor:
    """Validation images, as the network takes them."""
    samples = task_called(task).samples(data, "val")
    indices = [number % len(samples) for number in range(count)]
    batches = prepared_batches(samples, data, count, bad=BadImages(), indices=indices)
    (batch,) = islice(batches, 1)
    return batch.images.contiguous()


def run_of(name: str, scale: Scale, root: Path, console: Console) -> Finished:
    """A shipped recipe on this network: the run that is there already, or a new one."""
    recipe = recipe_for(name, scale, root)
    return finished(recipe, root / scale.folder, name, console)


def recipe_for(name: str, scale: Scale, root: Path, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe for the CPU targets; weights and images are made where none are given."""
    if scale.trained is None:
        calibration = CALIBRATION
        made = DataSection(source="builtin:scenes", workers=0)
        if scale.task == Classification.name:
            made = image_folder(root / "images")
        data = made.model_copy(update={"resolution": scale.resolution})
        weights = root / scale.folder / "model.safetensors"
        if not weights.is_file():
            task = task_called(scale.task)
            classes = len(task.samples(data, "val").classes)
            images = first_images(data, 16, scale.task)
            model = lifelike(scale.arch, images, kind=task.kind, classes=classes)
            save_checkpoint(model, weights, {"made_by": "make bench", "seed": "0"})
    else:
        calibration = TRAINED_CALIBRATION
        data, weights = scale.trained.data, scale.trained.checkpoint
    values: dict[str, object] = {
        "task": scale.task,
        "model": {"checkpoint": str(weights)},
        "data": data.model_dump(mode="json"),
        "evaluate.images": IMAGES["val"],  # of the simulation; files are scored by speed.py
        "export.images": IMAGES["val"],
        "export.targets": list(TARGETS),
    }
    if name != "fp32":
        values["quantize.calibrate.images"] = calibration
    return load_recipe(name, overrides, values)


def finished(recipe: Recipe, root: Path, name: str, console: Console) -> Finished:
    """The run of a recipe: one that is there already, or a new one."""
    path = root / name
    if not _is_finished(recipe, path):
        console.print(f"running {recipe.name} into {path}", markup=False, soft_wrap=True)
        run_recipe(recipe, root, name, Console(quiet=True))
    results = json.loads((path / "results.json").read_text(encoding="utf-8"))
    return Finished(path, recipe, results)


def _is_finished(recipe: Recipe, path: Path) -> bool:
    if not (path / "results.json").is_file():
        return False
    return parse(Recipe, read_yaml(path / "recipe.yaml"), "recipe.yaml") == recipe
