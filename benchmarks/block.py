"""One block against a dense feed-forward network at its best: eager or torch.compile.

Ratios of interleaved runs, medians with quartiles; refused if outputs disagree. Scores are
Bernoulli, or real ones of a converted model (`--scores out/model`), rescaled to the same share.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from skimp.codegen.cpp.kernels import ops
from skimp.ir import reference
from skimp.ir.measure import agree, compare, machine
from torch.nn import functional as F

SHAPES = [(384, 1536, False), (768, 3072, False), (576, 1536, True), (2048, 8192, True)]
ROWS = (1, 4, 16, 256, 2048)
SHARES = (1.0, 0.5, 0.3, 0.2)


def peak_flops(dtype, n=2048):
    """FLOPs per second of a square product, the best of several."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def bandwidth(megabytes=512):
    """Bytes per second of reading memory, the best of several."""
    x = torch.ones(megabytes << 18)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        x.sum()
        times.append(time.perf_counter() - start)
    return x.numel() * 4 / min(times)


def bernoulli(rows, experts, share, generator):
    """Scores of which a share, drawn independently, pass a threshold of one half."""
    scores = (torch.rand(rows, experts, generator=generator) < share).float()
    scores[scores.sum(-1) == 0, 0] = 1
    return scores


def realistic(folder, rows, experts, share):
    """Scores of a converted encoder on real text, thresholded at the same share."""
    from skimp.passes.base import capture
    from skimp.passes.data import batches, embedded_text
    from skimp.passes.lift import blocks
    from skimp.runtime.models import load_pretrained
    from skimp.runtime.store import load

    if not hasattr(realistic, "scores"):
        loaded = load_pretrained()
        gm = load(folder, loaded.model)
        x = capture(gm, batches(loaded.tokenizer, embedded_text()[:200]), 2048)
        name, block = list(blocks(gm).items())[2]
        realistic.scores = block.router(x[name][:2048])
    s = realistic.scores
    s = s.repeat(1, -(-experts // s.shape[1]))[:rows, :experts]
    s = s / s.amax(-1, keepdim=True)
    return (s >= torch.quantile(s.flatten()[: 2**24], 1 - share)).float()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scores", type=Path, help="a converted model")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--expert-size", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="per shape and row count")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    dtype, e = getattr(torch, args.dtype), args.expert_size
    g = torch.Generator().manual_seed(0)
    peak, reading = peak_flops(dtype), bandwidth()
    kernel = ops().dynk_ffn.default  # what a compiled graph calls
    table = []
    for d, d_ff, gated in SHAPES[:1] if args.quick else SHAPES:

        def weight(*shape):
            return (torch.randn(*shape, generator=g) / shape[-1] ** 0.5).to(dtype)

        act = "silu" if gated else "relu"
        w_in, w_out = weight(d_ff, d), weight(d_ff, d)
        b_in, b_out = (None, None) if gated else (weight(d_ff), weight(d))
        w_gate = weight(d_ff, d) if gated else None
        down = w_out.T.contiguous()

        def dense(x, w_in=w_in, w_gate=w_gate, down=down, b_in=b_in, b_out=b_out):
            up = F.linear(x, w_in, b_in)
            h = F.relu(up) if w_gate is None else F.silu(F.linear(x, w_gate)) * up
            return F.linear(h, down, b_out)

        for rows in ROWS[:4] if args.quick else ROWS:
            torch._dynamo.reset()
            x = torch.randn(rows, d, generator=g).to(dtype)
            compiled = torch.compile(dense, dynamic=False)
            calls = {"eager": lambda: dense(x), "compile": lambda: compiled(x)}  # noqa: B023
            if not args.quick and d < 2048:
                frozen = torch.compile(dense, dynamic=False, mode="max-autotune")
                calls["max-autotune"] = lambda: frozen(x)  # noqa: B023
            for share in SHARES:
                scores = (
                    realistic(args.scores, rows, d_ff // e, share)
                    if args.scores
                    else bernoulli(rows, d_ff // e, share, g)
                ).to(dtype)
                a = (x, scores, torch.tensor(0.5), w_in, b_in, w_gate, None, w_out, b_out, e, act)
                tolerance = 1e-4 if dtype == torch.float32 else 3e-2
                agree(kernel(*a), reference(*a), f"{d}/{d_ff} at {rows} rows", tolerance)
                calls[f"{share:.0%}"] = lambda a=a: kernel(*a)
            agree(compiled(x), dense(x), "torch.compile", 1e-4 if dtype == torch.float32 else 3e-2)
            timed = compare(
                calls, "100%", seconds=1.0 if args.quick else args.seconds, least=5, most=60
            )
            rivals = [n for n in calls if not n.endswith("%")]
            best = min(rivals, key=lambda n: timed.timings[n].median)
            line = {"d": d, "d_ff": d_ff, "gated": gated, "rows": rows, "baseline": best}
            base = timed.timings[best]
            for share in SHARES:
                t = timed.timings[f"{share:.0%}"]
                flops = share * 2 * rows * d_ff * d * (3 if gated else 2)
                read = min(1.0, 1 - (1 - share) ** rows) * d_ff * d * (3 if gated else 2)
                bound = max(flops / peak, read * x.element_size() / reading)
                line[f"{share:.0%}"] = {
                    "speedup": base.median / t.median,
                    "low": base.low / t.high,
                    "high": base.high / t.low,
                    "roofline": bound / t.median,
                }
            table.append(line)
            if not args.json:
                cells = "  ".join(
                    f"{s:.0%}: {line[f'{s:.0%}']['speedup']:5.2f}x "
                    f"[{line[f'{s:.0%}']['roofline']:4.0%}]"
                    for s in SHARES
                )
                print(f"{d}/{d_ff} {act} rows {rows:4} vs {best:12} {cells}", flush=True)
    result = {
        "dtype": args.dtype,
        "expert_size": e,
        "scores": "of a router" if args.scores else "bernoulli",
        "machine": machine(),
        "peak_flops": peak,
        "bandwidth": reading,
        "table": table,
    }
    out = args.out or Path(f"benchmarks/results/block-{args.dtype}.json")
    if not args.quick or args.out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
