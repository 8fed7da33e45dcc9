"""Where the time of a compiled model goes, by kind of work."""

import time
from collections.abc import Callable
from typing import Any

import torch

KINDS = ("blocks", "linear layers", "attention", "norms and elementwise", "between kernels")
"""``blocks`` are the dynamic-k networks; ``between kernels`` is whatever no operator accounts for:
Python, guards, allocation, and the profiler itself."""

_GENERATED = "graph_"  # a kernel of Inductor's, named after what it fuses and what reads it
_CONTAINERS = ("Torch", "## Call", "AOTDispatcher", "Pregraph", "ProfilerStep")
_LINEAR = ("mm", "addmm", "bmm", "linear", "matmul", "mkl", "dot")
_ATTENTION = ("attention", "softmax")


def kind_of(name: str) -> str | None:
    """The kind of work that an event of the profiler is; ``None`` for one that only holds others.

    The custom operators are told apart by their names, so are PyTorch's. A kernel that Inductor
    generated fuses what is left: norms, activations, additions, copies, the embedding.
    """
    if name.startswith(_CONTAINERS):
        return None
    library, _, op = name.rpartition("::")
    if library in ("skimp", "skimp_cpu"):
        return "linear layers" if op.startswith("linear") else "blocks"
    if name.startswith(_GENERATED):
        return "attention" if "softmax" in name else "norms and elementwise"
    if any(word in op for word in _ATTENTION):
        return "attention"
    if library and any(word in op for word in _LINEAR):
        return "linear layers"
    return "norms and elementwise"


def breakdown(call: Callable[[], Any], *, seconds: float = 1.0, least: int = 3) -> dict[str, float]:
    """Seconds per call by kind of work; they add up to the time of a call under the profiler.

    Args:
        call: A compiled model, warm. Compile it with Inductor's ``cpp.enable_kernel_profile``, or
            its fused kernels count as time between kernels.
        seconds: About how long to look.
        least: At least this many calls.
    """
    total = dict.fromkeys(KINDS, 0.0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad():
        call()
        with torch.profiler.profile(activities=activities) as profile:
            start = time.perf_counter()
            calls = 0
            while calls < least or time.perf_counter() - start < seconds:
                call()
                calls += 1
            spent = time.perf_counter() - start
    for event in profile.key_averages():
        if (kind := kind_of(event.key)) is not None:
            total[kind] += event.self_cpu_time_total / 1e6
    total["between kernels"] = max(0.0, spent - sum(total.values()))
    return {kind: value / calls for kind, value in total.items()}
