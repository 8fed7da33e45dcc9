"""Decode SmolLM2-135M by every way there is, prompt by prompt in turn, and tell who was faster.

Prompts are Spec-Bench's six families (chat is MT-Bench) and GSM8K, from $SKIMP_DATA. Each prompt
runs by every way before the next one does; where a round begins is shifted from prompt to prompt.
Results are a file per way and prompt, so that it may be stopped at any time, or run in slices
(--seconds): start it again with the same arguments and it goes on where it was. Greedy texts of
float32 must be the model's own, token by token; bfloat16's trees must equal its plain decoding.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
from decode_report import summary, write_docs
from decode_ways import BATCHED, REFERENCES, WAYS, Bench
from safetensors import safe_open
from skimp.ir.cost import write_atomically
from skimp.ir.errors import VerificationError
from skimp.ir.measure import machine
from skimp.passes.data import data_file
from skimp.runtime.models import DECODER, load_decoder
from skimp.runtime.tree.head import FILE

SUB = {"writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"}
FAMILIES = ("chat", "translation", "summarization", "qa", "math_reasoning", "rag", "gsm8k")
LONGEST = 1024
"""Prompts of more tokens are left out: on a CPU they measure the prompt's pass."""


def encoded(tokenizer, text):
    """Tokens of a chat whose first turn is the text."""
    turns = [{"role": "user", "content": text}]
    return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))


def prompts(tokenizer, count):
    """Tokens by name, family by family in turn: ``family-0`` of each, then ``family-1``, .."""
    found = {family: [] for family in FAMILIES}
    for line in data_file("spec_bench", "question.jsonl").read_text().splitlines():
        row = json.loads(line)
        family = "chat" if row["category"] in SUB else row["category"]
        found[family].append(row["turns"][0])
    for line in data_file("gsm8k", "test.jsonl").read_text().splitlines()[: 4 * count]:
        found["gsm8k"].append(json.loads(line)["question"])
    chosen = {}
    for family, texts in found.items():
        step = max(1, len(texts) // (2 * count))  # spread over the family, with some to spare
        kept = 0
        for text in texts[::step]:
            ids = encoded(tokenizer, text)
            if len(ids) <= LONGEST and kept < count:
                chosen[f"{family}-{kept}"] = ids
                kept += 1
    return {f"{f}-{i}": chosen[f"{f}-{i}"] for i in range(count) for f in FAMILIES}


def items(found):
    """What is run: single prompts by name, then batches of eight of different families."""
    names = list(found)
    single = [(name, [found[name]]) for name in names]
    batches = [
        (f"batch-{i // 8}", [found[n] for n in names[i : i + 8]])
        for i in range(0, len(names) - 7, 8)
    ]
    return single, batches


def check(folder, way, name, texts, near_ties, references=REFERENCES):
    """Compare with the way whose text it must give.

    Raises:
        VerificationError: They differ, and not at a near tie.
    """
    reference = references.get(way)
    path = folder / str(reference) / f"{name}.json"
    if reference is None or not path.exists():
        return 0
    wanted, ties = json.loads(path.read_text())["texts"], 0
    for row, (got, want) in enumerate(zip(texts, wanted, strict=True)):
        if got == want:
            continue
        at = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), None)
        gap = near_ties(row, want, len(want) if at is None else at)
        if not gap < 1e-3:
            raise VerificationError(
                f"{way} on {name}: text {row} differs from that of {reference} at token {at}, "
                f"where the likeliest two are {gap:.2g} apart; a speedup would mean nothing"
            )
        ties += 1
    return ties


def trained(head):
    """What a head says of its training."""
    if head is None:
        return None
    with safe_open(head / FILE, "pt") as file:
        return json.loads(file.metadata()["skimp-head"])["note"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=10, help="of each family")
    parser.add_argument("--tokens", type=int, default=128, help="new ones, at most")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1e9, help="then stop; go on another time")
    parser.add_argument("--only", default="", help="names of ways; x* for all that begin so")
    parser.add_argument("--batches", type=int, default=2, help="of eight prompts")
    parser.add_argument("--sparse", type=Path, help="converted model, for the sparse self-drafter")
    parser.add_argument("--head", type=Path, help="of benchmarks/decode_head.py")
    parser.add_argument("--quick", action="store_true", help="one prompt of each family, 32 tokens")
    parser.add_argument("--report", action="store_true", help="only write the report")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("out/decode"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode.json"))
    parser.add_argument("--docs", type=Path, default=Path("docs/decode.md"))
    args = parser.parse_args()
    if args.quick:
        args.prompts, args.tokens, args.batches = 1, 32, 0
        args.folder, args.docs = args.folder.with_name("decode-quick"), None
        args.out = args.folder / "decode.json"
    end = time.monotonic() + args.seconds
    torch.set_num_threads(args.threads)

    def log(text):
        if not args.json:
            print(text, flush=True)

    def finish():
        result = summary(args.folder)
        write_atomically(args.out, json.dumps(result, indent=1).encode())
        if args.docs:
            write_atomically(args.docs, write_docs(result).encode())
        if args.json:
            print(json.dumps(result))

    if args.report:
        finish()
        return
    loaded = load_decoder(DECODER)
    bench = Bench(loaded, args.tokens, sparse=args.sparse, head=args.head, log=log)
    found = prompts(loaded.tokenizer, args.prompts)
    about = dict(
        machine=machine(), threads=args.threads, torch=torch.__version__, model=DECODER,
        tokens=args.tokens, prompts=args.prompts, longest_prompt=LONGEST, head=trained(args.head),
    )  # fmt: skip
    write_atomically(args.folder / "about.json", json.dumps(about).encode())
    wanted = tuple(filter(None, args.only.split(",")))
    single, batches = items(found)
    alone, together = bench.ways(WAYS, wanted), bench.ways(BATCHED, wanted)
    turns = [(item, alone) for item in single]
    turns += [(item, together) for item in batches[: args.batches]]
    for turn, ((name, rows), ways) in enumerate(turns):
        first = turn % max(len(ways), 1)
        order = ways[first:] + ways[:first]
        order.sort(key=lambda w: w in REFERENCES)  # what others are compared with comes first
        for way in order:
            path = args.folder / way / f"{name}.json"
            if path.exists():
                continue
            if time.monotonic() > end:
                finish()
                return
            record = bench.run(way, rows)
            record["load"] = os.getloadavg()[0]
            record["ties"] = check(args.folder, way, name, record["texts"], bench.gap(rows))
            write_atomically(path, json.dumps(record).encode())
            rate = record["tokens"] / record["seconds"]
            log(f"{name:18} {way:24} {record['tokens']:4} tokens, {rate:6.1f}/s")
    finish()
    log("all done")


if __name__ == "__main__":
    main()
