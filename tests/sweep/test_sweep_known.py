"""What a sweep takes over from an earlier one, and which nodes time: asked without a cluster."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from sweeping import sweep_of
from tiny import image_folder

from care_compress.errors import TargetError
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.shipped import shipped
from care_compress.sweep import driver as driving
from care_compress.sweep.cluster import Node
from care_compress.sweep.driver import Driver, begun_before, space_of, timing_nodes
from care_compress.sweep.sections import Sweep
from care_compress.sweep.tasks import RECORDS, Place, record_file
from care_compress.sweep.trials import make_search

IMAGES = "quantize.calibrate.images"


def driver(folder: Path, sweep: Sweep) -> Driver:
    """As a new process has it; nothing is handed out."""
    ray = SimpleNamespace(
        put=lambda value: value, remote=lambda task: SimpleNamespace(options=lambda **more: None)
    )
    nothing: Any = None
    cluster: Any = SimpleNamespace(ray=ray)
    place = Place(folder / "runs", Path.cwd(), "mark", "code")
    search = make_search(sweep, folder)
    return Driver(sweep, cluster, place, search, nothing, Console(quiet=True), False)


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """Images, weights and a target of the user's own."""
    images = image_folder(tmp_path / "images", 4)
    (tmp_path / "four.safetensors").write_bytes(b"weights")
    shutil.copy(shipped("recipes/targets") / "onnxruntime-cpu.yaml", tmp_path / "mine.yaml")
    data = {"data.source": str(images), "data.resolution": 32}
    more = {"export.targets": [str(tmp_path / "mine.yaml")]}
    weights = {"model.checkpoint": str(tmp_path / "four.safetensors")}
    return load_recipe("int8_ptq", [], {**data, **weights, **more})


@pytest.fixture
def known(tmp_path: Path, recipe: Recipe) -> Callable[[], bool]:
    """Whether a run that is through counts as the recipe's."""
    sweep = sweep_of(tmp_path)
    run = tmp_path / "runs" / "trial"
    (tmp_path / "runs" / RECORDS).mkdir(parents=True)
    run.mkdir()
    (run / "out.bin").write_bytes(b"result")
    digest = driving.sha256_file(run / "out.bin")
    (run / "manifest.json").write_text(json.dumps({"outputs": {"out.bin": digest}}))
    record = {"key": driver(tmp_path, sweep)._key(recipe), "row": {"status": "finished"}}
    record_file(tmp_path / "runs", "trial").write_text(json.dumps(record))
    return lambda: driver(tmp_path, sweep)._known_as("trial", recipe) is not None


def test_a_run_that_is_through_is_taken_over(known: Callable[[], bool]) -> None:
    assert known()


@pytest.mark.parametrize("changed", ["image", "weights", "target", "package", "output"])
def test_a_run_of_anything_else_is_made_again(
    changed: str, known: Callable[[], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if changed == "image":
        shutil.copy(tmp_path / "images/train/red/0.png", tmp_path / "images/train/blue/0.png")
    elif changed == "weights":
        (tmp_path / "four.safetensors").write_bytes(b"others!")
    elif changed == "target":
        text = (tmp_path / "mine.yaml").read_text()
        (tmp_path / "mine.yaml").write_text(
            text.replace("reduce_range: true", "reduce_range: false")
        )
    elif changed == "package":
        monkeypatch.setattr(driving.machine, "installed_versions", lambda names: {"torch": "0.0"})
    else:
        (tmp_path / "runs" / "trial" / "out.bin").write_bytes(b"resulT")
    assert not known()


def test_a_search_goes_on_from_trials_of_its_own_space(tmp_path: Path) -> None:
    overrides = {"overrides": {IMAGES: [8, 16]}, "search": "random", "trials": 2}
    sweep = sweep_of(tmp_path, **overrides)
    spaces = {"mine": space_of(sweep), "more": space_of(sweep_of(tmp_path, **overrides))}
    for name, other in {
        "images": sweep_of(tmp_path, **overrides, data=["builtin:shapes"]),
        "weights": sweep_of(tmp_path, **overrides, checkpoints=["a.pth"]),
        "values": sweep_of(tmp_path, **{**overrides, "overrides": {IMAGES: [8, 32]}}),
        "seed": sweep_of(tmp_path, **overrides, seed=1),
    }.items():
        spaces[name] = space_of(other)
        assert spaces[name] != spaces["mine"], name
    spaces["longer"] = space_of(sweep_of(tmp_path, **{**overrides, "trials": 9}))
    (tmp_path / RECORDS).mkdir()
    for name, space in spaces.items():
        (tmp_path / RECORDS / f"{name}.json").write_text(
            json.dumps({"space": space, "point": {IMAGES: 8}})
        )
    found = begun_before(tmp_path, space_of(sweep))
    assert [one["name"] for one in found] == ["longer", "mine", "more"]


@pytest.mark.parametrize(
    ("asked", "names"),
    [({}, ["b", "c"]), ({"processor": "epyc"}, ["b", "c"]), ({"processor": "8480"}, ["a"])],
)
def test_files_are_timed_on_the_processors_that_most_nodes_have(
    asked: dict[str, Any], names: list[str], tmp_path: Path
) -> None:
    nodes = [Node(name, name, 4, 0, False) for name in ("a", "b", "c", "d")]
    known = {"a": "Xeon 8480", "b": "AMD EPYC", "c": "AMD EPYC", "d": "AMD EPYC"}
    # One of a name may have dot products, and another not.
    about = {name: {"name": one, "kind": f"{one} {name == 'd'}"} for name, one in known.items()}
    task = SimpleNamespace(
        options=lambda num_cpus, scheduling_strategy: SimpleNamespace(
            remote=lambda: about[scheduling_strategy.id]
        )
    )
    ray = SimpleNamespace(remote=lambda function: task, get=lambda values: values)
    cluster: Any = SimpleNamespace(nodes=nodes, ray=ray, on=lambda node: node)
    sweep = sweep_of(tmp_path, timing={"targets": ["onnxruntime-cpu"], **asked})
    assert [node.name for node in timing_nodes(sweep, cluster)] == names
    other = sweep_of(tmp_path, timing={"targets": ["onnxruntime-cpu"], "processor": "M2"})
    with pytest.raises(TargetError, match="AMD EPYC, Xeon 8480"):
        timing_nodes(other, cluster)
