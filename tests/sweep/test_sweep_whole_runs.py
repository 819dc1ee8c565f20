"""Runs that `reference` and the ablation make on Ray's workers: those of one process."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ablate
import pytest
import yaml
from quantized import care
from rich.console import Console
from tiny import image_folder

from care_compress.errors import RecipeError
from care_compress.evaluate.reference import one_by_one, run_reference
from care_compress.model.checkpoint import save_checkpoint
from care_compress.pipeline import run_recipe
from care_compress.recipe import recipe as recipes
from care_compress.recipe.recipe import Recipe, load_recipe
from care_compress.sweep.cluster import Cluster
from care_compress.sweep.runs import runs_on

pytest.importorskip("ray.cluster_utils", reason="needs the ray extra")

CPU = "onnxruntime-cpu"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of recipes with two tiny ones in it: a float one, and one with few integers."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    save_checkpoint(care(4), folder / "four.safetensors", {})
    data = {"source": str(image_folder(folder / "images")), "resolution": 32, "workers": 0}
    plain = {
        "claim": "a test",
        "model": {"checkpoint": str(folder / "four.safetensors")},
        "data": data,
        "export": {"images": 8, "targets": [CPU]},
    }
    integers = {"precision": "int8", "quantize": {"rules": [{"role": "head", "weight": 8}]}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(plain))
    (folder / "small.yaml").write_text(yaml.safe_dump({**plain, **integers}))
    monkeypatch.setattr(recipes, "RECIPES_DIR", folder)
    return folder


def dies_once(died: Path) -> Any:
    """A pipeline whose process dies over the run that is asked for first."""

    def work(
        recipe: Recipe, runs: Path, name: str, console: Console, repair: bool, watch: Any
    ) -> Any:
        if "tiny" in name and not died.exists():
            died.touch()
            os.abort()
        return run_recipe(recipe, runs, name, console, repair, watch)

    return work


@pytest.mark.slow
def test_reference_says_the_same_in_the_same_order(
    cluster: Cluster, shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accepted = {
        "top1_tolerance": 0.2, "size_tolerance": 1.0,
        "targets": {CPU: {"top1": 50.0, "size_bytes": 1}},
    }  # fmt: skip
    file = tmp_path / "reference.yaml"
    file.write_text(yaml.safe_dump({"recipes": {"tiny": accepted, "small": accepted}}))
    said = []
    for runs, make_runs in (
        (tmp_path / "here", one_by_one(run_recipe)),
        (tmp_path / "there", runs_on(cluster, dies_once(tmp_path / "died"))),
    ):
        assert run_reference([], file, runs, make_runs, Console(width=200)) == 1
        lines = capsys.readouterr().out.replace(str(runs), "runs").splitlines()
        said.append([line for line in lines if "(raylet)" not in line])  # of the one that died
    assert said[0] == said[1] and sum("DRIFT" in line for line in said[0]) >= 3
    assert (tmp_path / "died").exists()
    made = {path.name for path in (tmp_path / "there").iterdir()}
    assert made == {"reference_tiny", "reference_small"}, "what told the nodes is gone"


@pytest.mark.slow
def test_rows_of_the_ablation_are_those_of_one_process(
    cluster: Cluster, shipped: Path, tmp_path: Path
) -> None:
    seeds = [ablate.Row("W8A8", f"seed {seed}", "small", (f"seed={seed}",)) for seed in (0, 1)]
    asked = [(row, load_recipe(row.recipe, row.overrides)) for row in [*seeds, seeds[0]]]
    tables = []
    for folder, make_runs in (
        (tmp_path / "here", ablate.in_one_folder),
        (tmp_path / "there", ablate.in_their_own(runs_on(cluster, run_recipe))),
    ):
        found = ablate.measured(asked, folder / "tiny.json", make_runs, Console(quiet=True))
        tables.append([(row, {**figures, "seconds": {}}) for row, figures in found])
        again = ablate.measured(asked, folder / "tiny.json", never, Console(quiet=True))
        assert again == found, "a row that is there is not made again"
    assert tables[0] == tables[1] and len(tables[0]) == 3
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["tiny.json"]
    assert len(json.loads((tmp_path / "there" / "tiny.json").read_text())) == 2


def never(wanted: Any, runs: Path) -> Iterator[tuple[str, Any]]:
    """Stands for what makes runs where none is missing."""
    assert not wanted
    yield from ()


def test_a_run_that_cannot_be_made_is_the_users_one_line(
    cluster: Cluster, shipped: Path, tmp_path: Path
) -> None:
    odd = load_recipe("small", ["quantize.rules=[{site: nowhere, weight: 8}]"])
    with pytest.raises(RecipeError, match="nowhere"):
        list(runs_on(cluster, run_recipe)({"odd": odd}, tmp_path / "runs"))
