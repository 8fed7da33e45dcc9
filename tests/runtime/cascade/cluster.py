"""A Ray cluster of two nodes on loopback, for the tests of serving."""

import contextlib
import os
from unittest import mock

from skimp.runtime.cluster import connected

KEYS = {"ALICE": "key-of-alice", "BOB": "key-of-bob", "UPSTREAM": "secret-upstream"}
"""In the environment of the nodes: keys do not travel."""


@contextlib.contextmanager
def two_nodes():
    """The cluster runs, and this process is connected to it."""
    from ray.cluster_utils import Cluster

    node = dict(num_cpus=8, object_store_memory=100 * 2**20)
    with contextlib.ExitStack() as stack:
        with mock.patch.dict(os.environ, KEYS):
            head = node | {"include_dashboard": False}
            cluster = Cluster(initialize_head=True, head_node_args=head)
            stack.callback(cluster.shutdown)
            cluster.add_node(**node)
        stack.enter_context(connected(cluster.address))
        yield
