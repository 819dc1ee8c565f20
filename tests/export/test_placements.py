"""What a board chooses among: names, files, losses and figures, of models of one matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from graphs import onnx_file
from onnx import numpy_helper
from quantized import small_start
from rich.console import Console
from torch import Tensor

from care_compress.data.loader import BadImages
from care_compress.errors import ExportError, RunError
from care_compress.evaluate.agreement import Agreement, HeldImages, hold_images
from care_compress.export import placements
from care_compress.export.edges import Edges
from care_compress.export.placements import PlacedModel, place_models, show_placements
from care_compress.export.result import About, Preprocessing
from care_compress.recipe.recipe import load_recipe
from care_compress.recipe.sections import DataSection, ExportSection
from care_compress.recipe.target import AS_SHIPPED, Target, load_target
from care_compress.run.finished import FinishedRun
from care_compress.tasks.known import labelled, task_called
from care_compress.tasks.task import Drop

ORIN = load_target("tensorrt-jetson-orin")
IMAGES, BUNDLED = 24, 6
# The weights of each placement, as multiples of one matrix.
SCALES = {AS_SHIPPED: 1.0, "late": -1.0, "hidden": 0.5, "late-hidden": 2.0}
ROUNDED = 1.03  # how far a simulation is from its file: 30 dB


@dataclass
class Simulation:
    """A model of one matrix in the place of a `Variant`: its file is `spoiled` times as large."""

    logits: Tensor
    scale: float
    spoiled: float
    exact_db: float = 33.0

    def write(self, path: Path, about: About) -> None:
        model = onnx.load(onnx_file(path))
        (weights,) = model.graph.initializer
        values = numpy_helper.to_array(weights) * np.float32(self.scale * self.spoiled)
        weights.CopyFrom(numpy_helper.from_array(values, "weights"))
        onnx.save(model, path)


class Simulations:
    """In the place of `Variants`; the float model is right about every image."""

    def __init__(
        self,
        model: Any,
        network: Any,
        kept: Path | None,
        hold: Callable[[], HeldImages],
        data: DataSection,
        section: ExportSection,
    ) -> None:
        assert section.target_rules, "placements stand in the place of a target's rules"
        self.held = hold()
        self.task = task_called("classification")
        self.float_logits = 10 * torch.eye(4)[self.held.labels]

    scales = SCALES
    spoiled: str | None = None  # the placement whose file is another model's

    def of(self, target: Target) -> Simulation:
        wrong = -1.0 if target.placement == self.spoiled else 1.0
        scale = self.scales[target.placement]
        return Simulation(ROUNDED * scale * self.held.logits(ByHand()), scale, wrong)


class ByHand:
    """What the matrix of `onnx_file` answers."""

    num_classes, task = 4, "classification"

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        x = images_BCHW.flatten(1)
        weights = np.random.default_rng(0).normal(size=(x.shape[1], 4)).astype(np.float32)
        return x @ torch.from_numpy(weights)


@pytest.fixture(autouse=True)
def simulations(monkeypatch: pytest.MonkeyPatch) -> type[Simulations]:
    class Own(Simulations):
        """Of one test, which may set what differs."""

    monkeypatch.setattr(placements, "Variants", Own)
    return Own


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A run that left its targets' rules out of what it exported."""
    folder = tmp_path_factory.mktemp("run")
    asked = [*small_start(folder), f"export.images={IMAGES}", "export.target_rules=false"]
    return FinishedRun(folder, load_recipe("int8_ptq", asked), {"model": "ptq/model.safetensors"})


@pytest.fixture(scope="module")
def held(run: FinishedRun) -> HeldImages:
    data = run.recipe.data
    return hold_images(labelled(run.recipe, "val"), data, IMAGES, BadImages())


