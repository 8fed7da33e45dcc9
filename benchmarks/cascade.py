"""Policies of C3PO on recorded outcomes: what they save, and whether their cost bound holds.

Every split of the queries calibrates anew (regret on the first part, the bound on the second) and
is judged on the third, which nothing was chosen on. Judged beside it, on the same queries: every
member alone, and a coin that sends queries to the two ends so that it costs as much as the policy
does on average. The search for a policy is timed last.

Accuracy is read from gold answers here, never by calibration.
"""

import argparse
import ast
import csv
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
from skimp.ir.cost import write_atomically
from skimp.passes.data import data_file
from skimp.runtime.cascade.calibrate import (
    SKIP,
    Goal,
    Infeasible,
    calibrate,
    disagreement,
    outcomes,
    search,
    split,
)
from skimp.runtime.cascade.extract import vote
from skimp.runtime.cascade.traces import MemberSpec, Table, draw_samples, tabulate

ALPHA, DELTA = 0.1, 0.1
SHARES = (0.3, 0.3, 0.4)  # to measure regret, to bound the cost, to judge
WORDS = 1.25  # tokens per word, as the paper counts them where no tokens were recorded


def words(text):
    return round(WORDS * len(text.split()))


def gsm8k(strong_samples):
    """Programs of Llama-2-13B (5 of 24 stored) and GPT-4 for 400 questions, results voted."""
    weak, strong = (
        json.loads(data_file("cascade_samples", f"gsm_pot_{name}.json").read_text())
        for name in ("llama2_13B", "GPT4")
    )
    strong = strong[: len(weak)]
    members = [MemberSpec("llama-2-13b", 5), MemberSpec("gpt-4", strong_samples)]
    prices = ((0.25, 0.5), (10.0, 30.0))  # US dollars per million tokens, in and out
    traces, gold = [], []
    for i, rows in enumerate(zip(weak, strong, strict=True)):
        prompt = words(rows[0]["question"]) + 900  # eight worked examples
        trace = {"id": str(i), "members": {}}
        for row, member, price, stored in zip(rows, members, prices, (24, 3), strict=True):
            tokens = [words(g) for g in row["generated"]]
            tokens += [tokens[-1] if tokens else 60] * stored
            answers = [*row["results"], *[None] * stored][:stored]  # what did not run is no answer
            samples = [
                {"answer": a, "cost": 1e-6 * (price[0] * prompt / member.samples + price[1] * t)}
                for a, t in zip(answers, tokens, strict=False)
            ]
            trace["members"][member.name] = {"samples": samples}
        traces.append(trace)
        gold.append(float(rows[0]["answer"]))
    table = tabulate(traces, members)

    def right(i, j):
        drawn = draw_samples(traces[i], members[j], "", 0)  # the draw that the table was made of
        answer = vote([None if s["answer"] is None else str(s["answer"]) for s in drawn])[0]
        return answer is not None and abs(float(answer) - gold[i]) < 1e-3

    return table, np.array([[right(i, j) for j in range(2)] for i in range(len(table))], float)


