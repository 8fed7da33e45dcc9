"""Time of one decoding step by rows and context: the generated step against its rivals.

A step runs a chain of tokens below a text, of which nothing is kept: one row is plain decoding,
more is verifying drafted tokens. Rivals are the model's own code in transformers, the same through
torch.compile with a static cache (one row), and llama.cpp at its defaults, if llama-cpp-python is
installed. Runs are interleaved, and refused if the logits disagree. Reading rates are of the
weights alone: layers and output layer, once per step.

Several runs may fill one file: what is measured replaces what is there.
"""

import argparse
import json
from pathlib import Path

import torch
from block import bandwidth
from llamacpp import LlamaCpp, gguf_file, installed
from skimp.ir.cost import write_atomically
from skimp.ir.measure import agree, compare, machine
from skimp.runtime.models import DECODER, load_pretrained
from skimp.runtime.tree.fused import FusedTarget

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTEXTS = (64, 512, 1536)
TYPES = {"float32": "F32", "bfloat16": "BF16"}
# llama.cpp keeps keys and values in float16 whatever its weights are
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2, "F32": 2e-2, "BF16": 5e-2, "Q8_0": 1e-1}


class Own:
    """The model's own code, with a cache that grows."""

    def __init__(self, model):
        self.model = model

    def prefill(self, text):
        """Begin with a text."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        self.run(text)

    def run(self, tokens):
        """Logits of more tokens."""
        ids = torch.tensor([tokens])
        return self.model(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[0]

    def step(self, tokens):
        """Logits of a chain below the text."""
        logits = self.run(tokens)
        self.cache.crop(-len(tokens))
        return logits


class Compiled:
    """One row through torch.compile, with a static cache."""

    def __init__(self, model):
        self.model = model

    def prefill(self, text):
        """Begin with a text."""
        from transformers import StaticCache

        torch.compiler.reset()
        self.length = len(text)
        self.cache = StaticCache(config=self.model.config, max_cache_len=len(text) + 64)
        self.model(input_ids=torch.tensor([text]), past_key_values=self.cache, use_cache=True)
        self.fast = torch.compile(self.model, fullgraph=True, dynamic=False)

    def step(self, tokens):
        """Logits of a chain below the text."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)
        ids = torch.tensor([tokens])
        return self.fast(input_ids=ids, past_key_values=self.cache, use_cache=True).logits[0]


class Fused:
    """The generated step."""

    def __init__(self, model, dtype):
        self.target = FusedTarget(model, dtype=dtype)

    def prefill(self, text):
        """Begin with a text."""
        self.target.prefill([text])

    def step(self, tokens):
        """Logits of a chain below the text."""
        return self.target.verify([torch.tensor(tokens)], [torch.arange(-1, len(tokens) - 1)])[0]


def weight_bytes(model, dtype):
    """Of all matrices that a step reads whole; the embedding is the output layer."""
    count = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    return count * torch.empty(0, dtype=dtype).element_size()


def measure(rivals, tokens, seconds):
    """All rivals on a chain of tokens."""
    calls = {name: (lambda r=rival: r.step(tokens)) for name, rival in rivals.items()}
    want = calls["transformers"]().clone()
    for name, call in calls.items():
        agree(call(), want, name, TOLERANCE.get(name.rpartition(" ")[2], 1e-3))
    # idle threads of llama.cpp spin for a tenth of a second, and would take a core from the next
    result = compare(
        calls, "skimp float32", seconds=seconds, rest=0.2 * (torch.get_num_threads() > 1)
    )
    return {"rows": len(tokens), **result.as_dict()}


