"""What the sparse form of a decoder is worth as its own drafter: right how often, for what share.

Needs a converted SmolLM2 (skimp.convert, skimp.save_pretrained) and the texts of
benchmarks/decode_replay.py. For each threshold: how often the sparse form's likeliest token is the
one that the dense form wrote, how long its step takes as a share of the dense one's (in turn), and
the most that chains of it could gain if nothing else took time.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from decode import prompts
from skimp.ir.cost import write_atomically
from skimp.ir.measure import machine
from skimp.runtime.models import load_decoder
from skimp.runtime.tree.drafting import Drafting

ROWS = (1, 2, 3, 4, 5, 7, 9)


def right(target, found, texts):
    """Share of the texts' tokens that the sparse form finds likeliest, their own text before."""
    hits = total = 0
    for name, text in texts.items():
        if len(found[name]) > 300 or len(text) < 8:
            continue
        target.prefill([found[name]])
        part = text[:60]
        chain = torch.arange(-1, len(part) - 1)
        logits, _ = target.verify([torch.tensor(part)], [chain], sparse=True)
        guesses = logits.argmax(-1).tolist()
        hits += sum(a == b for a, b in zip(guesses[:-1], part[1:], strict=True))
        total += len(part) - 1
    return hits / total, total


def step(target, rows, sparse):
    """Seconds of one pass of a chain."""
    start = time.perf_counter()
    target.verify([torch.arange(3, 3 + rows)], [torch.arange(-1, rows - 1)], sparse=sparse)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the converted model")
    parser.add_argument("texts", type=Path, help="out/decode-replay/texts-N-M.json")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode-sparse.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load_decoder(str(args.folder))
    target, _ = Drafting.parse("sparse").target(loaded.model, None)
    texts = json.loads(args.texts.read_text())
    count = int(args.texts.stem.split("-")[1])
    found = prompts(loaded.tokenizer, count)
    rows = []
    for tau in (0.0, 0.02, 0.05, 0.1, 0.2, 0.35):
        target.threshold(tau)
        share, tokens = right(target, found, texts)
        target.prefill([list(range(3, 131))])
        ratios, curve = [], {n: [] for n in ROWS}
        for _ in range(args.rounds):
            dense = step(target, 1, False)
            ratios.append(step(target, 1, True) / dense)
            for n in ROWS[1:]:
                curve[n].append(step(target, n, False) / dense)
        cost = statistics.median(ratios)
        verify = {n: statistics.median(c) for n, c in curve.items() if c}
        gain = {
            n - 1: sum(share**i for i in range(n)) / ((n - 1) * cost + verify[n]) for n in verify
        }
        best = max(gain, key=lambda n: gain[n])
        rows.append(dict(tau=tau, right=share, cost=cost, best_chain=best, most_gain=gain[best]))
        print(rows[-1], flush=True)
    result = dict(machine=machine(), load=os.getloadavg()[0], tokens=tokens, rows=rows)
    write_atomically(args.out, json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main()
