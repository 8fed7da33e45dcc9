"""Share out work over a Ray cluster: the same work, in other processes, with the same result.

Nothing of Ray is imported before it is asked for.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from ..ir.errors import ClusterError, first_line
from ..passes.base import Each
from ..passes.offload import return_memory

RETRIES = 3
"""How often a piece of work begins again after its worker died."""


@contextmanager
def on_ray(address: str) -> Iterator[Each]:
    """Connect to a cluster as :func:`connected` does, for what its workers can do.

    Yields:
        What :func:`skimp.convert` takes as ``each``. A worker holds one piece of work at a time,
        and computes with as many threads as this process, or sums would round differently.
    """
    with connected(address) as ray:
        yield partial(_each, ray)


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a cluster, and leave it at the end; the cluster goes on.

    Args:
        address: ``HOST:PORT`` of the head, or ``auto`` for the one that runs on this machine.

    Yields:
        The module ``ray``.

    Raises:
        ClusterError: Ray is not installed, or no cluster answers.
    """
    try:
        import ray
    except ImportError as error:
        raise ClusterError("a cluster needs Ray: pip install 'skimp[ray]'") from error
    try:
        ray.init(address=address, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster can be used at {address} ({first_line(error)}); start one with "
            "`ray start --head`, and give the address that it prints"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _each(ray: Any, work: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Results in order, with two pieces of work a processor handed out at a time."""
    _share_tensors(ray)
    remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_alone)
    shared, threads = ray.put(work), torch.get_num_threads()
    ahead = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[Any] = deque()
    try:
        for item in items:
            waiting.append(remote.remote(shared, item, threads))
            if len(waiting) >= ahead:
                yield ray.get(waiting.popleft())
        while waiting:
            yield ray.get(waiting.popleft())
    except ray.exceptions.RaySystemError as error:
        raise ClusterError(f"the cluster failed: {first_line(error)}") from error
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError) as error:
        raise ClusterError(
            f"a worker died {RETRIES + 1} times on the same layer ({first_line(error)}); give the "
            "nodes more memory, or the pass fewer tokens"
        ) from error


def _alone(work: Callable[[Any], Any], item: Any, threads: int) -> Any:
    """Do one piece of work in a worker."""
    import ray

    _share_tensors(ray)
    return_memory()
    torch.set_num_threads(threads)
    return work(item)


def _share_tensors(ray: Any) -> None:
    """Let what this process sends hold the bytes of tensors once, where others can read them.

    PyTorch's own pickles hold them in the pickle: who reads or writes one needs room for both.
    """
    ray.util.register_serializer(
        torch.storage.TypedStorage, serializer=_bytes_of, deserializer=_storage_of
    )


def _bytes_of(storage: Any) -> tuple[Any, ...]:
    """A tensor's memory as an array that Ray takes as it is; on a GPU, as PyTorch pickles it."""
    if storage.device.type != "cpu":
        return tuple(storage.__reduce__())
    own = torch.empty(0, dtype=torch.uint8).set_(storage.untyped())
    return own.numpy(), storage.dtype


def _storage_of(told: tuple[Any, ...]) -> Any:
    """Memory of its own, since the shared one cannot be written.

    PyTorch's, not NumPy's: it begins on a cache line; from elsewhere sums round differently.
    """
    what, how = told
    if callable(what):
        return what(*how)
    own = torch.empty(what.nbytes, dtype=torch.uint8)
    own.numpy()[:] = what
    return torch.storage.TypedStorage(wrap_storage=own.untyped_storage(), dtype=how, _internal=True)
