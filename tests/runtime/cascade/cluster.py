"""A Ray cluster of two nodes on loopback, for the tests of serving."""

import contextlib
import os
from unittest import mock

from raylets import two_raylets
from skimp.runtime.cluster import connected

KEYS = {"ALICE": "key-of-alice", "BOB": "key-of-bob", "UPSTREAM": "secret-upstream"}
"""In the environment of the nodes: keys do not travel."""


@contextlib.contextmanager
def two_nodes():
    """The cluster runs, and this process is connected to it."""
    with contextlib.ExitStack() as stack:
        with mock.patch.dict(os.environ, KEYS):
            cluster = stack.enter_context(two_raylets(cpus=8))
        stack.enter_context(connected(cluster.address))
        yield
