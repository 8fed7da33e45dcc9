"""Train the head that benchmarks/decode.py drafts with, on prompts that it does not time.

    python benchmarks/decode_head.py --minutes 40 --out out/head

They are the rest of Spec-Bench's and of GSM8K's, and LLMBar's instructions; the answers are the
model's own. Started again with the same options, it goes on where it was. What it measured is in
the head, and docs/decode.md says it.
"""

import argparse
import json
from pathlib import Path

import torch
from decode import encoded, prompts
from skimp.cli_console import progress
from skimp.passes.data import data_file
from skimp.runtime.models import DECODER, load_decoder
from skimp.runtime.tree.fused import FusedTarget
from skimp.runtime.tree.train import Recipe, train

TIMED = 10
"""Of each family, by benchmarks/decode.py."""


def others(tokenizer):
    """Tokens of prompts for training."""
    texts = []
    for line in data_file("spec_bench", "question.jsonl").read_text().splitlines():
        texts.append(json.loads(line)["turns"][0])
    for line in data_file("gsm8k", "test.jsonl").read_text().splitlines()[4 * TIMED :][:400]:
        texts.append(json.loads(line)["question"])
    for path in sorted(
        data_file("llmbar", "Natural", "dataset.json").parents[1].glob("*/dataset.json")
    ):
        texts += [pair["input"] for pair in json.loads(path.read_text())]
    timed = {tuple(ids) for ids in prompts(tokenizer, TIMED).values()}
    found = dict.fromkeys(tuple(encoded(tokenizer, text)) for text in texts)
    return [ids for ids in found if ids not in timed]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=40.0, help="to write text and train")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("out/head"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    loaded = load_decoder(DECODER)
    asked = others(loaded.tokenizer)
    stop = frozenset([loaded.model.generation_config.eos_token_id])
    bars, told = progress()
    with bars:
        found = train(
            FusedTarget(loaded.model), asked, args.out, Recipe(minutes=args.minutes), stop=stop,
            progress=lambda stage, done, total, note="": told(stage, done, total),
        )  # fmt: skip
    print(json.dumps(found | {"prompts": len(asked)}))


if __name__ == "__main__":
    main()
