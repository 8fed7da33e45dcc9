"""Memory in huge pages, where Linux gives them on request.

Weights are read from end to end in every step. With pages of 4 kB the processor looks up an address
for each, in a virtual machine twice over, which takes a fifth of the bandwidth.
"""

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE = 2 << 20
_SLAB = 64 << 20
_LINE = 64


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Like ``torch.empty``, but in huge pages if it fills some."""
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(*shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them gives ordinary pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)


class Pages:
    """Holds copies of tensors, small ones side by side, so that they share huge pages."""

    def __init__(self) -> None:
        self._slab = torch.empty(0, dtype=torch.uint8)

    def hold(self, tensor: Tensor) -> Tensor:
        """A copy, flat; it lives as long as it is referred to."""
        flat = tensor.contiguous().flatten()
        size = flat.numel() * flat.itemsize
        taken = -(-size // _LINE) * _LINE
        if taken > len(self._slab):
            self._slab = empty([max(_SLAB, taken)], torch.uint8)
        part, self._slab = self._slab[:size], self._slab[taken:]
        held = part.view(flat.dtype)
        held.copy_(flat)
        return held
