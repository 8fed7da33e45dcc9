"""The page of a decoder made sparse, written from what benchmarks/decoder.py measured."""

import json
from pathlib import Path

from page import table

ROOT = Path(__file__).parents[1]
KINDS = {
    "dense": "dense",
    "best neurons": "best neurons, chosen in hindsight",
    "converted": "converted",
    "allotted": "converted, experts allotted to blocks by what each loses",
}


def write_page(result):
    """The page, in Markdown."""
    options, text = result["options"], result["text"]
    minutes, size = result["minutes"], options["expert_size"]
    best, speed = result["within_5_percent"], result["decode"]
    rows = [
        [
            KINDS[r["kind"]], f"{r['share']:.0%}", f"{r['ffn']:.1%}",
            "" if r["whole"] != r["whole"] else f"{r['whole']:.1%}", f"{r['perplexity']:.2f}",
            "" if r["kl"] is None else f"{r['kl']:.3f}",
        ]
        for r in result["frontier"]
    ]  # fmt: skip
    head = ["model", "experts that run", "network FLOPs", "all FLOPs", "perplexity", "KL, held out"]
    if best is None:
        found = "No threshold that was tried keeps perplexity within 5 % of the dense model's."
    else:
        found = (
            f"Within 5 % of the dense model's perplexity **{best['ffn']:.1%}** of the FLOPs of\n"
            f"its networks are left, routers included ({best['whole']:.1%} of all), at a\n"
            f"perplexity of {best['perplexity']:.2f}."
        )
    device = result["device"]
    page = f"""# A decoder made sparse

Written by `python benchmarks/decoder.py` from `benchmarks/results/decoder.json`.
{result["model"]}, float32, {device}, torch {result["torch"]}.
Its gated networks keep SiLU and are cut into experts of {size} neurons. Routers are trained, and
for {minutes:.0f} minutes in all everything is, while {float(options["share"]):.0%} of the experts
run. No labels: the loss is the divergence from the dense model's next tokens, on text that Python
carries. Perplexity is of WikiText-2 (validation), {text["tokens"]:,} tokens in windows of
{text["window"]} without overlap. *Best neurons* is a bound: the neurons of the largest outputs,
found by computing them all.

{found}

{table(head, rows)}"""
    if speed is not None:
        load = result.get("load")
        alone = "Whether others used the machine was not recorded."
        if load is not None:
            alone = f"The load average was {load:.1f}."
        rates = speed["tokens_per_second"]
        lines = []
        for name, rate in rates.items():
            told = ""
            if ratio := speed["speedup"].get(name):
                told = f"{ratio['median']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
            lines.append([name, f"{rate:.1f}", told])
        head = ["decoding one token at a time", "tokens per second", "converted is times as fast"]
        page += f"""
At {speed["share"]:.0%} of experts, all compiled, interleaved, medians with quartiles. {alone}

{table(head, lines)}"""
    return page


if __name__ == "__main__":
    found = json.loads((ROOT / "benchmarks/results/decoder.json").read_text())
    (ROOT / "docs/decoder.md").write_text(write_page(found))
