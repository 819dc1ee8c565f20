"""Sensitivity on Ray's workers: the bits of one process."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from quantized import small_start
from rich.console import Console

from care_compress.errors import TargetError
from care_compress.pipeline import run_sensitivity
from care_compress.recipe.recipe import load_recipe
from care_compress.sweep import sites as on_nodes
from care_compress.sweep.cluster import Cluster, open_cluster
from care_compress.sweep.sites import sites_on

clusters = pytest.importorskip("ray.cluster_utils", reason="needs the ray extra")

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    nodes = clusters.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20}
    )
    with open_cluster(str(nodes.address)) as cluster:
        yield cluster
    nodes.shutdown()


def test_two_workers_give_the_bits_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    few = [*small_start(tmp_path), "quantize.calibrate.images=8"]
    recipe = load_recipe("int8_ptq", few)
    run_sensitivity(recipe, tmp_path, "here", 16, QUIET)
    there = sites_on(cluster, tmp_path / "there")
    run_sensitivity(recipe, tmp_path, "there", 16, QUIET, there)
    made = [(tmp_path / name / "sensitivity.json").read_bytes() for name in ("here", "there")]
    assert made[0] == made[1]
    assert json.loads(made[0])["sites"]
    assert not list((tmp_path / "there").glob("*sites*")), "what travelled is gone"


def test_what_a_worker_cannot_do_is_one_line(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: Path, digest: str, site: str) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(on_nodes, "effects_of", fails)
    few = [*small_start(tmp_path), "quantize.calibrate.images=8"]
    with pytest.raises(TargetError, match="was not measured.*no such thing"):
        recipe = load_recipe("int8_ptq", few)
        run_sensitivity(recipe, tmp_path, "s", 16, QUIET, sites_on(cluster, tmp_path / "s"))
