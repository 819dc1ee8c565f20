"""A node that is lost in mid-sweep: real raylets, several on this machine."""

import threading
import time
from pathlib import Path

import pytest
from sweeping import run, sweep_of, times_made

from care_compress.sweep.cluster import open_cluster
from care_compress.sweep.tasks import processor

ray = pytest.importorskip("ray", reason="needs the ray extra")
clusters = pytest.importorskip("ray.cluster_utils")

IMAGES = "quantize.calibrate.images"


def test_a_node_that_is_lost_costs_only_what_ran_on_it(tmp_path: Path) -> None:
    small = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    nodes = clusters.Cluster(initialize_head=True, head_node_args=small)
    second, runs = nodes.add_node(**small), tmp_path / "runs"

    def lose() -> None:
        while not times_made(runs, on=second.node_id):
            time.sleep(0.02)
        nodes.remove_node(second, allow_graceful=False)

    try:
        with open_cluster(str(nodes.address)) as cluster:
            warm = ray.remote(processor)
            for node in cluster.nodes:  # both have a worker that has imported everything
                ray.get(warm.options(scheduling_strategy=cluster.on(node)).remote())
            slow = {"quantize.calibrate.batch_size": 1000}  # a trivial trial sleeps so many ms
            overrides = {IMAGES: [20 + number for number in range(6)]}
            losing = threading.Thread(target=lose)
            losing.start()
            code, value = run(cluster, sweep_of(tmp_path, overrides=overrides, set=slow), runs)
            losing.join()
    finally:
        nodes.shutdown()
    assert code == 0
    assert sum(times_made(runs).values()) > 6, "one was begun again"
    found = {row["point"][IMAGES]: row.get("top1") for row in value["trials"]}
    assert found == {20 + number: 90.0 - 1 / (20 + number) for number in range(6)}
