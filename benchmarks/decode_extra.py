"""The parts of docs/decode.md on sizing trees and on the sparse self, from their own results."""

import json
from pathlib import Path

from page import table

RESULTS = Path(__file__).parent / "results"


def read(name):
    """A result, if it was measured."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def busy(load):
    """What is to be said if others used the machine."""
    return f" The load average was {load:.1f}: others used the machine." if load > 2.5 else ""


def replayed():
    """How well trees are sized."""
    result = read("decode-replay")
    if result is None:
        return ""
    trees = sum(n.startswith("fixed") for n in result["rates"])
    over, worst = result["tree_over"], result["worst_family_over_plain"]
    text = f"""
## How well trees are sized

Known texts ({result["prompts"]} prompts, up to {result["tokens"]} tokens) decoded again without the
model (`benchmarks/decode_replay.py`, `decode-replay.json`): the n-gram drafter is real, the text
says what is accepted, and a step takes what one measured curve says, so policies are compared on
equal terms, and among {trees} fixed trees the best is found in hindsight. The curve is the fastest
of repeated passes.{busy(result["load"])}{result.get("note", "")}

"""
    rows = [
        ["plain", f"{over['plain']:.3f}", ""],
        ["plain, worst family (" + worst[1] + ")", f"{worst[0]:.3f}", "0.97"],
        ["EAGLE-2's 60 nodes of 7 layers by 10", f"{over['EAGLE-2']:.3f}", "1.10"],
        ["CAST", f"{over['CAST']:.3f}", ""],
        [f"best fixed tree ({result['best_fixed']})", f"{over['best fixed']:.3f}", "0.97"],
    ]
    text += table(["`tree` against", "times as fast", "goal"], rows)
    curve = ", ".join(f"{n}: {ms:.1f}" for n, ms in result["curve_ms"].items())
    return text + f"\nCurve, ms by rows: {curve}.\n"


def sparse():
    """The place of the sparse self."""
    result = read("decode-sparse")
    if result is None:
        return ""
    text = f"""
## The model's sparse form as its drafter

`benchmarks/decode_sparse.py`, `decode-sparse.json`; {result["tokens"]} tokens. *Most to gain* is of
the best chain, if drafting and verifying were all that takes time; below 1 it loses to plain
decoding. n-grams cost microseconds where this costs a large share of a step.{busy(result["load"])}

"""
    rows = [
        [
            r["tau"],
            f"{r['right']:.1%}",
            f"{r['cost']:.2f}",
            r["best_chain"],
            f"{r['most_gain']:.2f}",
        ]
        for r in result["rows"]
    ]
    head = ["threshold", "likeliest token right", "its step / the dense step", "best chain"]
    return text + table([*head, "most to gain"], rows)
