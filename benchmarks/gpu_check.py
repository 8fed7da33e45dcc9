"""Every kernel on a GPU against the reference, and what surrounds the kernels."""

import os

import torch
from gpu_timing import TOLERANCE, bernoulli, block, capture, error
from skimp.codegen.triton import kernels as K
from skimp.codegen.triton import tuned
from skimp.codegen.triton.launch import run
from skimp.codegen.triton.spec import TritonSpec, scores_fit
from skimp.codegen.triton.tune import plans, tune
from skimp.ir import dynk_ffn, reference
from skimp.ir.op import SCORED
from skimp.runtime.backend import skimp
from torch.nn import functional as F

CASES = [  # d, d_ff, expert size, gated, bias, d_out
    (768, 3072, 128, False, True, 768), (576, 1536, 8, True, False, 576),
    (130, 330, 5, False, True, 70), (64, 192, 64, True, True, 80), (40, 96, 96, False, False, 40),
    (256, 2048, 2, True, True, 256), (576, 1536, 1, False, True, 70),
]  # fmt: skip


def check(case):
    """Every plan, dtype and odd routing of a case against the reference; the worst errors."""
    worst = {}
    tau = torch.tensor(0.3, device="cuda")
    d, d_ff, e, gated, bias, d_out = case
    for name in ("float32", "bfloat16", "float16"):
        dtype = getattr(torch, name)
        w = block(d, d_ff, e, gated, dtype, bias=bias, d_out=d_out)
        w = (*w[:-1], SCORED if e == 1 else w[-1])
        for rows in (1, 3, 16, 17, 200, 4133):
            g = torch.Generator("cuda").manual_seed(rows)
            x = torch.randn(rows, d, generator=g, device="cuda").to(dtype)
            scores = torch.rand(rows, d_ff // e, generator=g, device="cuda").to(dtype)
            if e == 1:
                scores = 2 * scores - 1
            scores[0] = 0  # no evidence: everything runs, or, weighted by it, nothing
            if rows > 16:
                scores[1] = float("nan")
                scores[2:40] = 0
                scores[2:40, -1] = 1  # all to one
            args = (x, scores, tau, *w)
            spec = K._prepare(x, scores, w[:6], e, w[-1], "ieee")
            assert isinstance(spec, TritonSpec), spec
            for plan in plans(spec, rows):
                torch.full((1 << 24,), float("nan"), device="cuda")  # what buffers will be made of
                found = error(run(spec, plan, *args[:9]), *args)
                key = f"{plan} {name}"
                worst[key] = max(worst.get(key, 0.0), found)
                assert found <= TOLERANCE[name], (case, name, rows, plan, found)
                if scores_fit(spec, plan, 64):
                    check_router(spec, plan, x, args, name)
    return worst


def check_router(spec, plan, x, args, name):
    """A router that a kernel takes over, at tau = 0 (all run) and 0.3 (a row in 50 may differ)."""
    g = torch.Generator("cuda").manual_seed(2)
    down, up = (
        (torch.randn(*shape, generator=g, device="cuda") * shape[-1] ** -0.5).to(x.dtype)
        for shape in ((64, spec.d), (spec.experts, 64))
    )
    scores = F.linear(torch.relu(F.linear(x, down)), up).abs()
    for level in (0.0, 0.3):
        tau = torch.tensor(level, device="cuda")
        got = run(spec, plan, x, (down, up), tau, *args[3:9]).double()
        want = reference(x, scores, tau, *args[3:]).double()
        apart = (got - want).norm(dim=-1) > 10 * TOLERANCE[name] * want.norm(dim=-1)
        assert apart.double().mean() <= (0.02 if level else 0), (spec.name, plan, level)


def check_machinery():
    """No synchronisation, CUDA graphs, opcheck, one graph, gradients, the first call after tuning.

    Returns the names of what was checked.
    """
    done = []
    tau = torch.tensor(0.5, device="cuda")
    w = block(256, 1024, 64, False, torch.bfloat16)
    big = block(256, 4096, 64, False, torch.bfloat16)
    x = torch.randn(2048, 256, device="cuda", dtype=torch.bfloat16)
    cases = [(x[:1], w), (x[:9], w), (x[:700], w), (x, big)]
    made = [(a, bernoulli(len(a), v[0].shape[0] // 64, 0.5, torch.bfloat16), tau, *v)
            for a, v in cases]  # fmt: skip
    for args in made:
        dynk_ffn(*args)
    torch.cuda.set_sync_debug_mode("error")
    for args in made:
        dynk_ffn(*args)
    torch.cuda.set_sync_debug_mode("default")
    done.append("no synchronisation")
    for args in made:
        replay, out = capture(lambda args=args: dynk_ffn(*args))
        args[0].copy_(torch.randn_like(args[0]))
        args[1].copy_(bernoulli(*args[1].shape, 0.3, torch.bfloat16, seed=7))
        replay()
        assert error(out, *args) < 2e-2
    done.append("CUDA graphs, new inputs and routing in replay")
    torch.use_deterministic_algorithms(True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for args in made:
        assert torch.equal(dynk_ffn(*args), dynk_ffn(*args))
        assert error(dynk_ffn(*args), *args) < 2e-2
    torch.use_deterministic_algorithms(False)
    done.append("deterministic algorithms: equal bits")
    torch.library.opcheck(torch.ops.skimp.dynk_ffn.default, made[1])
    with torch.enable_grad():
        live = [None if t is None else t.detach().float().requires_grad_(i != 1)
                for i, t in enumerate((*made[2][:2], *made[2][3:9]))]  # fmt: skip
        both = []
        for f in (dynk_ffn, reference):
            y = f(live[0], live[1], tau, *live[2:], *w[6:])
            given = [t for i, t in enumerate(live) if t is not None and i != 1]
            both.append(torch.autograd.grad(y.square().sum(), given))
        for a, b in zip(*both, strict=True):
            assert (a - b).norm() <= 1e-4 * b.norm(), float((a - b).norm() / b.norm())
    done.append("opcheck and gradients")
    check_compiled(w, big)
    done.append("torch.compile: one graph over rows of a class and tau, no breaks, no opaque op")
    spec = K._prepare(*made[2][:2], w[:6], 64, "relu", "ieee")
    tune(spec, *made[2][:9], write=False, milliseconds=3)
    assert error(dynk_ffn(*made[2]), *made[2]) < 2e-2
    tuned.forget()
    done.append("first call after tuning")
    return done


def check_compiled(w, big):
    """The lowering: rows of each class share one graph, in which no opaque call is left."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import run_and_get_code

    for rows_of_class, weights in (((2, 9, 16), w), ((20, 33, 700, 1500), w), ((700, 2000), big)):
        counters.clear()
        torch._dynamo.reset()
        experts = weights[0].shape[0] // 64

        def both(x, s, tau, weights=weights):
            return F.relu(dynk_ffn(x + 1, s, tau, *weights))

        fast = torch.compile(both, fullgraph=True, dynamic=True, backend=skimp)
        for rows in rows_of_class:
            for level in (0.2, 0.5, 0.9):
                x = torch.randn(rows, 256, device="cuda", dtype=torch.bfloat16)
                s = torch.rand(rows, experts, device="cuda").to(x.dtype)
                tau = torch.tensor(level, device="cuda")
                got, codes = run_and_get_code(fast, x, s, tau)
                want = F.relu(reference(x + 1, s, tau, *weights))
                assert (got - want).norm() <= 2e-2 * want.norm(), (rows, level)
                assert not any("ops.skimp.dynk_ffn" in code for code in codes)
        assert counters["stats"]["unique_graphs"] == 1, rows_of_class
        assert not counters["graph_break"]
    torch._dynamo.reset()
    x = torch.randn(700, 256, device="cuda")
    s = torch.rand(700, 16, device="cuda")
    tau = torch.tensor(0.5, device="cuda")
    live = [None if t is None else t.float().requires_grad_() for t in w[:6]]
    given = [t for t in live if t is not None]

    def loss(f, *weights):
        return f(x, s, tau, *weights, *w[6:]).square().sum()

    with torch.enable_grad():
        compiled = torch.compile(lambda *v: loss(dynk_ffn, *v), fullgraph=True, backend=skimp)
        got = torch.autograd.grad(compiled(*live), given)
        want = torch.autograd.grad(loss(reference, *live), given)
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm(), float((a - b).norm() / b.norm())
