"""A cluster of one node with two cores, for the tests that hand work out."""

from collections.abc import Iterator

import pytest

from care_compress.sweep.cluster import Cluster, open_cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    clusters = pytest.importorskip("ray.cluster_utils", reason="needs the ray extra")
    nodes = clusters.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 * 2**20}
    )
    with open_cluster(str(nodes.address)) as cluster:
        yield cluster
    nodes.shutdown()
