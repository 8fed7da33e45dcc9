"""Routers trained with PPO on recorded outcomes, and what is simpler than they are.

Every set is split once: questions to train on, to bound the cost on, and to judge on; questions
that occur twice are left out, and what is left is searched for near copies. On the judged questions
the router is compared with single members, fixed sequences, nearest neighbours, chance and
hindsight, paired by question. All but the judged questions chose everything, baselines included.

The first world is made up: three members and two hops, where one class of questions is solved by
one ordered pair of members alone. Its optimum is known.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from cascade import gsm8k, routellm_gsm8k, routerarena, words
from page import replace_section, table
from skimp.ir.cost import write_atomically
from skimp.passes.data import data_file
from skimp.runtime.cascade.router import Plan
from skimp.runtime.cascade.router_baselines import all_ways, verdict
from skimp.runtime.cascade.router_train import Bound, Training, build, split
from skimp.runtime.cascade.router_world import Outcome, Question, World
from skimp.runtime.cascade.traces import MemberSpec

HERE = Path(__file__).parent
NAMES = ("router", "best-single", "best-sequence", "knn", "random", "oracle")
KEPT = (*NAMES, "thresholds")
LLMROUTER_OUT = 200  # tokens of an answer, which LLMRouter does not record


class TableWorld(World):
    """Recorded outcomes; what members say does not depend on what was said before."""

    def __init__(self, texts, members, quality, cost, confidence=None):
        asked = [Question(str(i), ({"role": "user", "content": t},)) for i, t in enumerate(texts)]
        super().__init__(asked, members, lambda *_: [], quality="score", context="question")
        self.tables = quality, cost, np.ones_like(cost) if confidence is None else confidence

    def _ask(self, q, path):
        quality, cost, confidence = (float(t[q, path[-1]]) for t in self.tables)
        return Outcome("", None, confidence, cost, quality)


def made_up():
    """Of the tests: one ordered pair solves a class, and nobody alone."""
    file = HERE.parent / "tests/runtime/cascade/worlds.py"
    spec = importlib.util.spec_from_file_location("worlds", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.world(150)


def of_table(loaded, texts):
    outcomes, right = loaded
    return TableWorld(texts, outcomes.members, right, outcomes.cost, outcomes.confidence)


def votes():
    """Llama-2-13B five times, GPT-4 once, on 400 questions; the state has the share that agree."""
    rows = json.loads(data_file("cascade_samples", "gsm_pot_llama2_13B.json").read_text())
    return of_table(
        gsm8k(1), [r[0]["question"] if isinstance(r, list) else r["question"] for r in rows]
    )


def gsm8k_once():
    import csv

    with data_file("routellm", "gsm8k_responses.csv").open(newline="") as file:
        texts = [row["prompt"] for row in csv.DictReader(file)]
    return of_table(routellm_gsm8k(), texts)


def arena():
    loaded = routerarena()
    name = "claude-3-haiku-20240307.jsonl"
    rows = map(json.loads, data_file("routerarena", name).read_text().splitlines())
    texts = {row["global_index"]: row["question"] for row in rows}
    return of_table(loaded, [texts[i] for i in loaded[0].ids])


def llmrouter():
    """Nine open models; the data's own split, less training questions that are judged too."""
    rows, starts = [], []
    for part in ("train", "test"):
        starts.append(len(rows))
        rows += json.loads(data_file("llmrouter", f"{part}.json").read_text())
    prices = json.loads(data_file("llmrouter", "prices.json").read_text())
    names = sorted(rows[0]["scores"], key=lambda n: prices[n]["output_price"])
    score = np.array([[r["scores"][n] for n in names] for r in rows], float)
    tokens = np.array([words(r["question"]) for r in rows])
    cost = np.stack(
        [
            1e-6 * (prices[n]["input_price"] * tokens + prices[n]["output_price"] * LLMROUTER_OUT)
            for n in names
        ],
        axis=1,
    )
    world = TableWorld(
        [r["question"] for r in rows], [MemberSpec(n, 1) for n in names], score, cost
    )
    test = range(starts[1], len(rows))
    judged = {rows[i]["question"] for i in test}
    train = [i for i in range(starts[1]) if rows[i]["question"] not in judged]
    rng = np.random.default_rng(0)
    order = [int(i) for i in rng.permutation(train)]
    return world, [sorted(order[400:]), sorted(order[:400]), list(test)]


