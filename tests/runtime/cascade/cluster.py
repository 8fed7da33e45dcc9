"""A Ray cluster of two nodes on loopback, for the tests of serving."""

import contextlib
import os
import socket
from types import SimpleNamespace
from unittest import mock

from skimp.runtime.cluster import connected

KEYS = {"ALICE": "key-of-alice", "BOB": "key-of-bob", "UPSTREAM": "secret-upstream"}
"""In the environment of the nodes: keys do not travel."""


@contextlib.contextmanager
def two_nodes():
    """The cluster, with this process connected, and the port that it is to serve at."""
    from ray.cluster_utils import Cluster

    node = dict(num_cpus=8, object_store_memory=100 * 2**20)
    with mock.patch.dict(os.environ, KEYS):
        cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        with mock.patch.dict(os.environ, KEYS):
            cluster.add_node(**node)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with connected(cluster.address) as ray:
            yield SimpleNamespace(ray=ray, address=cluster.address, port=port)
    finally:
        cluster.shutdown()
