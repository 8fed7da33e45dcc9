"""Run by test_triton.py in a process where Triton interprets: the op as a tracer sees it.

Kernels are traced as compiled ones are, since a tracer takes no others, and interpreted when the
traced graph runs.
"""

from unittest.mock import patch

import pytest
import torch
import triton
from skimp.codegen.triton import kernels, launch, lower  # noqa: F401
from skimp.codegen.triton.emit import emit
from skimp.codegen.triton.load import load
from skimp.ir import reference
from torch._dynamo.utils import counters
from torch._higher_order_ops.triton_kernel_wrap import KernelSideTable
from triton.backends.compiler import GPUTarget

op = torch.ops.skimp.dynk_ffn_triton
E, SIZE, D = 4, 8, 24


@pytest.fixture(autouse=True)
def traced_kernels_are_interpreted():
    interpreted, compiled, plain = {}, {}, KernelSideTable.get_kernel

    def module_of(spec):
        if spec not in interpreted:
            load.cache_clear()
            interpreted[spec] = load(emit(spec), spec.name)
            load.cache_clear()
            with triton.knobs.runtime.scope():
                triton.knobs.runtime.interpret = False
                compiled[spec] = load(emit(spec), spec.name)
        fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
        tracing = fake or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)
        return (compiled if tracing else interpreted)[spec]

    def get_kernel(self, i):
        kernel = plain(self, i)
        if torch._guards.detect_fake_mode() or not hasattr(kernel, "fn"):
            return kernel
        inner = kernel.fn if hasattr(kernel, "configs") else kernel
        found = [s for s in compiled if getattr(compiled[s], inner.__name__, None) is inner]
        return getattr(interpreted[found[0]], inner.__name__) if found else kernel

    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    with (
        patch.object(launch, "module_of", module_of),
        patch.object(KernelSideTable, "get_kernel", get_kernel),
        patch.object(triton.runtime.driver, "_active", Driver()),
    ):
        yield


def make(rows, seed=0):
    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g) * 0.3

    scores = torch.rand(rows, E, generator=g)
    return (r(rows, D), scores, torch.tensor(0.6), r(E * SIZE, D), r(E * SIZE), None, None,
            r(E * SIZE, D), r(D), SIZE, "relu")  # fmt: skip


@pytest.mark.parametrize("rows", [1, 5, 40])
def test_opcheck(rows):
    torch.library.opcheck(op.default, make(rows))


@torch.no_grad()
@pytest.mark.parametrize("plan", ["lists", "pairs", "few"])
def test_a_traced_graph_computes_the_reference(plan):
    """One graph over rows of a class and tau; around it, what Inductor would fuse."""
    torch._dynamo.reset()
    counters.clear()
    weights = make(1)[3:]
    fast = torch.compile(
        lambda x, s, tau: torch.relu(op(x + 1, s, tau, *weights)) * 2,
        backend="aot_eager", fullgraph=True, dynamic=True,
    )  # fmt: skip
    with patch.object(kernels, "choose", lambda spec, rows, deterministic: plan):
        for rows in (3, 9, 16) if plan == "few" else (33, 20, 70):
            for tau in (0.1, 0.6, 1.0):
                x, scores = make(rows, seed=rows)[:2]
                got = fast(x, scores, torch.tensor(tau))
                want = torch.relu(reference(x + 1, scores, torch.tensor(tau), *weights)) * 2
                assert torch.allclose(got, want, atol=1e-4), (rows, tau)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
