"""What benchmarks/decode.py found, and docs/decode.md of it."""

import json
import statistics

from decode_extra import replayed, sparse
from decode_ways import FIXED_WAYS, WAYS
from page import table

GOALS = (
    ("plain", "llama.cpp F32", 0.95),
    ("plain bfloat16", "llama.cpp BF16", 0.95),
    *(
        (f"{tree}{head}", other, goal)
        for head in ("", " head")
        for tree, other, goal in (
            ("tree", "HF generate", 3.0),
            ("tree", "best plain PyTorch", 2.0),
            ("tree", f"EAGLE-2{head}", 1.1),
            ("tree", "best fixed tree in hindsight", 0.97),
            ("tree", "llama.cpp F32", 2.0),
            ("tree bfloat16", "llama.cpp BF16", 2.0),
            ("tree", "plain, worst family", 0.97),
        )
    ),
)
PLAIN = ("HF generate", "torch.compile")


def read(folder):
    """Records by way and name of prompt."""
    found = {}
    for way in WAYS:
        paths = sorted((folder / way).glob("*.json"))
        records = {p.stem: json.loads(p.read_text()) for p in paths}
        if records:
            found[way] = records
    return found


def rate(records):
    """Tokens per second of all records together."""
    return sum(r["tokens"] for r in records) / sum(r["seconds"] for r in records)


def after_first(records):
    """The same without the prompts' passes and the token that they give."""
    kept = [r for r in records if r["first"] and r["tokens"] > len(r["texts"])]
    if not kept:
        return None
    tokens = sum(r["tokens"] - len(r["texts"]) for r in kept)
    return tokens / sum(r["seconds"] - r["first"] for r in kept)


def ratio(a, b):
    """How many times as fast as another a way is, over the prompts that both ran.

    Returns:
        Of all tokens and seconds, and quartiles of the prompts' own; ``None`` if none is shared.
    """
    shared = sorted(set(a) & set(b))
    if not shared:
        return None
    each = [rate([a[n]]) / rate([b[n]]) for n in shared]
    low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
    total = rate([a[n] for n in shared]) / rate([b[n] for n in shared])
    return dict(ratio=total, low=low, median=middle, high=high, prompts=len(shared))


def family(name):
    """Of a prompt's name."""
    return name.rpartition("-")[0]


def picked(records, wanted):
    return {n: r for n, r in records.items() if (family(n) == "batch") == (wanted == "batch")}