HEAD = """# One decoding step

Written by `python benchmarks/decode_step.py` from `benchmarks/results/decode_step.json`.

A step takes some rows, each a token with its parent, through the whole decoder: one row is plain
decoding, more verify drafted tokens, in one call of generated C++ (`skimp/codegen/cpp/decoder.py`).
What a row gets does not depend, to the bit, on the rows beside it, so greedy text with trees is
that of plain decoding. Weights are read once per step, whatever the rows; from where products take
longer than reading, time rises with them.

`FusedTarget(model, dtype=..., blocks=...)` makes one of a model of the Llama kind. With `blocks`,
converted networks, `verify(.., sparse=True)` runs only the experts that routers choose at
`threshold(tau)`, and writes keys and values behind the same committed text: the sparse form drafts,
and `verify` of the dense one overwrites what it left. `verify(.., grow=True)` adds nodes below
those of the calls before.
"""


def table(found):
    """Markdown: milliseconds by rival and rows, and GB/s of weights at one row."""
    sizes, text = found["weight_bytes"], HEAD
    text += (
        f"\n{found['model']}, {found['machine']}. Medians of interleaved runs in milliseconds, by "
    )
    text += "rows; GB/s are of weights at one row. Reading memory alone reached "
    text += f"{found['bandwidth'] / 1e9:.1f} GB/s. {found['note']}\n"
    for context, rows in found["contexts"].items():
        names = dict.fromkeys(n for r in rows.values() for n in r["timings"])
        text += f"\n## {context} tokens before it\n\n| | {' | '.join(rows)} | GB/s |\n"
        text += "| --- |" + " ---: |" * (len(rows) + 1) + "\n"
        for name in names:
            times = [r["timings"].get(name) for r in rows.values()]
            cells = [f"{1e3 * t['median']:.1f}" if t else "" for t in times]
            size = sizes.get(name.rpartition(" ")[2], sizes["float32"])
            one = rows.get("1", {"timings": {}})["timings"].get(name)
            cells.append(f"{size / one['median'] / 1e9:.1f}" if one else "")
            text += f"| {name} | {' | '.join(cells)} |\n"
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--seconds", type=float, default=4.0, help="per number of rows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compiled", action="store_true")
    parser.add_argument("--note", default="", help="on the circumstances, for the page")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/decode_step.json"))
    parser.add_argument("--docs", type=Path, default=Path("docs/decode_step.md"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    model = load_pretrained(DECODER).model
    rivals = {f"skimp {n}": Fused(model, getattr(torch, n)) for n in TYPES}
    rivals["transformers"] = Own(model)
    if not args.no_compiled:
        rivals["torch.compile"] = Compiled(model)
    if installed():
        room = max(args.contexts) + 256
        rivals |= {f"llama.cpp {k}": LlamaCpp(gguf_file(k), room) for k in ("F32", "BF16", "Q8_0")}
    sizes = {n: weight_bytes(model, getattr(torch, n)) for n in TYPES}
    sizes |= {TYPES[n]: sizes[n] for n in TYPES} | {"Q8_0": sizes["bfloat16"] * 34 // 64}
    found = json.loads(args.out.read_text()) if args.out.exists() else {"contexts": {}}
    found |= {"model": DECODER, "machine": machine(), "weight_bytes": sizes, "note": args.note}
    found["bandwidth"] = max(found.get("bandwidth", 0.0), bandwidth())
    generator = torch.Generator().manual_seed(0)
    for context in args.contexts:
        text = torch.randint(1000, 40_000, (context,), generator=generator).tolist()
        chain = torch.randint(1000, 40_000, (max(args.rows),), generator=generator).tolist()
        for rival in rivals.values():
            rival.prefill(text)
        rows = found["contexts"].setdefault(str(context), {})
        for n in args.rows:
            some = {k: r for k, r in rivals.items() if n == 1 or not isinstance(r, Compiled)}
            rows[str(n)] = measure(some, chain[:n], args.seconds)
            found["contexts"][str(context)] = {k: rows[k] for k in sorted(rows, key=int)}
            write_atomically(args.out, json.dumps(found, indent=1).encode())
    text = table(found)
    write_atomically(args.docs, text.encode())
    print(json.dumps(found) if args.json else text)


if __name__ == "__main__":
    main()
