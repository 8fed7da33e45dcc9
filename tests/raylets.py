"""A Ray cluster of two nodes on loopback."""

import contextlib


@contextlib.contextmanager
def two_raylets(cpus):
    """It runs, with so many CPUs a node; yields it."""
    from ray.cluster_utils import Cluster

    node = dict(num_cpus=cpus, object_store_memory=100 * 2**20)
    head = node | {"include_dashboard": False}
    try:
        cluster = Cluster(initialize_head=True, head_node_args=head)
    except Exception:  # Ray gives its processes 30 seconds, which is little on a busy machine
        cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(**node)
        yield cluster
    finally:
        cluster.shutdown()
