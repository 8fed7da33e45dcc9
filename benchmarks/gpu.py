"""The kernels on a GPU: checked against the reference, then timed against a dense network.

The dense network is the best of eager PyTorch and ``torch.compile``, in the lines that say so with
``mode="max-autotune"``, whose search takes most of a minute a line.
Everything timed is captured in a CUDA graph and replayed in turns; medians with quartiles. Weights
are several copies in rotation, so that few rows read them from memory as in a model, not from the
cache. No speed-up is printed where outputs disagree. Scores are Bernoulli. Without a GPU only the
compiler's report is printed, for every target.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from skimp.codegen.triton import kernels as K
from skimp.codegen.triton import tuned
from skimp.codegen.triton.aot import TARGETS, compile_all
from skimp.codegen.triton.launch import run
from skimp.codegen.triton.spec import TritonSpec, choose
from skimp.codegen.triton.tune import plans, tune
from skimp.ir import dynk_ffn, reference
from skimp.ir.cost import write_atomically
from torch.nn import functional as F

SHAPES = [(384, 1536, False), (768, 3072, False), (576, 1536, True), (2048, 8192, True)]
HELPERS = 14
SHARES = (1.0, 0.7, 0.5, 0.3, 0.2)
PAPER = dict(rows=50432, d=768, d_ff=3072, e=128)
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3, "tf32": 2e-3, "tf32x3": 1e-5}
REPORTED = TritonSpec("relu", False, True, False, True, 128, 768, 3072, 768, "bfloat16")


def block(d, d_ff, e, gated, dtype, device="cuda", seed=0, bias=None, d_out=None):
    """Weights w_in, b_in, w_gate, b_gate, w_out, b_out, then expert size and activation."""
    g = torch.Generator(device).manual_seed(seed)
    bias, d_out = not gated if bias is None else bias, d_out or d

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype)

    return (
        draw(d_ff, d, scale=d**-0.5), draw(d_ff, scale=0.1) if bias else None,
        draw(d_ff, d, scale=d**-0.5) if gated else None,
        draw(d_ff, scale=0.1) if bias and gated else None,
        draw(d_ff, d_out, scale=d_ff**-0.5), draw(d_out, scale=0.1) if bias else None,
        e, "silu" if gated else "relu",
    )  # fmt: skip


def bernoulli(rows, experts, share, dtype, seed=0):
    """Scores of which a share, drawn independently, pass a threshold of one half."""
    g = torch.Generator("cuda").manual_seed(seed)
    scores = (torch.rand(rows, experts, generator=g, device="cuda") < share).to(dtype)
    scores[scores.sum(-1) == 0, 0] = 1
    return scores


def error(got, *args):
    """Relative distance from the reference in double, with the selection of the given scores."""
    want = reference(*(a.double() if isinstance(a, torch.Tensor) and i != 1 else a
                       for i, a in enumerate(args)))  # fmt: skip
    assert torch.equal(got.isnan(), want.isnan()), "NaN where the reference has none, or reverse"
    ok = want.isfinite()
    return float((got.double() - want)[ok].norm() / want[ok].norm().clamp_min(1e-30))


CASES = [  # d, d_ff, expert size, gated, bias, d_out
    (768, 3072, 128, False, True, 768), (576, 1536, 8, True, False, 576),
    (130, 330, 5, False, True, 70), (64, 192, 64, True, True, 80), (40, 96, 96, False, False, 40),
    (256, 2048, 2, True, True, 256),
]  # fmt: skip


def check(case):
    """Every plan, dtype and odd routing of a case against the reference; the worst errors."""
    worst = {}
    tau = torch.tensor(0.3, device="cuda")
    d, d_ff, e, gated, bias, d_out = case
    for name in ("float32", "bfloat16", "float16"):
        dtype = getattr(torch, name)
        w = block(d, d_ff, e, gated, dtype, bias=bias, d_out=d_out)
        for rows in (1, 3, 16, 17, 200, 4133):
            g = torch.Generator("cuda").manual_seed(rows)
            x = torch.randn(rows, d, generator=g, device="cuda").to(dtype)
            scores = torch.rand(rows, d_ff // e, generator=g, device="cuda").to(dtype)
            scores[0] = 0  # no evidence: everything runs
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
    return worst


def warm(what):
    """Compile the kernels of a line, for later processes to find."""
    d, d_ff, gated, rows, dtype, sizes, _, more = what
    for e in sizes:
        w = block(d, d_ff, e, gated, dtype)
        x = torch.randn(rows, d, device="cuda").to(dtype)
        scores = bernoulli(rows, d_ff // e, 0.5, dtype)
        spec = K._prepare(x, scores, w[:6], e, w[7], more.get("precision", "ieee"))
        for plan in more.get("ways", ()) or [choose(spec, rows)]:
            run(spec, plan, x, scores, torch.tensor(0.5, device="cuda"), *w[:6])
    torch.cuda.synchronize()


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
    from torch._dynamo.utils import counters

    counters.clear()
    torch._dynamo.reset()
    fast = torch.compile(lambda x, s, tau: F.relu(dynk_ffn(x + 1, s, tau, *w)), fullgraph=True,
                         dynamic=True)  # fmt: skip
    for rows in (20, 33, 700, 1500):
        for level in (0.2, 0.5, 0.9):
            s = torch.rand(rows, 16, device="cuda").to(x.dtype)
            args = (x[:rows] + 1, s, torch.tensor(level, device="cuda"), *w)
            got = fast(x[:rows], s, args[2])
            want = F.relu(reference(*args))
            assert (got - want).norm() <= 2e-2 * want.norm()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    done.append("torch.compile: one graph over rows and tau, no breaks")
    spec = K._prepare(*made[2][:2], w[:6], 64, "relu", "ieee")
    tune(spec, *made[2][:9], write=False, milliseconds=3)
    assert error(dynk_ffn(*made[2]), *made[2]) < 2e-2
    tuned.forget()
    done.append("first call after tuning")
    return done


def capture(call):
    """A CUDA graph of a call: ``(replay, output)``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay(call=call):  # the call holds on to inputs, whose memory the graph reads
        graph.replay()

    return replay, out


