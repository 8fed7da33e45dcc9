"""A Ray cluster of two nodes on loopback."""

import contextlib


@contextlib.contextmanager
def two_raylets(cpus):
    """It runs, with so many CPUs a node; yields it."""
    from ray.cluster_utils import Cluster

    node = dict(num_cpus=cpus, object_store_memory=100 * 2**20)
    cluster = Cluster()
    try:
        _add(cluster, **node, include_dashboard=False)
        _add(cluster, **node)
        yield cluster
    finally:
        cluster.shutdown()


def _add(cluster, tries=3, **node):
    """Start a node; Ray gives it 30 seconds, which is little on a busy machine."""
    for left in reversed(range(tries)):
        try:
            return cluster.add_node(**node)
        except Exception:  # of no class of its own
            if not left:
                raise
