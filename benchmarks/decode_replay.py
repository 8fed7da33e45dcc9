"""How well trees are sized, apart from this machine's moods: known texts, and one measured curve.

SmolLM2 writes its greedy text for the prompts of benchmarks/decode.py once. Policies then decode it
again without the model: the real drafter proposes, the known text says what is accepted, and a step
takes what the curve says. So policies are compared on equal terms, to the last digit, and the best
fixed tree in hindsight can be looked for among many. It says nothing of how fast a machine is.
"""

import argparse
import itertools
import json
import os
import time
from pathlib import Path

import torch
from decode import FAMILIES, prompts
from decode_report import family
from skimp.ir.cost import write_atomically
from skimp.ir.measure import machine
from skimp.runtime.models import DECODER, load_decoder
from skimp.runtime.tree.costs import GRID
from skimp.runtime.tree.engine import Engine
from skimp.runtime.tree.fused import FusedTarget
from skimp.runtime.tree.ngram import NGram
from skimp.runtime.tree.policy import CostPolicy
from skimp.runtime.tree.published import CastPolicy, FixedPolicy

FIXED = [(n, d) for n in (2, 3, 4, 5, 6, 7, 9, 11, 13, 17, 25, 33) for d in (1, 2, 4, 8) if d < n]


class Flat:
    """Prices for writing the texts: drafting nothing, nothing is asked of them."""

    spent = 0.0

    def prepare(self, target, lengths):
        """Nothing."""

    def at(self, batch, context):
        """Itself."""
        return self

    def __call__(self, rows):
        """The same for all."""
        return 1.0

    def observe(self, rows, seconds):
        """Nothing."""

    def store(self):
        """Nothing."""


def write(target, found, tokens, stop):
    """Greedy texts, eight at a time."""
    engine, texts, names = Engine(target, [], CostPolicy([], None), Flat()), {}, list(found)
    for i in range(0, len(names), 8):
        part = names[i : i + 8]
        got = engine.run([found[n] for n in part], limits=[tokens] * len(part), stop=stop)
        texts |= dict(zip(part, got, strict=True))
        print(f"{len(texts)} of {len(names)} texts", flush=True)
    return texts


def measure(target, seconds, rounds):
    """Seconds by rows at a short context: the fastest of some rounds, since others only slow."""
    target.prefill([list(range(3, 131))])
    curve = {1 + n: [] for n in GRID}
    end = time.monotonic() + seconds
    for i in range(rounds):
        for rows in curve:
            start = time.perf_counter()
            target.verify([torch.arange(rows)], [torch.arange(-1, rows - 1)])
            curve[rows].append(time.perf_counter() - start)
        if i > 2 and time.monotonic() > end:
            break
    return {rows: min(taken) for rows, taken in curve.items()}


def between(points):
    """A curve through measured points."""
    known = sorted(points.items())

    def curve(rows):
        for (a, x), (b, y) in itertools.pairwise(known):
            if rows <= b:
                return x + (y - x) * max(rows - a, 0) / (b - a)
        (a, x), (b, y) = known[-2:]
        return y + (y - x) * (rows - b) / (b - a)

    return curve


def replay(policy, drafter, curve, prompt, text):
    """Decode a known text; returns seconds by the curve, tokens, steps."""
    drafter.begin([prompt], torch.empty(0))
    policy.begin(1)
    at, seconds, steps = 0, 0.0, 0
    while at < len(text) - 1:
        start = time.process_time()
        drafts = policy.draft([text[at]], [len(text) - at - 2])
        nodes = policy.select(drafts)[0]
        tree, path = drafts[0].tree, [0]
        while (child := tree.children[path[-1]].get(text[at + len(path)])) in nodes:
            path.append(child)
            if at + len(path) >= len(text):
                break
        taken = curve(len(nodes))
        drafter.commit([tree], [path], [torch.empty(0)])
        policy.learn(drafts, [text[at + 1 : at + 1 + len(path)]], taken)
        seconds += taken + time.process_time() - start
        at, steps = at + len(path), steps + 1
    return seconds, at, steps


def compare(found, texts, curve):
    """Tokens per second by policy, in all and by family."""
    makers = {"plain": lambda d: CostPolicy([], curve), "tree": lambda d: CostPolicy([d], curve)}
    makers["EAGLE-2"] = lambda d: FixedPolicy([d], curve)
    makers["CAST"] = lambda d: CastPolicy([d], curve)
    for n, depth in FIXED:
        makers[f"fixed {n} by {depth}"] = lambda d, n=n, depth=depth: FixedPolicy(
            [d], curve, size=n, depth=depth
        )
    result = {}
    for name, make in makers.items():
        drafter = NGram()
        policy, by = make(drafter), {f: [0.0, 0, 0] for f in FAMILIES}
        for prompt, text in texts.items():
            if len(text) > 1:
                got = replay(policy, drafter, curve, found[prompt], text)
                sums = by[family(prompt)]
                by[family(prompt)] = [a + b for a, b in zip(sums, got, strict=True)]
        total = [sum(x) for x in zip(*by.values(), strict=True)]
        result[name] = dict(
            rate=total[1] / total[0],
            tokens_per_step=total[1] / total[2],
            families={f: t / s for f, (s, t, _) in by.items() if s},
        )
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=10, help="of each family")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("out/decode-replay"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode-replay.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load_decoder(DECODER)
    target = FusedTarget(loaded.model)
    found = prompts(loaded.tokenizer, args.prompts)
    stop = frozenset([loaded.model.generation_config.eos_token_id])
    path = args.folder / f"texts-{args.prompts}-{args.tokens}.json"
    if not path.exists():
        texts = write(target, found, args.tokens, stop)
        write_atomically(path, json.dumps(texts).encode())
    texts = json.loads(path.read_text())
    points = measure(target, 40.0, 60)
    rates = compare(found, texts, between(points))
    fixed = {n: r["rate"] for n, r in rates.items() if n.startswith("fixed")}
    best = max(fixed, key=lambda n: fixed[n])
    ours = rates["tree"]
    result = dict(
        machine=machine(), load=os.getloadavg()[0], prompts=len(texts), tokens=args.tokens,
        curve_ms={n: 1000 * t for n, t in points.items()}, rates=rates, best_fixed=best,
        tree_over={
            "plain": ours["rate"] / rates["plain"]["rate"],
            "EAGLE-2": ours["rate"] / rates["EAGLE-2"]["rate"],
            "CAST": ours["rate"] / rates["CAST"]["rate"],
            "best fixed": ours["rate"] / fixed[best],
        },
        worst_family_over_plain=min(
            (v / rates["plain"]["families"][f], f) for f, v in ours["families"].items()
        ),
    )  # fmt: skip
    write_atomically(args.out, json.dumps(result, indent=1).encode())
    print(json.dumps({k: v for k, v in result.items() if k != "rates"}, indent=1))


if __name__ == "__main__":
    main()
