"""Sensitivity and a search for bits on Ray's workers: the bits of one process."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from quantized import small_start
from rich.console import Console
from typer.testing import CliRunner

from care_compress import cli
from care_compress.errors import CareError, TargetError
from care_compress.pipeline import run_recipe, run_sensitivity
from care_compress.recipe.recipe import load_recipe
from care_compress.sweep import sites as on_nodes
from care_compress.sweep.cluster import Cluster
from care_compress.sweep.sites import noises_on, sites_on

pytest.importorskip("ray.cluster_utils", reason="needs the ray extra")

QUIET = Console(quiet=True)
HEAD = "quantize.rules=[{role: head, weight: 8, input: 8}]"
FEW = "quantize.rules=[{stage: 3, role: pointwise, weight: 8, input: 8}]"


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads this process computes with."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize(("count", "images", "rules"), [(1, 16, FEW), (2, 7, HEAD)])
def test_workers_give_the_bits_of_one_process(
    count: int,
    images: int,
    rules: str,
    threads: Callable[[int], None],
    cluster: Cluster,
    tmp_path: Path,
) -> None:
    """Seven images by two threads have other bits than by one."""
    threads(count)
    few = [*small_start(tmp_path), "quantize.calibrate.images=8", rules]
    recipe = load_recipe("int8_ptq", few)
    run_sensitivity(recipe, tmp_path, "here", images, QUIET)
    there = sites_on(cluster, tmp_path / "there")
    run_sensitivity(recipe, tmp_path, "there", images, QUIET, there)
    made = [(tmp_path / name / "sensitivity.json").read_bytes() for name in ("here", "there")]
    assert made[0] == made[1]
    assert json.loads(made[0])["sites"]
    assert not list((tmp_path / "there").glob("*sites*")), "what travelled is gone"


def test_a_search_for_bits_ends_with_the_files_of_one_process(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that dies over a site changes nothing, and neither does where it was measured."""
    died, real = tmp_path / "died", on_nodes.noise_there

    def dies_once(folder: Path, digest: str, site: str) -> float:
        if not died.exists():
            died.touch()
            os.abort()
        return real(folder, digest, site)

    monkeypatch.setattr(on_nodes, "noise_there", dies_once)
    few = [*small_start(tmp_path), "quantize.calibrate.images=8", "export.targets=[]"]
    few += ["quantize.search.trials=2", "quantize.search.images=8", "budget.max_top1_drop=60", FEW]
    recipe = load_recipe("mixed_auto", few)
    run_recipe(recipe, tmp_path, "here", QUIET)
    there = noises_on(cluster, tmp_path / "there", recipe.rewrite)
    run_recipe(recipe, tmp_path, "there", QUIET, measure=there)
    assert died.exists()
    for name in ("ptq/model.safetensors", "ptq/trials.json", "ptq/tuning.json"):
        made = [(tmp_path / run / name).read_bytes() for run in ("here", "there")]
        assert made[0] == made[1], name
    stages = [
        json.loads((tmp_path / run / "manifest.json").read_text()) for run in ("here", "there")
    ]
    made_from = [{k: v["made_from"] for k, v in one["stages"].items()} for one in stages]
    assert made_from[0] == made_from[1]
    # What was made with Ray is taken over without it.
    told = Console(record=True, width=120, file=open("/dev/null", "w"))  # noqa: SIM115
    run_recipe(recipe, tmp_path, "there", told)
    assert "ptq: unchanged, taken over" in told.export_text()


def test_a_run_that_searches_nothing_has_nothing_to_share_out(tmp_path: Path) -> None:
    arguments = ["quantize", "int8_ptq", "--runs", str(tmp_path), "--ray", "local"]
    done = CliRunner().invoke(cli.app, arguments)
    assert isinstance(done.exception, CareError) and "searches no bits" in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_what_a_worker_cannot_do_is_one_line(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: Path, digest: str, site: str) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(on_nodes, "effects_of", fails)
    few = [*small_start(tmp_path), "quantize.calibrate.images=8", HEAD]
    with pytest.raises(TargetError, match="was not done.*no such thing"):
        recipe = load_recipe("int8_ptq", few)
        run_sensitivity(recipe, tmp_path, "s", 16, QUIET, sites_on(cluster, tmp_path / "s"))
