"""Selective judging on LLMBar: what it would cost with recorded judges, and live with a weak one.

Recorded: GPT-4, ChatGPT and PaLM2 judged all 419 pairs in both orders, and their verdicts are
replayed as the plain ones. Which pairs are judged again, and how many calls that takes, follows
exactly; what those calls would answer was not recorded, so no accuracy after learning is claimed,
and a coin in their place is the null that any would have to beat.

Live: SmolLM2-135M on this machine, on the shortest pairs, with learning and without (frozen), over
seeds of the order. It is far too small a model for a judge; this shows that the machinery runs.

Labels are read for scoring, after all is judged.
"""

import argparse
import asyncio
import json
import platform
import time
from pathlib import Path

import numpy as np
from page import replace_section, table
from skimp.ir.cost import write_atomically
from skimp.passes.data import data_file
from skimp.runtime.cascade import judge_prompts as prompts
from skimp.runtime.cascade.judge import Judge, MemberJudge, expected_calls, flipped, score
from skimp.runtime.cascade.judge_prompts import Pair
from skimp.runtime.cascade.local import LocalModel
from skimp.runtime.cascade.price import Price
from skimp.runtime.cascade.responses import ResponseCache
from skimp.runtime.cascade.trip import Entry

HERE = Path(__file__).parent
SUBSETS = ("Natural", *(f"Adversarial_{n}" for n in ("GPTInst", "GPTOut", "Manual", "Neighbor")))
JUDGES = ("GPT-4", "PaLM2", "ChatGPT")
LETTER = {"1": "A", "2": "B"}


def llmbar(name):
    """Pairs, labels, and a judge's recorded verdicts in both orders, said of the original order."""
    pairs, labels, recorded = [], {}, {}
    for subset in SUBSETS:
        rows = json.loads(data_file("llmbar", subset, f"{name}.json").read_text())
        for i, row in enumerate(rows):
            pair = Pair(f"{subset}-{i}", row["input"], row["output_1"], row["output_2"])
            pairs.append(pair)
            labels[pair.id] = LETTER[str(row["label"])]
            said = row["results"][0]
            recorded[pair.id] = [
                LETTER.get(said[k]["winner"]) for k in ("swap = False", "swap = True")
            ]
    return pairs, labels, recorded


def replay(name, batch=4):
    """The split and the calls of a recorded judge; again-judged pairs are left undecided."""
    pairs, labels, recorded = llmbar(name)
    plain = {}
    for pair in pairs:
        one, two = recorded[pair.id]
        plain[prompts.vanilla(pair)] = one
        plain.setdefault(prompts.vanilla(pair.swapped), flipped(two))

    async def ask(stage, prompt):
        return f"[[{plain[prompt]}]]" if stage == "vanilla" else "not recorded"

    done = asyncio.run(Judge(ask, batch=batch).judge(pairs))
    calls = sum(done.calls.values())
    n, m = len(pairs), done.learned_from
    if calls != expected_calls(n, m, batch):
        raise SystemExit(f"{name}: {calls} calls, not {expected_calls(n, m, batch)}")
    told = score(done.verdicts, labels)
    sure = [v for v in done.verdicts if v.version is None]
    both = {p.id: recorded[p.id] for p in pairs}
    kept = ("pairs", "again", "rho", "null", "null_mixed_consistency", "plain_consistency")
    return {k: told[k] for k in kept} | {
        "calls": calls,
        "calls_per_pair": calls / n,
        "formula": 2 + m / n * (3 + 1 / batch),
        "acc": told["plain_acc"],
        "swap_acc": float(np.mean([both[i][1] == labels[i] for i in both])),
        "pair_acc": float(np.mean([both[i] == [labels[i]] * 2 for i in both])),
        "acc_where_sure": float(np.mean([v.winner == labels[v.id] for v in sure])),
    }


def live(count, seeds, folder):
    """SmolLM2 as the judge of the shortest pairs."""
    pairs, labels, _ = llmbar("GPT-4")
    pairs = sorted(pairs, key=lambda p: len(prompts.example(p)))[:count]
    member = LocalModel.load("smollm2")
    entry = Entry("smollm2", member, Price(0.0, 0.0))
    cache = ResponseCache(folder / "judge-responses.jsonl") if folder else ResponseCache()
    rows = []
    for seed in range(seeds):
        for mode in ("frozen", "selective"):
            begun = time.perf_counter()
            judge = Judge(MemberJudge(entry, cache, 96), mode=mode, seed=seed, both=True)
            done = asyncio.run(judge.judge(pairs))
            row = {"seed": seed, "mode": mode, "seconds": time.perf_counter() - begun}
            row |= score(done.verdicts, labels)
            row |= {"calls": dict(done.calls), "versions": [v.status for v in done.versions]}
            rows.append(row)
            print({k: row[k] for k in ("seed", "mode", "seconds", "again", "acc")}, flush=True)
    asyncio.run(member.close())
    return {"pairs": count, "max_tokens": 96, "asked": cache.misses, "runs": rows}


def section(result):
    """The tables of the page."""
    rows = []
    for name, r in result["recorded"].items():
        null = r["null"]
        rows.append(
            [
                name,
                f"{r['again']} of {r['pairs']} ({r['rho']:.3f})",
                f"{r['calls_per_pair']:.3f} ({r['formula']:.3f})",
                f"{r['acc']:.3f}",
                f"{r['pair_acc']:.3f}",
                f"{r['acc_where_sure']:.3f}",
                f"{null['acc']:.3f} ({null['low']:.3f} to {null['high']:.3f})",
                f"{r['plain_consistency']:.3f}",
                f"{r['null_mixed_consistency']:.3f}",
            ]
        )
    head = ["judge", "judged again (rho)", "calls per pair (formula)", "right", "in both orders"]
    head += ["where sure", "with a coin where not", "consistent", "what a coin seems to make it"]
    parts = [table(head, rows)]
    tiny = result["live"]
    rows = [
        [
            f"{r['mode']}, seed {r['seed']}",
            f"{r['again']} of {r['pairs']}",
            f"{r['plain_acc']:.3f}",
            f"{r['acc']:.3f}",
            f"{r['null']['acc']:.3f}",
            f"{r['consistency']:.3f}",
            ", ".join(f"{k} {v}" for k, v in sorted(r["calls"].items())),
            ", ".join(r["versions"][1:]) or "none",
        ]
        for r in tiny["runs"]
    ]
    head = ["SmolLM2-135M", "judged again", "right at first", "right after", "a coin"]
    parts.append(table([*head, "consistent after", "calls", "updates of the guide"], rows))
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=6, help="judged live")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cache", type=Path, help="a folder for the live judge's responses")
    parser.add_argument("--recorded", action="store_true", help="only that; nothing is written")
    parser.add_argument("--out", type=Path, default=HERE / "results/judge.json")
    args = parser.parse_args()
    result = {"python": platform.python_version()}
    result["recorded"] = {name: replay(name) for name in JUDGES}
    print(json.dumps(result["recorded"], indent=1))
    if args.recorded:
        return
    result["live"] = live(args.pairs, args.seeds, args.cache)
    write_atomically(args.out, json.dumps(result, indent=1).encode())
    replace_section(HERE.parent / "docs/judge.md", "results", section(result))


if __name__ == "__main__":
    main()