def compare(calls, seconds=0.6):
    """Median and quartiles in ms of graphs replayed in turns: name -> (median, low, high)."""
    times = {name: [] for name in calls}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for replay in calls.values():
        replay()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(next(iter(times.values()))) < 7:
        for name, replay in calls.items():
            start.record()
            replay()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    found = {}
    for name, t in times.items():
        low, median, high = statistics.quantiles(t, n=4)
        found[name] = (median, low, high)
    return found


def dense(x, w_in, b_in, w_gate, b_gate, down, b_out):
    """The network without experts, as a model holds it (``down`` [d_out, d_ff])."""
    up = F.linear(x, w_in, b_in)
    h = F.relu(up) if w_gate is None else F.silu(F.linear(x, w_gate, b_gate)) * up
    return F.linear(h, down, b_out)


def line(d, d_ff, gated, rows, dtype, sizes, shares, autotune=False, precision="ieee", ways=()):
    """Time one block at so many rows, in the default way and in others; a dict of the table."""
    name = str(dtype).removeprefix("torch.")
    bytes_each = (3 if gated else 2) * d * d_ff * dtype.itemsize
    copies = max(1, min(16, -(-160_000_000 // bytes_each))) if rows <= 256 else 1
    blocks = [block(d, d_ff, sizes[0], gated, dtype, seed=i) for i in range(copies)]
    downs = [b[4].T.contiguous() for b in blocks]
    g = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(rows, d, generator=g, device="cuda").to(dtype)
    rivals = {"eager": dense, "compile": torch.compile(dense, dynamic=False)}
    torch._dynamo.reset()
    if autotune:
        # without its own graphs, since all of these calls are captured in one
        rivals["max-autotune"] = torch.compile(
            dense, dynamic=False, mode="max-autotune-no-cudagraphs"
        )
    calls, result = {}, dict(d=d, d_ff=d_ff, gated=gated, rows=rows, dtype=name, copies=copies)
    if precision != "ieee":
        result["precision"] = precision
    want = dense(*(t.double() if t is not None else None for t in (x, *blocks[0][:4], downs[0],
                                                                      blocks[0][5])))  # fmt: skip
    limit = TOLERANCE[precision if precision != "ieee" else name]
    for rival, f in rivals.items():

        def every(f=f):
            return [f(x, *b[:4], down, b[5]) for b, down in zip(blocks, downs, strict=True)]

        calls[rival], out = capture(every)
        calls[rival]()
        found = float((out[0].double() - want).norm() / want.norm())
        assert found <= max(limit, 2e-3 if name == "float32" else 0), (rival, found)
    names = list(calls)
    for e in sizes:
        for share in shares:
            tau = torch.tensor(0.5, device="cuda")
            scores = bernoulli(rows, d_ff // e, share, dtype)
            args = [(x, scores, tau, *b[:6], e, b[7]) for b in blocks]
            spec = K._prepare(x, scores, blocks[0][:6], e, blocks[0][7], precision)
            tested = ways or [None]
            for plan in tested:
                used = plan or choose(spec, rows)

                def every(args=args, spec=spec, used=used):
                    return [run(spec, used, *a[:9]) for a in args]

                key = f"e{e} {share:.0%}" + (f" {plan}" if plan else "")
                calls[key], out = capture(every)
                calls[key]()
                found = error(out[0], *args[0])
                if not found <= limit:
                    raise AssertionError(f"{key} of {result} disagrees: {found}")
                if plan is None:
                    result.setdefault("plans", {})[f"e{e}"] = used
    times = compare(calls)
    best = min(rivals, key=lambda n: times[n][0])
    result |= dict(baseline=best)
    for key, (median, low, high) in times.items():
        result[key] = dict(
            us=median / copies * 1e3, low=low / copies * 1e3, high=high / copies * 1e3
        )
        if key not in rivals:
            result[key] |= dict(speedup=times[best][0] / median, worst=times[best][1] / high,
                                best=times[best][2] / low)  # fmt: skip
    shown = "  ".join(f"{k} {result[k]['speedup']:.2f}x" for k in times if k not in names)
    plan = ",".join(result.get("plans", {}).values())
    what = f"{d}/{d_ff}{' gated' if gated else ''} {name} {precision} rows {rows} [{plan}]"
    print(f"{what} vs {best} "
          f"{result[best]['us']:.1f} us: {shown}", flush=True)  # fmt: skip
    return result


def report(targets=TARGETS):
    """What the compiler says of each kernel."""
    table = [c.line() for target in targets for c in compile_all(REPORTED, target)]
    print(f"{'target':7} {'kernel':13} regs spills shared resident matrix")
    for r in table:
        print(f"{r['target']:7} {r['kernel']:13} {r['registers']:4} {r['spills']:6} "
              f"{r['shared']:6} {r['programs']:8} {r['matrix']}")  # fmt: skip
    return table


def save(result, path):
    """Write the results at once or not at all."""
    write_atomically(path, json.dumps(result, indent=1).encode())


def lines():
    """What is timed, what matters most first: (section, arguments of `line`, more of them)."""
    p, plan = PAPER, []
    shape = (p["d"], p["d_ff"], False, p["rows"])
    for dtype, precision, ways in (
        (torch.bfloat16, "ieee", ("lists", "pairs", "masked", "blocks")),
        (torch.float32, "ieee", ("lists", "pairs")),
        (torch.float32, "tf32x3", ("pairs",)),
        (torch.float32, "tf32", ("lists", "pairs")),
    ):
        more = dict(precision=precision, ways=ways, autotune=precision == "ieee")
        plan.append(("paper", (*shape, dtype, [p["e"]], SHARES), more))
    for batch in (1, 8, 32):
        for d, d_ff in ((2048, 8192), (4096, 14336)):
            plan.append(("decode", (d, d_ff, True, batch, torch.bfloat16, [8, 128], SHARES), {}))
    for rows in (1, 16, 2048, 4, 256, 16384):
        for d, d_ff, gated in SHAPES:
            autotune = (d == 768 and rows in (1, 16, 2048)) or (d == 2048 and rows == 2048)
            plan.append(("table", (d, d_ff, gated, rows, torch.bfloat16, [8, 128],
                                   (1.0, 0.5, 0.3, 0.2)), dict(autotune=autotune)))  # fmt: skip
    return plan


def helper(i):
    """One of several processes: compile every HELPERS-th line; the first ones also check a case."""
    if i < len(CASES):
        print(json.dumps(check(CASES[i])))
    for section, what, more in lines()[i::HELPERS]:
        del section
        warm((*what, more))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="check,paper,decode,table")
    parser.add_argument("--seconds", type=float, default=480, help="start no line after so many")
    parser.add_argument("--helper", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("No GPU here, so nothing is timed. What the compiler reports:")
        report()
        return
    torch.set_grad_enabled(False)
    if args.helper is not None:
        helper(args.helper)
        return
    begin, parts = time.monotonic(), args.only.split(",")
    result = dict(device=torch.cuda.get_device_name(), torch=torch.__version__,
                  triton=__import__("triton").__version__, scores="bernoulli")  # fmt: skip
    if "check" in parts:
        # compiling takes most of the time, and has many processors to take it on
        command = [sys.executable, "-W", "ignore", __file__, "--helper"]
        helpers = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True)
                   for i in range(HELPERS)]  # fmt: skip
        said = [h.communicate()[0] for h in helpers]
        if any(h.returncode for h in helpers):
            raise SystemExit("a check failed; nothing is timed")
        errors = [json.loads(text) for text in said[: len(CASES)]]
        result["worst_errors"] = {k: max(e.get(k, 0.0) for e in errors)
                                  for k in sorted({k for e in errors for k in e})}  # fmt: skip
        print("checked against the reference:", result["worst_errors"], flush=True)
        result["machinery"] = check_machinery()
        print("checked:", "; ".join(result["machinery"]), flush=True)
        print(f"{time.monotonic() - begin:.0f} s", flush=True)
    for section, what, more in lines():
        if section not in parts:
            continue
        if time.monotonic() - begin > args.seconds:
            result.setdefault("not_timed", []).append([section, *map(str, what[:5])])
            continue
        precise = "high" if more.get("precision") == "tf32" else "highest"
        torch.set_float32_matmul_precision(precise)  # of the dense network: what its kernels have
        try:
            result.setdefault(section, []).append(line(*what, **more))
        except AssertionError as disagreement:  # no figure without the right output
            result.setdefault("refused", []).append(str(disagreement))
            print("REFUSED:", disagreement, flush=True)
        torch.cuda.empty_cache()
        if args.out:
            save(result, args.out)
    if args.out:
        save(result, args.out)
    print(f"{time.monotonic() - begin:.0f} s; not timed: {result.get('not_timed', [])}")
    if "refused" in result:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
