"""Where the tensors of a conversion lie: in memory, or in files that are mapped into it.

What is mapped and shared is the kernel's to write back and to drop, so a model need not fit into
memory, only what is computed with at the time. The files have no names: one takes disk until its
tensor is freed or the process ends, however it ends, and nothing is left.
"""

import copy
import ctypes
import errno
import gc
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..ir.cost import DRAFT
from ..ir.errors import unwritable

T = TypeVar("T")
_LEAST = 4096
"""Bytes; a smaller tensor would take a page of its own, and stays in memory."""
_MMAP_THRESHOLD = -3
"""From ``malloc.h``: allocations of so many bytes go back to the system when they are freed."""


class Offload:
    """A folder for tensors, or memory if there is none; they have the same bits in both.

    Only tensors of the CPU go to files.

    Args:
        folder: On a disk (a tmpfs is memory); made if need be.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    def copy(self, module: T) -> T:
        """A deep copy whose parameters and buffers lie in files.

        Raises:
            UnwritableError: The folder cannot be written, or its disk is full.
        """
        memo: dict[int, Any] = {}
        if self.folder is not None:
            return_memory()  # graphs hold themselves in cycles, and files with them
            assert isinstance(module, nn.Module)
            for t in (*module.parameters(), *module.buffers()):
                if self._wanted(t):
                    own = self._like(t).copy_(t.detach())
                    learns = isinstance(t, nn.Parameter)
                    memo[id(t)] = nn.Parameter(own, t.requires_grad) if learns else own
        return copy.deepcopy(module, memo)

    def move(self, value: T) -> T:
        """Put into files what is not there yet.

        Args:
            value: A tensor, which stays as it is; a module or an optimiser, whose tensors are
                moved; or a tuple or list of these. Anything else is returned as it is.

        Raises:
            UnwritableError: The folder cannot be written, or its disk is full.
        """
        moved: Any = value
        if self.folder is None:
            return value
        if isinstance(value, Tensor):
            if self._wanted(value) and value.untyped_storage().filename is None:
                moved = self._like(value).copy_(value.detach())
        elif isinstance(value, nn.Module):
            for t in (*value.parameters(), *value.buffers()):
                t.data = self.move(t.data)
        elif isinstance(value, torch.optim.Optimizer):
            for state in value.state.values():
                state.update({k: self.move(v) for k, v in state.items()})
        elif isinstance(value, tuple | list):
            moved = type(value)(map(self.move, value))
        return moved  # type: ignore[no-any-return]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """What ``torch.cat`` gives of these, which agree in all but the first dimension."""
        if self.folder is None or not self._wanted(parts[0]):
            return torch.cat(list(parts))
        first = parts[0]
        whole = self._like(first, (sum(map(len, parts)), *first.shape[1:]))
        done = 0
        for part in parts:
            whole[done : done + len(part)] = part
            done += len(part)
        return whole

    def each(
        self, each: Callable[..., Iterable[Any]], work: Callable[[Any], Any], items: Iterable[Any]
    ) -> Iterator[Any]:
        """What an :class:`.Each` gives, moved as it comes."""
        if self.folder is None:
            yield from each(work, items)
            return
        return_memory()
        gc.freeze()  # or each layer's turn would end with a look at all objects of the process
        try:
            for result in each(work, items):
                yield self.move(result)
                return_memory()
        finally:
            gc.unfreeze()

    @contextmanager
    def training(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Keep what Adam needs of a whole model in files: gradients, moments, and activations.

        A gradient is in memory until its tensor's is complete, an activation until it was used.

        Args:
            optimizer: An Adam or AdamW that has not stepped; its parameters require gradients.
        """
        if self.folder is None:
            yield
            return
        gradients: dict[int, Tensor] = {}
        handles = []

        def keep(p: Tensor) -> None:
            assert p.grad is not None
            p.grad = gradients[id(p)].copy_(p.grad)

        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if not self._wanted(p):
                continue
            begin_adam(optimizer, p, self._like)
            gradients[id(p)] = self._like(p)
            handles.append(p.register_post_accumulate_grad_hook(keep))
        # detached: what an operation gave would else hold itself
        saved = torch.autograd.graph.saved_tensors_hooks(
            lambda t: self.move(t.detach()), lambda t: t
        )
        try:
            with saved:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _wanted(self, t: Tensor) -> bool:
        return t.device.type == "cpu" and t.nbytes >= _LEAST

    def _like(self, t: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """Zeros in a file of their own, of the strides that a copy of ``t`` has in memory."""
        assert self.folder is not None
        form = torch.empty_like(t, device="meta")
        if shape is not None:
            form = form.new_empty(tuple(shape))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = _nameless(self.folder)
            try:
                # where there is no room it is an error here, later it would be a signal
                os.posix_fallocate(handle, 0, form.nbytes)
                name = f"/proc/self/fd/{handle}"
                own = torch.from_file(name, shared=True, size=form.numel(), dtype=t.dtype)
            finally:
                os.close(handle)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return own.as_strided(form.shape, form.stride())


def begin_adam(
    optimizer: torch.optim.Optimizer,
    p: Tensor,
    zeros: Callable[[Tensor], Tensor] = torch.zeros_like,
) -> dict[str, Tensor]:
    """What an Adam knows of a parameter before its first step, as it would begin itself.

    It does so of all parameters at once, and in memory.
    """
    moments = {name: zeros(p) for name in ("exp_avg", "exp_avg_sq")}
    begun = {"step": torch.zeros((), device=p.device), **moments}
    optimizer.state[p] = begun
    return begun


def _nameless(folder: Path) -> int:
    """Open a new file without a name, which nobody has to remove."""
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    # as on NFS: for a moment it has one
    handle, name = tempfile.mkstemp(prefix=DRAFT, dir=folder)
    os.unlink(name)
    return handle


def return_memory() -> None:
    """Hold nothing of what came before, and give back what is freed from now on at once.

    Optimisers and graphs hold themselves in cycles. The C library keeps freed memory for later
    allocations, and learns to do so with ever larger ones, among which a layer's weights then lie.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 2**20)
        libc.malloc_trim(0)