def placed(run: FinishedRun, held: HeldImages, folder: Path) -> dict[str, PlacedModel]:
    about = About("int8_ptq", "0" * 64, ("a", "b", "c", "d"), Preprocessing.of(run.recipe.data))
    pixels = held.pixels_BCHW[:: IMAGES // BUNDLED].numpy()
    return place_models(run, ORIN, pixels, about, folder, lambda text: None)


def test_every_placement_is_written_and_compared_with_its_own_simulation(
    run: FinishedRun, held: HeldImages, tmp_path: Path
) -> None:
    found = placed(run, held, tmp_path)
    names = {"int8": AS_SHIPPED} | {f"int8-{one}": one for one in ORIN.placements}
    assert list(found) == list(names)
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.onnx" for name in names}
    plain = held.logits(ByHand())
    for name, placement in names.items():
        one = found[name]
        assert one.path == tmp_path / f"{name}.onnx"
        weights = numpy_helper.to_array(onnx.load(one.path).graph.initializer[0])
        expected = SCALES[placement] * np.random.default_rng(0).normal(size=weights.shape)
        assert np.allclose(weights, expected)
        # Three percent of noise, as much as an exact implementation may have.
        assert one.agreement.sqnr_db == pytest.approx(30.7, abs=0.1)
        assert one.agreement.images == IMAGES and one.agreement.percent == 100
        answers = SCALES[placement] * plain
        lost = 100 - 100 * float((answers.argmax(dim=1) == held.labels).float().mean())
        assert one.drop.value == pytest.approx(lost) and one.drop.low <= lost <= one.drop.high
        # One product of 3 x 32 x 32 float32 numbers and four answers, and no quantizer.
        assert one.edges == Edges(0, 0, 4 * (3 * 32 * 32 + 4))
        torch.testing.assert_close(one.logits, ROUNDED * answers[:: IMAGES // BUNDLED])
    assert found["int8"].drop.value > 20, "a random matrix is often wrong"


def test_a_placement_that_moves_nothing_is_no_choice(
    run: FinishedRun, held: HeldImages, tmp_path: Path, simulations: type[Simulations]
) -> None:
    simulations.scales = {**SCALES, "hidden": SCALES[AS_SHIPPED], "late-hidden": SCALES["late"]}
    assert set(placed(run, held, tmp_path)) == {"int8", "int8-late"}
    assert {path.name for path in tmp_path.iterdir()} == {"int8.onnx", "int8-late.onnx"}


@pytest.mark.parametrize("spoiled", [AS_SHIPPED, "hidden"])
def test_a_file_that_computes_something_else_is_refused(
    run: FinishedRun,
    held: HeldImages,
    tmp_path: Path,
    simulations: type[Simulations],
    spoiled: str,
) -> None:
    simulations.spoiled = spoiled
    name = "int8.onnx" if spoiled == AS_SHIPPED else "int8-hidden.onnx"
    with pytest.raises(ExportError, match=f"^{name} does not compute what its model does"):
        placed(run, held, tmp_path)


def test_images_that_changed_since_the_export_are_refused(
    run: FinishedRun, held: HeldImages, tmp_path: Path
) -> None:
    pixels = held.pixels_BCHW.clone()
    pixels[-IMAGES // BUNDLED, 0, 0, 0] ^= 1  # of the last one that is bundled
    changed: Any = SimpleNamespace(pixels_BCHW=pixels)
    with pytest.raises(RunError, match="not those that the run's files were compared on"):
        placed(run, changed, tmp_path)


def test_the_table_shows_each_figure_under_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    near = Agreement(1200, 1199, 1, 31.04, 27.0)
    one = PlacedModel(
        tmp_path, near, Drop(0.5, 0.1, 0.9), Edges(7, 3, 1_500_000), torch.zeros(1, 4)
    )
    show_placements({"int8": one, "int8-late": one}, Console())
    text = capsys.readouterr().out
    assert "simulated on 1,200 images" in text
    order = ["drop [95 %]", "INT8 to INT8", "quantizers alone", "MB moved", "SQNR of file"]
    columns = [text.index(column) for column in order]
    assert columns == sorted(columns)
    (row,) = (line for line in text.splitlines() if "int8-late" in line)
    cells = [cell.strip() for cell in row.strip("│ ").split("│")]
    assert cells == ["int8-late", "0.50 [0.10, 0.90]", "7", "3", "1.50", "31.0 dB"]
