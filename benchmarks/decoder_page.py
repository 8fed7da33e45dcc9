"""The page of a decoder made sparse, written from what benchmarks/decoder.py measured."""

import json
from pathlib import Path

from page import table
from skimp.ir.cost import write_atomically

ROOT = Path(__file__).parents[1]
KINDS = {
    "dense": "dense",
    "best neurons": "best neurons, chosen in hindsight",
    "untrained": "gates, nothing trained",
    "converted": "gates, trained",
    "allotted": "gates, trained; neurons allotted to blocks by what each loses",
}
LEARNED = KINDS | {
    "converted": "learned routers",
    "allotted": "learned routers; experts allotted to blocks by what each loses",
}


def write_page(results):
    """Write docs/decoder.md from the files of both kinds of routers."""
    found = {name: json.loads(path.read_text()) for name, path in results.items() if path.exists()}
    write_atomically(ROOT / "docs/decoder.md", page_of(found).encode())


def frontier(result, kinds):
    """The table of one run."""
    head = ["model", "neurons that run", "network FLOPs", "all FLOPs", "perplexity", "KL, held out"]
    rows = [
        [
            kinds[r["kind"]], f"{r['share']:.0%}", f"{r['ffn']:.1%}",
            "" if r["whole"] != r["whole"] else f"{r['whole']:.1%}", f"{r['perplexity']:.2f}",
            "" if r["kl"] is None else f"{r['kl']:.3f}",
        ]
        for r in result["frontier"]
    ]  # fmt: skip
    return table(head, rows)


def within(result):
    """What is left of FLOPs where perplexity is nearly the dense model's."""
    best = result["within_5_percent"]
    if best is None:
        return "No threshold that was tried keeps perplexity within 5 % of the dense model's."
    return (
        f"Within 5 % of the dense model's perplexity **{best['ffn']:.1%}** of the FLOPs of\n"
        f"its networks are left, routers included ({best['whole']:.1%} of all), at a\n"
        f"perplexity of {best['perplexity']:.2f}."
    )


def setting(result):
    """Where it was measured, and on what."""
    text = result["text"]
    return (
        f"{result['model']}, float32, {result['device']}, torch {result['torch']}.\n"
        f"Perplexity is of WikiText-2 (validation), {text['tokens']:,} tokens in windows of "
        f"{text['window']}\nwithout overlap."
    )


def trained(result):
    """How a model learnt."""
    last = next((r["stats"] for r in result["history"] if r["pass"].startswith("recover")), None)
    if last is None:
        return "Nothing was trained."
    return (
        f"Trained for {result['minutes']:.0f} minutes ({last['steps']} steps of 1,024 tokens) "
        f"while about\n{float(result['options']['share']):.0%} of the neurons run. No labels: the "
        "loss is the divergence from the dense model's next\ntokens, on text that Python carries."
    )


def speed(result):
    """The table of decode speed, if it was measured."""
    measured, load = result["decode"], result.get("load")
    if measured is None:
        return ""
    alone = "Whether others used the machine was not recorded."
    if load is not None:
        alone = f"The load average was {load:.1f}."
    lines = []
    for name, rate in measured["tokens_per_second"].items():
        told = ""
        if ratio := measured["speedup"].get(name):
            told = f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
        lines.append([name, f"{rate:.1f}", told])
    gain = f"{measured['subject']}, is so many times as fast"
    head = ["decoding one token at a time", "tokens per second", gain]
    return f"""
At {measured["share"]:.0%}, all compiled, interleaved, medians with quartiles. {alone}

{table(head, lines)}"""


def by_step(result):
    """Decode speed of another run, which only timed."""
    return f"""
By the step that `skimp.generate` generates for decoders (`decoder-speed.json`; gates that nothing
was trained for, which changes no time).
{speed(result)}"""


def page_of(found):
    """The page, in Markdown."""
    gate, learned = found["gate"], found["learned"]
    timed = by_step(found["speed"]) if "speed" in found else ""
    return f"""# A decoder made sparse

Written by `python benchmarks/decoder.py` from `benchmarks/results/decoder.json` and
`decoder-learned.json`. *Best neurons* is a bound in both: those of the largest outputs, found by
computing them all.

## The gate as the router

A gated network computes, for every neuron, how far it opens before anything else of the neuron is
needed. The pass `gate-route` makes that the score: a neuron whose gate is smaller than tau is left
out, so that two thirds of its weights are not read ([CATS](https://arxiv.org/abs/2404.08763)). A
third of the network is always computed, and nothing is predicted.

{setting(gate)}
{trained(gate)}

{within(gate)}

{frontier(gate, KINDS)}{speed(gate)}{timed}

## Learned routers

Experts of {learned["options"]["expert_size"]} neurons, chosen by routers that predict the norm of
what each adds; the networks keep SiLU.

{setting(learned)}
{trained(learned)}

{within(learned)}

{frontier(learned, LEARNED)}{speed(learned)}"""
