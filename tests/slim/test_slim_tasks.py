"""Slimming networks for masks and boxes: their own heads, losses and metrics."""

import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from every_task import CLASSES, SIDE, network_for, painted, photos
from rich.console import Console
from torch import Tensor

from care_compress.cli import main
from care_compress.data.annotations import Annotation, Boxes
from care_compress.data.loader import Batch
from care_compress.evaluate.slim_accuracy import slim_line
from care_compress.model.care import DenseCare, build_model
from care_compress.model.checkpoint import load_checkpoint, save_checkpoint
from care_compress.model.cost import measure_cost
from care_compress.model.rewrite import rewrite
from care_compress.pipeline import run_recipe
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.recipe.sections import DataSection
from care_compress.recipe.slim import SlimSection
from care_compress.report import write
from care_compress.slim.cut import cut
from care_compress.slim.places import bottleneck_at, find_places, layer_behind
from care_compress.slim.plan import cost_of, make_plan
from care_compress.slim.refit import refit
from care_compress.slim.statistics import measure_hidden
from care_compress.tasks.detection import weighed_by
from care_compress.tasks.known import TASKS, task_called

QUIET = Console(quiet=True)
DENSE = ("segmentation", "detection")
METRIC = {"segmentation": ("miou", "pixel_accuracy"), "detection": ("map50", "map")}


def annotated(task: str, count: int) -> tuple[Annotation, ...]:
    """Labels of images twice as wide as high, which a square shows between bars."""
    found: list[Annotation] = []
    for number in range(count):
        if task == "segmentation":
            mask = np.zeros((40, 80), np.uint8)
            mask[8:30, 10 + number : 60] = 1 + number % (CLASSES - 1)
            found.append(mask)
        else:
            corners = np.array([[10.0 + number, 8, 60, 30]], np.float32)
            crowd = np.zeros(1, np.bool_)
            found.append(Boxes(corners, np.array([number % CLASSES]), crowd, (40, 80)))
    return tuple(found)


def batches(task: str, count: int = 8) -> list[Batch]:
    images, labels = photos(count), torch.zeros(count, dtype=torch.int64)
    places = torch.arange(count)
    return [
        Batch(
            images[i : i + 4],
            labels[i : i + 4],
            places[i : i + 4],
            annotated(task, count)[i : i + 4],
        )
        for i in range(0, count, 4)
    ]


def section(**settings: object) -> SlimSection:
    return SlimSection.model_validate_json(json.dumps({"budget": {"macs": 0.8}, **settings}))


@pytest.mark.parametrize("task", DENSE)
def test_what_never_varies_is_cut_and_changes_nothing(task: str) -> None:
    """The head's 1x1 takes over what the last interaction was on average; a classifier's cannot."""
    model = network_for(task).double()
    gone, means = {}, {}
    for place in find_places(model):
        gone[place] = list(range(0, place.channels, 3))
        half = bottleneck_at(model, place)
        assert half.conv.bias is not None
        with torch.no_grad():
            half.conv.weight[gone[place]] = 0
            half.conv.bias[gone[place]] = 0.7
        silent = torch.tensor(gone[place])
        means[place] = torch.zeros(place.channels).double().index_fill(0, silent, 0.7)
    kept = {
        place: [c for c in range(place.channels) if c not in set(channels)]
        for place, channels in gone.items()
    }
    narrow = cut(model, kept, means)
    x = photos(2).double()
    assert type(narrow) is type(model) and narrow.widths.hidden2[-1] == len(kept[place])
    assert (narrow(x) - model(x)).abs().max() < 1e-12 * model(x).abs().max()


@pytest.mark.parametrize("task", sorted(TASKS))
def test_channels_cost_what_the_network_counts_whatever_reads_them(task: str) -> None:
    model = build_model("care_nano", CLASSES, kind=TASKS[task].kind)
    places = find_places(model)
    for chosen in (places, places[-1:]):
        narrow = cut(model, {place: range(place.channels - 8) for place in chosen})
        before, after = measure_cost(model, SIDE), measure_cost(narrow, SIDE)
        macs = sum(8 * place.macs_of_channel(SIDE, model) for place in chosen)
        parameters = sum(8 * place.parameters_of_channel(model) for place in chosen)
        assert before.macs - after.macs == macs
        assert before.parameters - after.parameters == parameters


@pytest.mark.parametrize("task", DENSE)
@pytest.mark.parametrize("importance", ["reconstruct", "taylor", "magnitude"])
def test_the_budget_is_of_the_whole_network_and_its_head_stays(task: str, importance: str) -> None:
    model = network_for(task)
    asked = section(importance=importance, multiple=4)
    seen = measure_hidden(task_called(task), model, batches(task), 0, lambda done: None)
    plan = make_plan(model, asked, seen, cost_of(model, "macs", SIDE))
    narrow = cut(model, plan.kept, {place: one.mean_H for place, one in seen.items()})
    assert measure_cost(narrow, SIDE).macs == plan.after
    assert 0.77 <= plan.after / measure_cost(model, SIDE).macs <= 0.8
    x = photos(16).split(8)
    distances = []
    for _ in range(2):
        with torch.no_grad():
            distances.append(float((narrow(x[0]) - model(x[0])).square().mean()))
        refit(narrow, model, x, lambda blocks: None)
    assert distances[1] < distances[0]
    torch.testing.assert_close(rewrite(narrow)(x[1]), narrow(x[1]), rtol=1e-3, atol=1e-3)
    assert isinstance(narrow, DenseCare) and isinstance(model, DenseCare)
    for name, value in narrow.dense.named_parameters():
        whole = model.dense.get_parameter(name)
        assert value.shape[0] == whole.shape[0]
        if "laterals" not in name:
            assert value.shape == whole.shape