def routellm_gsm8k():
    """One answer each of Mixtral-8x7B and GPT-4 to 1,319 questions: no votes to count."""
    with data_file("routellm", "gsm8k_responses.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = ["mistralai/Mixtral-8x7B-Instruct-v0.1", "gpt-4-1106-preview"]
    traces = []
    for i, row in enumerate(rows):
        members = {}
        for name, (a, b) in zip(names, ((0.6, 0.6), (10.0, 30.0)), strict=True):
            text = row[f"{name}_response"]
            cost = 1e-6 * (a * words(row["prompt"]) + b * words(text))
            members[name] = {"samples": [{"text": text, "cost": cost}]}
        traces.append({"id": i, "members": members})
    table = tabulate(traces, [MemberSpec(n, 1) for n in names])
    return table, np.array([[row[n] == "True" for n in names] for row in rows], float)


def routerarena():
    """One answer each of claude-3-haiku and gemini-2.0-flash, which is cheaper and better."""
    prices = json.loads(data_file("routerarena", "cost.json").read_text())
    names = ["claude-3-haiku-20240307", "gemini-2.0-flash-001"]
    found = {}
    for name in names:
        price = prices.get(name) or prices[name.removesuffix("-001")]
        for line in data_file("routerarena", f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            usage, result = (
                ast.literal_eval(v) if isinstance(v, str) else v
                for v in (row["token_usage"], row["evaluation_result"])
            )
            cost = 1e-6 * price["input_token_price_per_million"] * usage["input_tokens"]
            cost += 1e-6 * price["output_token_price_per_million"] * usage["output_tokens"]
            sample = {"text": str(row["generated_answer"]), "cost": cost}
            found.setdefault(row["global_index"], {})[name] = (sample, float(result["score"]))
    both = {k: v for k, v in found.items() if len(v) == 2}
    traces = [
        {"id": k, "members": {n: {"samples": [v[n][0]]} for n in names}} for k, v in both.items()
    ]
    table = tabulate(traces, [MemberSpec(n, 1) for n in names], extract="boxed", least_answers=0.3)
    return table, np.array([[v[n][1] for n in names] for v in both.values()])


SETS = {
    "gsm8k, gpt-4 votes": lambda: gsm8k(3),
    "gsm8k, gpt-4 once": lambda: gsm8k(1),
    "routellm-gsm8k": routellm_gsm8k,
    "routerarena": routerarena,
}


def spread(values):
    """Mean, and what 90 % of the splits lie between."""
    if not len(values):
        return None
    low, high = np.quantile(values, [0.05, 0.95])
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}


def budgets(table):
    """From what only the cheapest call allows to what asking everyone takes."""
    cheap = float(np.quantile(table.cost.min(1), 0.97))
    everyone = table.cost.sum(1)
    return [cheap, *(float(np.quantile(everyone, q)) for q in (0.5, 0.75, 0.8, 0.85, 0.9, 0.97))]


def compare(table, right, exits, cost):
    """Accuracy of a policy, and of the coin between the two ends that costs as much."""
    accuracy = right[np.arange(len(table)), exits].mean()
    ends, prices = right.mean(0)[[0, -1]], table.cost.mean(0)[[0, -1]]
    share = np.clip((cost.mean() - prices[0]) / (prices[1] - prices[0]), 0, 1)
    return accuracy, ends[0] + share * (ends[1] - ends[0])


def fixed(table, right):
    """Every threshold of the first member, by hand: nothing is calibrated, nothing promised."""
    rows = []
    for k in range(table.members[0].samples + 1):
        tau = np.array([[k / table.members[0].samples, 0.0]])
        exits, cost = outcomes(table, tau)
        accuracy, mixed = compare(table, right, exits[0], cost[0])
        line = {"threshold": float(tau[0, 0]), "accuracy": accuracy, "cost": cost.mean()}
        line |= {"over_mixing": accuracy - mixed, "regret": disagreement(table, exits).mean()}
        line |= {"needs": np.quantile(cost, 1 - ALPHA), "stays": (exits == 0).mean()}
        rows.append({k: float(v) for k, v in line.items()})
    return rows


def judge(table, right, budget, mode, tolerance, splits):
    """One budget, mode and tolerance over many splits."""
    found = {k: [] for k in ("accuracy", "cost", "regret", "exceedance", "over_mixing", "saved")}
    chosen, infeasible = {}, 0
    for seed in range(splits):
        rows = split(len(table), SHARES, seed)
        learn, bound, rest = (table.take(r) for r in rows)
        got = search(learn, bound, Goal(budget, ALPHA, mode, DELTA, tolerance=tolerance))
        if isinstance(got, Infeasible):
            infeasible += 1
            continue
        tau = got[0]
        name = " ".join("skip" if t == SKIP else f"{t:.1f}" for t in tau[:-1])
        chosen[name] = chosen.get(name, 0) + 1
        exits, cost = outcomes(rest, tau[None])
        accuracy, mixed = compare(rest, right[rows[2]], exits[0], cost[0])
        found["accuracy"].append(accuracy)
        found["cost"].append(cost.mean())
        found["regret"].append(disagreement(rest, exits).mean())
        found["exceedance"].append((cost > budget).mean())
        found["over_mixing"].append(accuracy - mixed)
        found["saved"].append(1 - cost.mean() / rest.cost[:, -1].mean())
    line = {
        "budget": budget,
        "mode": mode,
        "tolerance": tolerance,
        "infeasible": infeasible / splits,
    }
    line |= {k: spread(v) for k, v in found.items()}
    over = np.array(found["exceedance"]) > ALPHA
    line["splits_over_alpha"] = float(over.mean()) if len(over) else None
    line["thresholds"] = dict(sorted(chosen.items(), key=lambda x: -x[1])[:3])
    return line


def alone(table, right, at):
    """Every member alone, over all queries."""
    return {
        m.name: {
            "samples": m.samples,
            "accuracy": float(right[:, j].mean()),
            "cost": float(table.cost[:, j].mean()),
            "exceedance": [float((table.cost[:, j] > b).mean()) for b in at],
        }
        for j, m in enumerate(table.members)
    }


def evaluate(name, splits, quiet):
    table, right = SETS[name]()
    at = budgets(table)
    result = {"queries": len(table), "members": alone(table, right, at)}
    result["fixed"] = fixed(table, right)
    result["any_member_right"] = float((right > 0.5).any(1).mean())
    asked = [("paper", 0.0), ("strict", 0.0), ("paper", 0.1), ("strict", 0.1)]
    rows = [judge(table, right, b, *which, splits) for b in at for which in asked]
    if not quiet:
        print(f"\n{name}, {len(table)} queries, {splits} splits, alpha {ALPHA}")
        for member, m in result["members"].items():
            print(f"  {member} x {m['samples']} alone: {m['accuracy']:.3f} at ${m['cost']:.6f}")
        for r in result["fixed"]:
            print(
                f"  fixed at {r['threshold']:.1f}: {r['accuracy']:.3f} at ${r['cost']:.6f}, over "
                f"mixing {r['over_mixing']:+.3f}, needs ${r['needs']:.6f}, {r['stays']:.0%} stay"
            )
        for r in rows:
            start = f"  ${r['budget']:.6f} {r['mode']:6} +{r['tolerance']:.1f} "
            start += f"infeasible {r['infeasible']:4.0%}"
            if r["accuracy"] is None:
                print(start)
                continue
            e = r["exceedance"]
            print(
                f"{start}  accuracy {r['accuracy']['mean']:.3f} at ${r['cost']['mean']:.6f}  "
                f"regret {r['regret']['mean']:.3f}  over mixing {r['over_mixing']['mean']:+.3f}  "
                f"exceeds {e['mean']:.3f} ({e['low']:.3f}-{e['high']:.3f}), "
                f"over alpha in {r['splits_over_alpha']:.0%}"
            )
    return result | {"rows": rows}


def time_search(queries=10_000, members=3, k=5):
    """Seconds of a whole calibration, both modes."""
    rng = np.random.default_rng(0)
    table = Table(
        tuple(MemberSpec(f"m{j}", k) for j in range(members)),
        rng.integers(0, 3, (queries, members)),
        rng.integers(0, k + 1, (queries, members)) / k,
        rng.gamma(4, 1e-4, (queries, members)) * 10.0 ** np.arange(members),
        tuple(map(str, range(queries))),
        "made",
    )
    found = {"queries": queries, "members": members, "samples": k}
    for mode in ("paper", "strict"):
        times = []
        for seed in range(7):
            begun = time.perf_counter()
            calibrate(table, Goal(0.05, mode=mode, seed=seed))
            times.append(time.perf_counter() - begun)
        found[mode] = {"median": statistics.median(times), "spread": [min(times), max(times)]}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cascade.json"))
    args = parser.parse_args()
    splits = 20 if args.quick else 300
    result = {"python": platform.python_version(), "numpy": np.__version__}
    result |= {"splits": splits, "alpha": ALPHA, "delta": DELTA, "shares": SHARES}
    result["sets"] = {name: evaluate(name, splits, args.json) for name in SETS}
    result["search"] = time_search(1000 if args.quick else 10_000)
    if args.json:
        print(json.dumps(result))
    else:
        for mode in ("paper", "strict"):
            t = result["search"][mode]
            print(
                f"search, {mode}: {t['median']:.3f} s ({t['spread'][0]:.3f}-{t['spread'][1]:.3f})"
            )
    if not args.quick:
        write_atomically(args.out, json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main()
