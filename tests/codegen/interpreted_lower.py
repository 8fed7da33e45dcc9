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
routed_op = torch.ops.skimp.routed_ffn_triton
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


def make_scored(rows, seed=0):
    x, scores, tau, w_in, *others = make(rows, seed)
    scores = torch.randn(rows, E * SIZE, generator=torch.Generator().manual_seed(seed))
    return (x, scores, tau, w_in, *others[:-2], 1, "scored")


def forced(plan):
    return patch.object(kernels, "choose", lambda spec, rows, deterministic: plan)


def make_routed(rows, seed=0):
    x, _, *others = make(rows, seed)
    g = torch.Generator().manual_seed(1)
    return x, torch.randn(6, D, generator=g), torch.randn(E, 6, generator=g), *others


def scores_of(x, down, up):
    return torch.relu(x @ down.T).matmul(up.T).abs()


def strided(t):
    """The same numbers, not contiguous."""
    return torch.stack([t, t + 1], -1)[..., 0]


PLANS = [(5, "few"), (40, "masked"), (40, "lists"), (40, "pairs")]


@pytest.mark.parametrize(
    ("rows", "plan", "layout"),
    [*((*p, torch.clone) for p in PLANS), (1, "few", strided), (40, "lists", strided)],
)
def test_opcheck(rows, plan, layout):
    with forced(plan):
        for checked, args in ((op, make(rows)), (routed_op, make_routed(rows))):
            args = [layout(t) if isinstance(t, torch.Tensor) and t.dim() else t for t in args]
            torch.library.opcheck(checked.default, args)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 9, 40])
def test_a_gate_as_the_router(rows):
    torch._dynamo.reset()
    fast = torch.compile(lambda *a: op(*a) * 2, backend="aot_eager", fullgraph=True)
    args = make_scored(rows)
    assert torch.allclose(fast(*args), reference(*args) * 2, atol=1e-4)
    if rows <= 16:
        torch.library.opcheck(op.default, args)


@torch.no_grad()
@pytest.mark.parametrize("plan", ["lists", "pairs", "few"])
@pytest.mark.parametrize("routed", [False, True])
def test_a_traced_graph_computes_the_reference(plan, routed):
    """One graph over rows of a class and tau; around it, what Inductor would fuse."""
    torch._dynamo.reset()
    counters.clear()
    weights, router = make(1)[3:], make_routed(1)[1:3]

    def block(x, s, tau):
        if routed:
            return torch.relu(routed_op(x + 1, *router, tau, *weights)) * 2
        return torch.relu(op(x + 1, s, tau, *weights)) * 2

    fast = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    with forced(plan):
        for rows in (3, 9, 16) if plan == "few" else (33, 20, 70):
            for tau in (0.1, 0.6, 1.0):
                x, scores = make(rows, seed=rows)[:2]
                got = fast(x, scores, torch.tensor(tau))
                scores = scores_of(x + 1, *router) if routed else scores
                want = torch.relu(reference(x + 1, scores, torch.tensor(tau), *weights)) * 2
                assert torch.allclose(got, want, atol=1e-4), (rows, tau)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