@pytest.mark.parametrize("task", DENSE)
def test_the_taylor_score_is_the_slope_of_each_images_own_loss(task: str) -> None:
    model, channel = network_for(task).double(), 9
    place = find_places(model)[-1]
    (batch,) = batches(task, 4)
    exact = batch._replace(images=batch.images.double())
    seen = measure_hidden(task_called(task), model, [exact], 0, lambda done: None)
    behind = layer_behind(model, place)
    assert behind is not None

    def losses(scale: float) -> Tensor:
        grown = torch.ones(place.channels, 1, 1, dtype=torch.float64)
        grown[channel] = scale
        handle = behind.register_forward_pre_hook(lambda module, args: (args[0] * grown,))
        with torch.no_grad():
            answers = model(exact.images)
        handle.remove()
        found = []
        for i in range(4):
            one = exact._replace(annotations=exact.annotations[i : i + 1])
            found.append(task_called(task).loss_of_images(answers[i : i + 1], one))
        return torch.stack(found)

    step = 1e-2  # losses are computed in float32, which knows no finer one
    slopes = ((losses(1 + step) - losses(1 - step)) / (2 * step)).double()
    assert float(seen[place].taylor_H[channel]) == pytest.approx(
        float(slopes.square().mean()), rel=0.05
    )


def test_an_error_of_a_box_counts_by_its_size_and_by_how_sure_it_is() -> None:
    said = torch.full((1, 4 + 2, 3), -9.0)
    said[0, :4] = torch.tensor([[0.1, 0.1, 0.1], [0.1] * 3, [0.2, 0.5, 0.2], [0.2, 0.5, 0.2]])
    said[0, 4, :2] = 2.0  # the third place sees nothing
    moved = said.clone()
    moved[0, 0] += 0.01
    small, large, empty = (weighed_by(said, moved) - weighed_by(said, said))[0, 0].abs().tolist()
    assert small == pytest.approx(4 * large, rel=1e-3)
    # Half its square is what the loss grows by: twice the score, by the error in sides.
    score = 1 / (1 + math.exp(-2.0))
    assert small == pytest.approx(math.sqrt(2 * score) * 0.01 / 0.1, rel=1e-3)
    assert empty < 0.05 * small
    louder = said.clone()
    louder[0, 4] += 0.1
    seen, _, nothing = (weighed_by(said, louder) - weighed_by(said, said))[0, 4].tolist()
    assert nothing < 0.1 * seen


def recipe(place: Path, task: str, **values: object) -> Recipe:
    name = f"{task_called(task).recipes}int8_ptq"
    heal = {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3}
    return load_recipe(
        name,
        [],
        {
            "model.checkpoint": str(place / "model.safetensors"),
            "data.source": str(place / "images"),
            "data.resolution": SIDE,
            "data.workers": 0,
            "export.targets": [],
            "quantize.calibrate.images": 4,
            "slim": {"budget": {"macs": 0.85}, "images": 8, "multiple": 4, "heal": heal},
            **values,
        },
    )


def prepared(folder: Path, task: str) -> Path:
    painted(folder / "images", task)
    torch.manual_seed(0)
    data = DataSection(source=str(folder / "images"), resolution=SIDE)
    classes = TASKS[task].samples(data, "train").classes
    model = build_model("care_nano", len(classes), kind=TASKS[task].kind)
    save_checkpoint(model.eval(), folder / "model.safetensors", {})
    return folder


@pytest.mark.parametrize("task", DENSE)
def test_a_run_is_slimmed_healed_and_told_in_its_own_metric(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = prepared(tmp_path, task)
    results = run_recipe(recipe(place, task), place / "runs", "slim", QUIET)
    schema = Path(write.__file__).with_name("results.schema.json")
    jsonschema.validate(results, json.loads(schema.read_text()))
    slim, key = results["slim"], METRIC[task][0]
    before, after = slim["macs"]
    assert 0.8 <= after / before <= 0.85
    assert list(slim["models"]) == ["float", "float, trained as long", "slim", results["kept"]]
    models: dict[str, Any] = slim["models"]
    for one in models.values():
        assert list(one)[1:3] == list(METRIC[task]) and "top1" not in one
        assert one["images"] == 6
        low, high = one["drop_ci95"]
        assert low <= one["drop"] <= high
    against = models[models["slim"]["against"]]
    assert models["slim"]["drop"] == pytest.approx(against[key] - models["slim"][key])
    assert models[results["kept"]][key] == pytest.approx(results["accuracy"][key])
    assert f"{models['float'][key]:.2f} % as given" in slim_line(results)
    healed = load_checkpoint(place / "runs" / "slim" / "slim" / "model.safetensors")
    assert healed.task == task and measure_cost(healed, SIDE).macs == after
    start = load_checkpoint(place / "runs" / "slim" / "slim" / "cut.safetensors")
    learned = "dense.pyramid.laterals.0.weight"
    assert not torch.equal(start.get_parameter(learned), healed.get_parameter(learned))
    with pytest.raises(SystemExit) as ended:
        main(["report", "slim", "--runs", str(place / "runs")])
    assert ended.value.code == 0
    page = (place / "runs" / "slim" / "report.md").read_text()
    assert "What was cut, and what it cost" in page
    assert task_called(task).metric.name in page


def test_every_task_has_a_recipe_that_slims_it() -> None:
    for task in TASKS.values():
        made = load_recipe(f"{task.recipes}slim_int8_qat")
        assert made.task == task.name and made.slim is not None
        assert made.slim.budget.macs == 0.7
        assert made.budget.max_drop is not None
