"""Blocks with random weights on a GPU, timed in CUDA graphs that are replayed in turns."""

import statistics
import time

import torch
from skimp.codegen.triton import kernels as K
from skimp.codegen.triton.launch import run
from skimp.codegen.triton.spec import choose
from skimp.ir import reference
from torch.nn import functional as F

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 3e-3, "tf32": 2e-3, "tf32x3": 1e-5}


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


def router_line(d, d_ff, e, width, rows):
    """Time a bfloat16 block with a router that kernels take over, against one of PyTorch."""
    w = block(d, d_ff, e, False, torch.bfloat16)
    g = torch.Generator("cuda").manual_seed(1)
    x, down, up = (
        (torch.randn(*shape, generator=g, device="cuda") * shape[-1] ** -0.5).to(torch.bfloat16)
        for shape in ((rows, d), (width, d), (d_ff // e, width))
    )
    scores = F.linear(torch.relu(F.linear(x, down)), up).abs()
    tau = torch.tensor(0.5, device="cuda")
    spec = K._prepare(x, scores, w[:6], e, w[7], "ieee")
    plan = choose(spec, rows)
    outputs, calls = {}, {}
    for name, routed in (
        ("PyTorch", lambda: F.linear(torch.relu(F.linear(x, down)), up).abs()),
        ("fused", lambda: (down, up)),
    ):
        calls[name], outputs[name] = capture(
            lambda routed=routed: run(spec, plan, x, routed(), tau, *w[:6])
        )
        calls[name]()
    # a sum in another order may round a score to the other side of its threshold
    rows_alike = (outputs["fused"] - outputs["PyTorch"]).float().norm(dim=-1) <= 2e-2 * (
        outputs["PyTorch"].float().norm(dim=-1)
    )
    if rows_alike.float().mean() < 0.99:
        raise AssertionError(f"{d}/{d_ff}, {rows} rows: {float(rows_alike.float().mean()):.0%}")
    times = compare(calls)
    result = dict(d=d, d_ff=d_ff, e=e, width=width, rows=rows, plan=plan)
    for name, (median, low, high) in times.items():
        result[name] = dict(us=median * 1e3, low=low * 1e3, high=high * 1e3)
    result["speedup"] = times["PyTorch"][0] / times["fused"][0]
    print(f"router of {d}/{d_ff}, {rows} rows [{plan}]: fused {result['speedup']:.2f}x", flush=True)
    return result
