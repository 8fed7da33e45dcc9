"""In which precision to train."""

from functools import cache

import torch

from ..ir.measure import compare


def bfloat16_pays(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 much faster, as GPUs and CPUs with AMX do."""
    return device.type != "cpu" or _measured()


@cache
def _measured() -> bool:
    a = torch.randn(512, 1024)
    b = a.bfloat16()
    timed = compare({"wide": lambda: a @ a.T, "narrow": lambda: b @ b.T}, "narrow", seconds=0.05)
    return timed.speedup["wide"].median > 1.5


def mixed_precision(device: torch.device, pays: bool | None = None) -> torch.autocast:
    """Train in bfloat16 where that pays; weights, gradients and optimisers stay float32.

    It rounds a weight each time it is used: to keep what it rounded would take half of a model.

    Args:
        device: Where the tensors are.
        pays: What :func:`bfloat16_pays` says; by default it is asked here.
    """
    enabled = bfloat16_pays(device) if pays is None else pays
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)
