"""Balanced k-means on neurons: how long it takes on points that are easy and that are not.

Points are random directions (`random`), what neurons of rank 64 with biases fire (`fired`), and
the same with three neurons of four dead (`dead`).
"""

import argparse
import json
import time
from pathlib import Path

import torch
from skimp.passes.split import balanced_kmeans

# neurons, numbers per neuron, experts. 512 does not divide 11008; 688 is the next that does.
SHAPES = [(1536, 384, 64), (1536, 4096, 192), (8192, 2048, 1024), (11008, 4096, 688)]


def points(kind, n, m, generator):
    if kind == "random":
        return torch.randn(n, m, generator=generator)
    w = torch.randn(n, 64, generator=generator)
    pre = w @ torch.randn(64, m, generator=generator) - 8 * torch.rand(n, 1, generator=generator)
    h = torch.relu(pre)
    if kind == "dead":
        h[torch.randperm(n, generator=generator)[: 3 * n // 4]] = 0
    return h


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/split.json"))
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n, m, experts in SHAPES[:2] if args.quick else SHAPES:
        for kind in ("random", "fired", "dead"):
            x = points(kind, n, m, generator)
            times = []
            for seed in range(3):
                start = time.perf_counter()
                balanced_kmeans(x, experts, seed=seed)
                times.append(time.perf_counter() - start)
            line = dict(neurons=n, numbers=m, experts=experts, points=kind)
            line |= dict(seconds=sorted(times)[1], least=min(times), most=max(times))
            rows.append(line)
            if not args.json:
                print(
                    f"{n:6} x {m:5} into {experts:5}, {kind:6}: {line['seconds']:7.3f} s "
                    f"({line['least']:.3f}-{line['most']:.3f})",
                    flush=True,
                )
    result = {"threads": torch.get_num_threads(), "torch": torch.__version__, "rows": rows}
    if not args.quick:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1))
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
