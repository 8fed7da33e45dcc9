"""Write the figures of README.md from benchmarks/results/, so that none is typed.

The demo's report is copied there by hand: `cp out/report.json benchmarks/results/demo.json`, and
the one of `skimp demo --thorough` to thorough.json.
"""

import argparse
import json
import re
from pathlib import Path

from page import table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- figures -->\n).*(<!-- end -->)", re.DOTALL)


def read(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def ratio(s):
    return f"{s['median']:.2f} ({s['low']:.2f}-{s['high']:.2f})"


def quality():
    columns = {"`make demo`": read("demo"), "`skimp demo --thorough`": read("thorough")}
    rows = [
        ("FFN FLOPs removed, routers included", lambda r: f"{1 - r['flops']['ffn_share']:.1%}"),
        ("whole-model FLOPs removed", lambda r: f"{1 - r['flops']['whole_share']:.1%}"),
        ("cosine to the dense embedding", lambda r: f"{r['quality']['cosine']:.4f}"),
        ("overlap of the ten nearest neighbours", lambda r: f"{r['quality']['overlap']:.3f}"),
        ("minutes in all", lambda r: f"{r['seconds'] / 60:.0f}"),
    ]
    passages = read("demo")["text"]["test_passages"]
    text = f"all-MiniLM-L6-v2, float32, on {passages} passages never trained on "
    text += "(`demo.json`, `thorough.json` in `benchmarks/results/`):\n\n"
    return text + table(["", *columns], [[n, *(f(r) for r in columns.values())] for n, f in rows])


def encoder():
    result = read("encoder")
    names = list(result["rows"][0]["speedup"])
    rows = [
        [f"{r['batch']} x {r['length']}", *(ratio(r["speedup"][n]) for n in names)]
        for r in result["rows"]
    ]
    slower = [
        f"{r['batch']} x {r['length']} against {n}"
        for r in result["rows"]
        for n in names
        if r["speedup"][n]["median"] < 1
    ]
    text = f"How fast the model of the demo is, {result['machine']}, medians of interleaved runs "
    text += "with quartiles "
    text += "(`encoder.json`):\n\n"
    text += table(["batch x length", *(f"against {n}" for n in names)], rows)
    return text + f"\nskimp is slower at: {', '.join(slower) or 'none of these'}.\n"


def blocks():
    result = read("block-float32")
    shares = ("100%", "50%", "30%", "20%")
    rows = []
    for line in result["table"]:
        kind = "gated " if line["gated"] else ""
        cells = [f"{line[s]['speedup']:.2f} [{line[s]['roofline']:.0%}]" for s in shares]
        shape = f"{line['rows']} rows, {kind}{line['d']}/{line['d_ff']}"
        rows.append([shape, line["baseline"], *cells])
    text = "One block in float32 against the fastest of eager and compiled dense, "
    text += (
        f"{result['machine']}, scores drawn at random, and in brackets the share of what memory "
    )
    text += "bandwidth or PyTorch's matrix product allow (`block-float32.json`; "
    text += "`block-float32-real.json` has a router's scores, `block-bfloat16.json` bfloat16):\n\n"
    return text + table(["", "against", *shares], rows)


def gpu():
    result = read("gpu-h100")
    return (
        f"The Triton kernels on one {result.get('device', 'card')} are in `gpu-h100.json`, slower "
        "ones too; they were measured with the kernels of that day.\n"
    )


def gateway():
    result = read("gateway")
    others = [n for n in result["at_once"]["1"] if n != "direct"]
    names = {
        "skimp": "`skimp serve`",
        "litellm": f"litellm {result['versions'].get('litellm', '')}",
    }
    rows = []
    for at_once, found in result["at_once"].items():
        for n in others:
            r = found[n]
            over = [f"{r['p50_over_direct']:.1f}", f"{r['p99_over_direct']:.1f}"]
            rows.append([at_once, names.get(n, n), *over, f"{r['rate']:,.0f}"])
    text = f"What a proxy adds to a call, {result['versions']['cores']} cores of "
    text += f"{result['versions']['cpu']}, against asking the same loopback member directly; "
    text += "`skimp serve` keeps a durable ledger and a budget while it is measured "
    text += "(`gateway.json`):\n\n"
    head = ["requests at once", "", "p50, ms", "p99, ms", "requests/s"]
    return text + table(head, rows)


def decoder():
    result = read("peers")
    timed = [r for r in result["decoder"] if "rate" in r]
    best = "skimp, trees"
    rows = []
    for r in timed:
        times = r["times"].get(best)
        named = f"{r['name']}, {r['precision']}"
        rows.append([named, f"{r['rate']:.1f}", ratio(times) if times else ""])
    texts = timed[0]["texts"]
    text = f"Greedy text of SmolLM2-135M, {texts} prompts, {result['machine']}; the last column is "
    text += "how many times as fast `skimp.generate` is, by prompt with quartiles. More, and "
    text += "encoders, in [docs/peers.md](docs/peers.md) (`peers.json`):\n\n"
    return text + table(["", "tokens/s", f"{best} / it"], rows)


def trees():
    """What trees gain, over all prompts of benchmarks/decode.py."""
    result = read("decode")
    goals = [g for g in result["goals"] if g["way"].startswith("tree")]
    found = {}
    for g in goals:
        against = g["against"].replace(" head", "").partition(" (")[0]
        against = against.replace("EAGLE-2", "EAGLE-2's tree of the same drafts")
        against = against.replace("plain,", "the same kernels one by one,")
        told = f"{g['ratio']:.2f} ({g['low']:.2f}-{g['high']:.2f})"
        found.setdefault(against, {})[g["way"].endswith(" head")] = told
    rows = [[name, by.get(False, ""), by.get(True, "")] for name, by in found.items()]
    minutes = sum(result["head"]["measured"]["seconds"].values()) / 60
    text = f"How many times as fast trees are over {goals[0]['prompts']} prompts of Spec-Bench and "
    text += f"GSM8K, {result['machine']}, and by prompt in quartiles; the head learnt for "
    text += f"{minutes:.0f} minutes from what the model itself wrote (`decode.json`, by family in "
    text += "[docs/decode.md](docs/decode.md)):\n\n"
    return text + table(["against", "n-grams alone", "with a trained head"], rows)


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    parts = "\n".join([quality(), encoder(), trees(), decoder(), blocks(), gpu(), gateway()])
    page = ROOT / "README.md"
    page.write_text(BLOCK.sub(lambda m: m[1] + parts + m[2], page.read_text()))


if __name__ == "__main__":
    main()
