"""Times of widths: what is read between two of them, whose layers they are, when they hold."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantized import care
from rich.console import Console

from care_compress import machine
from care_compress.export import width_times
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.runtime.layer_times import OTHER, LayerTime, Profile
from care_compress.slim.places import Place, find_places

ROW = [(0, 0.0), (16, 1.0), (32, 3.0), (64, 4.0)]
IMAGE = torch.zeros(1, 3, 32, 32)


def recipe(**values: object) -> Recipe:
    return load_recipe("int8_qat", [], {"slim": {"budget": {"latency": 0.8}}, **values})


@pytest.mark.parametrize(
    ("width", "ms"), [(0, 0.0), (4, 0.25), (16, 1.0), (20, 1.5), (24, 2.0), (40, 3.25), (64, 4.0)]
)
def test_a_width_between_two_that_were_measured_lies_between_their_times(
    width: int, ms: float
) -> None:
    assert width_times._at(ROW, width) == pytest.approx(ms)


@pytest.mark.parametrize(
    ("channels", "widths"),
    [
        (64, [64, 48, 32, 16, 16]),
        (40, [40, 32, 16, 16, 16]),  # the whole may be no multiple
        (8, [8, 8, 8, 8, 8]),  # and may be less than one
    ],
)
def test_widths_that_are_timed_are_widths_that_may_be_chosen(
    channels: int, widths: list[int]
) -> None:
    place = Place(0, 0, "inter1", 0, 16, channels, False)
    shares = (*width_times.SHARES, 0.0)
    assert [width_times._narrowed(place, share, 16) for share in shares] == widths


def key(task: str = "classification", classes: int = 4, **values: object) -> str:
    model: Any = SimpleNamespace(task=task, arch="care_nano", num_classes=classes)
    asked = recipe(**values)
    assert asked.slim is not None
    return width_times._key(asked, asked.slim, model)


def test_times_hold_for_the_same_layers_on_the_same_clock_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual, resolution = key(), recipe().data.resolution
    others = [
        key(classes=5),
        key("segmentation"),
        key(**{"data.resolution": resolution + 32}),
        key(**{"rewrite.fold_norms": not recipe().rewrite.fold_norms}),
        key(**{"quantize.rules": [{"weight": 4}]}),
        key(**{"slim.target": "onnxruntime-cpu"}),
        key(**{"slim.multiple": 8}),
        key(**{"export.input": "uint8"}),
    ]
    assert len({usual, *others}) == 1 + len(others)
    # How it is trained, by what it is cut and on how many images changes no layer.
    for name, value in (("quantize.qat.epochs", 3), ("slim.images", 9), ("export.images", 9)):
        assert key(**{name: value}) == usual, name
    other: Any = SimpleNamespace(cpu=SimpleNamespace(kind="another"))
    monkeypatch.setattr(machine, "read_machine", lambda: other)
    assert key() != usual


def test_a_layer_counts_for_the_half_that_it_runs_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves share one activation, which runs behind the first 1x1 of each."""
    inter = "stages.1.blocks.0.inter_layer."
    ran = [
        ("stages.1.blocks.0.token_mixer.dwconv1", 64.0),
        (f"{inter}inter1_fc1", 1.0),
        (f"{inter}activation", 2.0),
        (f"{inter}inter1_conv", 4.0),
        (f"{inter}inter2_fc1", 8.0),
        (f"{inter}activation_1", 16.0),
        (f"{inter}inter2_fc2", 32.0),
        ("stages.2.blocks.0.inter_layer.inter1_fc1", 128.0),
        ("stages.2.blocks.0.inter_layer.activation", 256.0),
    ]
    layers = tuple(LayerTime(name, "Conv", (name,), "f32", OTHER, ms) for name, ms in ran)
    monkeypatch.setattr(width_times, "profile_layers", lambda *given, **more: Profile(layers, None))
    places = tuple(find_places(care(4)))
    found = width_times._by_place(Path("m.onnx"), IMAGE, "f32", places)
    assert found["1.0 inter1"] == 1 + 2 + 4 and found["1.0 inter2"] == 8 + 16 + 32
    assert found["2.0 inter1"] == 128 + 256 and found["0.0 inter1"] == 0
    assert found["all"] == 511


def test_the_median_of_the_turns_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A turn that something disturbed is neither the whole network's time nor a width's."""
    model, asked = care(4), recipe()
    places, turns = tuple(find_places(model)), {"0": [7.0, 90.0, 8.0], "1": [5.0, 2.0, 60.0]}
    taken = {name: iter(times) for name, times in turns.items()}

    def by_place(path: Path, *more: Any) -> dict[str, float]:
        ms = next(taken[path.name])
        return {**{place.name: ms / 2 for place in places}, "all": ms}

    held: Any = SimpleNamespace(batches=lambda size: iter([IMAGE]))
    monkeypatch.setattr(width_times, "SHARES", (1.0,))
    monkeypatch.setattr(width_times, "TURNS", 3)
    monkeypatch.setattr(width_times, "labelled", lambda recipe, split: None)
    monkeypatch.setattr(width_times, "hold_images", lambda *given: held)
    monkeypatch.setattr(width_times, "_exported", lambda *given: given[-1])
    monkeypatch.setattr(width_times, "_by_place", by_place)
    assert asked.slim is not None
    found = width_times._measured(asked, asked.slim, model, places, tmp_path, Console(quiet=True))
    assert found["total_ms"] == 8.0
    first = places[0]
    assert found["places"][first.name] == [(asked.slim.multiple, 2.5), (first.channels, 4.0)]