def summary(folder):
    """Everything as figures."""
    about = json.loads((folder / "about.json").read_text())
    every = read(folder)
    single = {w: picked(r, "single") for w, r in every.items()}
    single = {w: r for w, r in single.items() if r}
    batched = {w: r for w, found in every.items() if (r := picked(found, "batch"))}
    families = sorted({family(n) for r in single.values() for n in r})
    ways = {w: _way(r, families) for w, r in single.items()}
    loads = sorted(r.get("load", 0) for found in every.values() for r in found.values())
    about["load"] = loads[len(loads) // 2] if loads else 0
    result = about | dict(families=families, ways=ways, goals=_goals(single))
    result["batch of 8"] = {
        w: dict(rate=rate(r.values()), batches=len(r), **_trees(r.values()))
        for w, r in batched.items()
    }
    pairs = [("tree", w) for w in batched if w != "tree"] if "tree" in batched else []
    result["batch of 8, ratios"] = {f"{a} / {b}": ratio(batched[a], batched[b]) for a, b in pairs}
    return result


def _way(records, families):
    by = {f: [r for n, r in records.items() if family(n) == f] for f in families}
    return dict(
        prompts=len(records),
        tokens=sum(r["tokens"] for r in records.values()),
        rate=rate(records.values()),
        rate_after_first=after_first(records.values()),
        first_ms=1000 * statistics.median(r["first"] or 0 for r in records.values()),
        near_ties=sum(r.get("ties", 0) for r in records.values()),
        families={f: rate(r) for f, r in by.items() if r},
        **_trees(records.values()),
    )


def _trees(records):
    """Means over the reports of the engine, where there are."""
    reports = [r["report"] for r in records if "report" in r]
    if not reports:
        return {}
    steps = sum(r["steps"] for r in reports) or 1
    accepted = sum(r["accepted"] for r in reports)
    expected = sum(r["expected"] for r in reports)
    sizes = {}
    for r in reports:
        for n, c in r["sizes"].items():
            sizes[n] = sizes.get(n, 0) + c
    return dict(
        tokens_per_step=1 + accepted / (sum(r["row_steps"] for r in reports) or 1),
        ms=dict(
            draft=1000 * sum(r["draft"] for r in reports) / steps,
            verify=1000 * sum(r["verify"] for r in reports) / steps,
            other=1000 * sum(r["other"] for r in reports) / steps,
        ),
        time_error=statistics.median(r["time_error"] for r in reports),
        accepted=accepted,
        expected=expected,
        sizes=dict(sorted(sizes.items(), key=lambda x: int(x[0]))),
    )


def _goals(single):
    """What was to be reached, and what was."""
    found = []
    for way, against, goal in GOALS:
        rival = _rival(single, way, against)
        if rival is not None:
            said, r = rival
            found.append(dict(way=way, against=said, goal=goal, reached=r["ratio"] >= goal, **r))
    return found


def _rival(single, way, against):
    """The strongest of those that a goal is about, and how many times as fast the way is."""
    if way not in single:
        return None
    head = " head" if way.endswith(" head") else ""
    names = {
        "best plain PyTorch": PLAIN,
        "best fixed tree in hindsight": [f"{n}{head}" for n in FIXED_WAYS],
    }.get(against, [against])
    rivals = {n: single[n] for n in names if n in single}
    if against == "plain, worst family":
        plain = single.get("plain", {})
        rivals = {
            f: {n: r for n, r in plain.items() if family(n) == f}
            for f in sorted({family(n) for n in plain})
        }
    ratios = [(r, name) for name, found in rivals.items() if (r := ratio(single[way], found))]
    if not ratios:
        return None
    r, name = min(ratios, key=lambda x: x[0]["ratio"])
    return (against if name == against else f"{against} ({name})"), r


def write_docs(result):
    """docs/decode.md."""
    text = f"""# Decoding with token trees: how fast

Written by `python benchmarks/decode.py` from `benchmarks/results/decode.json`. {result["model"]},
greedy, up to {result["tokens"]} new tokens, {result["machine"]}, torch {result["torch"]}.
Prompts are of Spec-Bench's six families (chat: first turns of MT-Bench) and GSM8K, of at most
{result["longest_prompt"]} tokens; ways take turns prompt by prompt. Every rate counts the prompt's
pass. `plain` and `tree` run the generated step; `tree` sizes its trees by measured costs (lambda),
`EAGLE-2` always verifies 60 nodes of 7 layers by 10, `CAST` follows arXiv 2510.26577, and `fixed n
by d` verifies n nodes of d layers, all with the same drafter: n-grams of the prompt and the text so
far, unless another is named.{_head(result.get("head"))}

## What was to be reached

"""
    rows = [
        [
            f"`{g['way']}`", g["against"], f"{g['goal']:.2f}", f"{g['ratio']:.2f}",
            f"{g['median']:.2f} ({g['low']:.2f}-{g['high']:.2f})", g["prompts"],
            "yes" if g["reached"] else "**no**",
        ]
        for g in result["goals"]
    ]  # fmt: skip
    head = ["way", "against", "goal", "times as fast", "by prompt, quartiles", "prompts", "reached"]
    text += table(head, rows)
    if result["load"] > result["threads"] + 0.5:
        text += f"""
**The machine was not alone**: its load average was {result["load"]:.1f} (median) on
{result["threads"]} processors, with this benchmark. Rates are then lower than the machine's, by
chance more for one way than another, and steps that wait for two threads suffer most. Ratios
compare neighbours in time: take them for a first impression until it is
run alone.{result.get("note", "")}
"""
    ways, families = result["ways"], result["families"]
    text += "\n## Tokens per second\n\n"
    rows = []
    for name, w in ways.items():
        each = [f"{w['families'][f]:.1f}" if f in w["families"] else "" for f in families]
        later = f"{w['rate_after_first']:.1f}" if w["rate_after_first"] else ""
        step = f"{w['tokens_per_step']:.2f}" if "tokens_per_step" in w else ""
        rows.append(
            [name, f"**{w['rate']:.1f}**", later, *each, step, w["prompts"], w["near_ties"]]
        )
    head = ["way", "all", "after the first token", *families, "tokens per step", "prompts"]
    text += table([*head, "near ties"], rows)
    text += """
A *near tie* is a text that left the dense model's own where its two likeliest tokens were less than
a thousandth apart; any other difference stops the benchmark. llama.cpp's text is its own.

## Where the time goes, and how well it is predicted

"""
    rows = []
    for name, w in ways.items():
        if "ms" in w:
            ms = w["ms"]
            rows.append([
                name, f"{ms['draft']:.2f}", f"{ms['verify']:.2f}", f"{ms['other']:.2f}",
                f"{w['first_ms']:.0f}", f"{w['time_error']:.1%}",
                f"{w['accepted']} / {w['expected']:.0f}", _sizes(w["sizes"]),
            ])  # fmt: skip
    head = ["way", "draft, ms", "verify, ms", "other, ms", "first token, ms"]
    head += ["time predicted, off by", "accepted / predicted", "rows verified: share of steps"]
    text += table(head, rows)
    if result["batch of 8"]:
        text += "\n## Eight prompts at once\n\n"
        rows = [
            [
                n,
                f"{w['rate']:.1f}",
                f"{w['tokens_per_step']:.2f}" if "ms" in w else "",
                w["batches"],
            ]
            for n, w in result["batch of 8"].items()
        ]
        text += table(["way", "tokens per second", "tokens per step", "batches"], rows)
    text += replayed() + sparse()
    slower = [
        f"`{g['way']}` against {g['against']}: {g['ratio']:.2f}"
        for g in result["goals"]
        if g["ratio"] < 1
    ]
    slower += [
        f"{pair}, eight at once: {r['ratio']:.2f}"
        for pair, r in result["batch of 8, ratios"].items()
        if r and r["ratio"] < 1
    ]
    if "tree" in ways:
        slower += [
            f"`tree` against {n} on {f}: {ways['tree']['families'][f] / v:.2f}"
            for n, w in ways.items()
            if "bfloat16" not in n and " head" not in n
            for f, v in w["families"].items()
            if f in ways["tree"]["families"] and ways["tree"]["families"][f] < v
        ]
    text += "\n## Slower\n\n" + (
        "".join(f"- {s}\n" for s in slower) or "Nowhere in these tables.\n"
    )
    return text


def _head(note):
    """How the head was trained that some ways use."""
    if note is None:
        return ""
    recipe, found = note["recipe"], note["measured"]
    minutes = sum(found["seconds"].values()) / 60
    return f"""

Ways with a *head* use n-grams and a layer that `benchmarks/decode_head.py` trained for
{minutes:.0f} minutes on {found["tokens"]:,} tokens that the model wrote for other prompts, mostly
of the same families. On such text its likeliest token is the model's {found["first"]:.0%} of the
time, and {found["later"]:.0%} where it reads its own guesses; it drafts {recipe["words"]:,} tokens,
{found["covered"]:.0%} of what the model writes."""


def _sizes(sizes):
    """A histogram in a few words."""
    total = sum(sizes.values())
    parts = {"1": 0, "2-4": 0, "5-8": 0, "9-16": 0, "17-32": 0, "33-64": 0}
    for n, count in sizes.items():
        for name in parts:
            if int(n) <= int(name.rpartition("-")[2]):
                parts[name] += count
                break
    return ", ".join(f"{n}: {c / total:.0%}" for n, c in parts.items() if c)