SETS = {
    "made up: one ordered pair": (made_up, Plan(hops=2, lam=0.1), {"steps": 12_000}),
    "gsm8k, votes, may stop": (votes, Plan(hops=2, lam=0.5, stop=True), {"steps": 16_000}),
    "routellm-gsm8k": (gsm8k_once, Plan(hops=1, lam=0.1), {"steps": 10_000}),
    "routellm-gsm8k, may stop": (gsm8k_once, Plan(hops=2, lam=0.1, stop=True), {"steps": 12_000}),
    "routellm-gsm8k, MiniLM": (
        gsm8k_once,
        Plan(hops=1, lam=0.1),
        {"steps": 10_000, "embed": "minilm"},
    ),
    "routerarena": (arena, Plan(hops=1, lam=0.1), {"steps": 10_000}),
    "llmrouter, quality alone": (llmrouter, Plan(hops=1, lam=0.0), {"steps": 30_000}),
}


def evaluate(name, seeds, quick):
    """One set: a router per seed on one split, and the baselines."""
    load, plan, how = SETS[name]
    how = dict(how)
    embed = how.pop("embed", "tfidf")
    loaded = load()
    world, parts = loaded if isinstance(loaded, tuple) else (loaded, None)
    parts = parts or split(world, (0.5, 0.15, 0.35), 0)
    plan = replace(plan, context=world.context)
    runs = []
    for seed in range(seeds):
        training = Training(rate=1e-3, width=64, seed=seed, **how)
        if quick:
            training = replace(training, steps=2000)
        begun = time.perf_counter()
        _, record = build(world, plan, Bound(), training, embed=embed, parts=parts)
        runs.append((time.perf_counter() - begun, record))
        told = record["against"]
        print(
            f"{name}, seed {seed}, {runs[-1][0]:.0f} s: "
            + ", ".join(f"{n} {told[n]['value']['mean']:.3f}" for n in NAMES),
            flush=True,
        )
    first = runs[0][1]
    test = all_ways(world, plan, parts[2])
    ones = test.columns([1])
    return {
        "plan": {"hops": plan.hops, "lam": plan.lam, "stop": plan.stop},
        "steps": training.steps,
        "sizes": first["split"]["sizes"],
        "repeated": first["split"]["repeated"],
        "leaks": first["split"]["leaks"],
        "seconds": statistics.median(s for s, _ in runs),
        "over_seeds": [r["against"]["router"]["value"]["mean"] for _, r in runs],
        "verdicts": [r["verdicts"] for _, r in runs],
        "routes": first["routes"],
        "best_single_in_hindsight": float(test.quality[:, ones].mean(0).max()),
        "one_hop_oracle": float(test.quality[:, ones].max(1).mean()),
    } | {"against": {k: v for k, v in first["against"].items() if k in KEPT}}


def sweep(quick):
    """The price of cost against what is bought, RouteLLM's GSM8K."""
    world = gsm8k_once()
    parts = split(world, (0.5, 0.15, 0.35), 0)
    rows = []
    for lam in (0.0, 0.1, 0.3, 1.0, 3.0):
        how = Training(width=64, steps=2000 if quick else 8000)
        plan = Plan(hops=1, lam=lam, context="question")
        _, record = build(world, plan, Bound(), how, embed="tfidf", parts=parts)
        router = record["against"]["router"]
        rows.append({"lam": lam} | {k: router[k]["mean"] for k in ("quality", "cost")})
        print(rows[-1], flush=True)
    return rows


def span(v, form=".3f"):
    return f"{v['mean']:{form}} ({v['low']:{form}} to {v['high']:{form}})"


def section(result):
    """The tables of the page."""
    sets = result["sets"]
    head = ["set", "router", "best single", "best sequence", "neighbours", "chance", "hindsight"]
    parts = [
        table(
            head,
            [[n, *(span(f["against"][k]["value"]) for k in NAMES)] for n, f in sets.items()],
        )
    ]
    rows = []
    for name, found in sets.items():
        over = found["against"]["router"]["over"]
        rows.append(
            [
                name,
                ", ".join(map(str, found["sizes"])),
                f"{found['repeated']}, {found['leaks']}",
                *(
                    f"{span(over[n], '+.3f')}: {verdict(over[n])}"
                    for n in ("best-single", "best-sequence", "knn")
                ),
                ", ".join(f"{v:.3f}" for v in found["over_seeds"][1:]),
                f"{found['seconds']:.0f} s",
            ]
        )
    head = ["set", "train, bound, judge", "repeated, near copies", "over best single"]
    head += ["over best sequence", "over neighbours", "return, other seeds", "training"]
    parts.append(table(head, rows))
    swept = [[f"{r['lam']:g}", f"{r['quality']:.3f}", f"${r['cost']:.6f}"] for r in result["sweep"]]
    parts.append(table(["lam", "quality", "mean cost"], swept))
    climbs = ""
    for name, found in sets.items():
        if (row := found["against"].get("thresholds")) is not None:
            over = found["against"]["router"]["over"]["thresholds"]
            climbs += f"- {name}: a cascade with the thresholds that were best in training has "
            climbs += f"{span(row['value'])}; over it the router has {span(over, '+.3f')}: "
            climbs += f"{verdict(over)}.\n"
    real = {n: f for n, f in sets.items() if f is not sets["made up: one ordered pair"]}
    claims = []
    for n, words_for in (("best-single", "the best single member"), ("knn", "neighbours")):
        said = [verdict(f["against"]["router"]["over"][n]) for f in real.values()]
        claims.append(f"than {words_for} on {said.count('better')} of {len(said)}")
    parts.append(
        f"- On real data the router is better {', and '.join(claims)} sets (the first seed's "
        "intervals, nothing corrected for looking at several sets).\n"
    )
    made, own = sets["made up: one ordered pair"], sets["llmrouter, quality alone"]
    value = {k: made["against"][k]["value"]["mean"] for k in NAMES}
    quality = made["against"]["router"]["quality"]["mean"]
    parts[-1] += climbs
    parts[-1] += (
        f"- Made up: {value['router'] / value['oracle']:.1%} of the optimum, trained in "
        f"{made['seconds']:.0f} s. Whoever picks a single member for each question in hindsight "
        f"has quality {made['one_hop_oracle']:.3f}; the router has {quality:.3f}.\n"
        "- LLMRouter: the single member that is best on the judged questions, which nobody knows "
        f"beforehand, has {own['best_single_in_hindsight']:.3f}.\n"
    )
    return "\n".join(parts)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", help="a set by name, to replace what was found of it")
    parser.add_argument("--out", type=Path, default=HERE / "results/router.json")
    args = parser.parse_args()
    packages = ("numpy", "torch", "stable-baselines3", "sb3-contrib", "gymnasium")
    result = {"python": platform.python_version()} | {p: version(p) for p in packages}
    names = [args.only] if args.only else list(SETS)
    found = {name: evaluate(name, args.seeds, args.quick) for name in names}
    if args.only:
        old = json.loads(args.out.read_text())
        found = {n: found.get(n) or old["sets"][n] for n in SETS if n in found or n in old["sets"]}
    result["sets"] = found
    result["sweep"] = old["sweep"] if args.only else sweep(args.quick)
    if not args.quick:
        write_atomically(args.out, json.dumps(result, indent=1).encode())
        replace_section(HERE.parent / "docs/router.md", "results", section(result))


if __name__ == "__main__":
    main()
