"""Convert SmolLM2-135M from sharded safetensors, with and without ``offload=``, and watch memory.

    python benchmarks/offload.py [--page]

Each conversion is a process of its own, by the short recipe of ``cluster.py``, with stages stored
and the result saved. What is looked at is whether the bits are the same and how much memory the
process takes, not speed. It writes ``benchmarks/results/offload.json``, and from that a section of
``docs/ray.md``.
"""

import argparse
import gc
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

from cluster import CHUNK, EVERY, RECIPE, status
from page import replace_section, table
from skimp.ir.cost import write_atomically
from skimp.ir.errors import out_of_memory
from skimp.ir.measure import machine
from skimp.passes.convert import bytes_of, convert
from skimp.passes.data import embedded_text
from skimp.passes.lift import lifted_layers
from skimp.passes.offload import return_memory
from skimp.runtime.language import windows
from skimp.runtime.models import DECODER, load_decoder, load_pretrained
from skimp.runtime.store import save
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "offload.json"
LENGTH = 64
SPARE = 512 * 2**20
"""Bytes of private memory that a process under a limit may take beyond what it has loaded."""
SHARD = "100MB"


PAGE = """`benchmarks/offload.py` converts SmolLM2-135M, saved as {shards} files, by a short
recipe ({machine}; batches of one text of {batch} tokens, {tokens:,} tokens a pass): {same} of
{tensors} tensors have the same bits in both. Private memory of the process at its peak, in MB
beyond the {idle:.0f} of one that has loaded all it needs; the model is of {bytes:.0f} MB, one
network of {network:.1f} MB:

{table}
With `offload` the process was allowed {spare:.0f} MB of private memory by the kernel
(`RLIMIT_DATA`); {limited}.
"""


class Watch:
    """Peaks of this process's own memory by stage, bytes, and the thread that looks."""

    def __init__(self):
        self.stage, self.peaks = "prepare", defaultdict(int)
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self):
        while True:
            stage, told = self.stage, status("self")["RssAnon"]
            self.peaks[stage] = max(self.peaks[stage], told)
            time.sleep(EVERY)

    def progress(self, stage, done, total, note=""):
        """As a conversion calls it."""
        self.stage = stage


def short(model, data, **more):
    return convert(model, data[1:], held_out=data[:1], passes=RECIPE, expert_size=4, **more)


def warm(data):
    """Load all that a conversion needs, by one of a model that is next to nothing."""
    config = LlamaConfig(
        vocab_size=49152, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    short(LlamaForCausalLM(config).eval(), data[:3])
    return_memory()


def child(args):
    """One conversion: what it took, and a digest of every tensor."""
    loaded = load_decoder(str(args.shards))
    model = loaded.model
    model.model.layers = model.model.layers[: args.layers]
    model.config.num_hidden_layers = len(model.model.layers)
    gc.collect()
    data = windows(loaded.tokenizer, embedded_text(), length=LENGTH, batch=1)
    data = data[: 2 * CHUNK // LENGTH + 1]
    warm(data)
    idle = status("self")
    if args.limited:
        limit = idle["VmData"] + SPARE
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    watch = Watch()
    told = {"layers": len(model.model.layers), "idle": idle["RssAnon"], "failed": None}
    try:
        offload = args.place / "offload" if args.offload else None
        done = short(
            model, data, folder=args.place / "stages", offload=offload, progress=watch.progress
        )
        watch.stage = "save"
        save(done.model, args.place / "model", data[0])
    except (RuntimeError, MemoryError, OSError) as error:
        if not out_of_memory(error):
            raise
        told["failed"] = watch.stage
    else:
        state = done.model.state_dict()
        told["digests"] = {n: hashlib.sha256(bytes_of(t)).hexdigest() for n, t in state.items()}
        told["bytes"] = sum(t.nbytes for t in state.values())
        layer = next(iter(lifted_layers(done.model).values()))
        told["network"] = sum(p.nbytes for p in layer.parameters())
    told["peaks"] = {s: max(0, n - idle["RssAnon"]) for s, n in watch.peaks.items()}
    args.out.write_text(json.dumps(told))


def run(shards, place, *flags):
    """A conversion in a process of its own."""
    with tempfile.TemporaryDirectory(dir=place) as scratch:
        out = Path(scratch) / "told.json"
        command = [sys.executable, __file__, "--place", scratch, "--shards", shards, "--out", out]
        subprocess.run([*map(str, command), *flags], check=True, stdin=subprocess.DEVNULL)
        left = list(Path(scratch).glob("offload/*"))
        told = json.loads(out.read_text())
    print(flags, {k: v for k, v in told.items() if k != "digests"}, left, flush=True)
    return told | {"left": len(left)}


def measure(place):
    """All of them."""
    shards = place / "shards"
    loaded = load_pretrained(DECODER)
    loaded.model.save_pretrained(shards, max_shard_size=SHARD)
    loaded.tokenizer.save_pretrained(shards)
    files = len(list(shards.glob("*.safetensors")))
    del loaded
    found = {
        "offload": run(shards, place, "--limited", "--offload"),
        "limited": run(shards, place, "--limited"),
        "plain": run(shards, place),
        "half": run(shards, place, "--limited", "--offload", "--layers", "15"),
    }
    digests = {name: f.pop("digests", {}) for name, f in found.items()}
    want = digests["plain"]
    return {
        "model": DECODER,
        "machine": machine(),
        "shards": files,
        "recipe": [str(p) for p in RECIPE],
        "tokens": CHUNK,
        "batch": LENGTH,
        "spare": SPARE,
        "tensors": len(want),
        "same": sum(digests["offload"].get(n) == d for n, d in want.items()),
        "runs": found,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="only write the page again")
    parser.add_argument("--layers", type=int, help=argparse.SUPPRESS)
    for flag in ("offload", "limited"):
        parser.add_argument(f"--{flag}", action="store_true", help=argparse.SUPPRESS)
    for path in ("place", "shards", "out"):
        parser.add_argument(f"--{path}", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        return child(args)
    if not args.page:
        # beside the repository: a temporary folder of the system may be memory
        with tempfile.TemporaryDirectory(dir=ROOT.parent) as place:
            found = measure(Path(place))
        write_atomically(RESULTS, json.dumps(found, indent=1).encode() + b"\n")
    write(json.loads(RESULTS.read_bytes()))
    return None


def write(found):
    """The section of the page; the figures stand even where something failed."""
    runs = found["runs"]
    plain, ours, half = (runs[n] for n in ("plain", "offload", "half"))
    stages = [s for s in plain["peaks"] if s in ours["peaks"]]
    rows = [
        [
            f"`{s}`",
            *(f"{r['peaks'][s] / 1e6:.0f}" if s in r["peaks"] else "" for r in (plain, ours, half)),
        ]
        for s in stages
    ]
    head = [
        "stage",
        "in memory",
        "`offload`",
        f"`offload`, {half['layers']} of {ours['layers']} layers",
    ]
    stop = runs["limited"]["failed"]
    limited = (
        f"without it, a conversion under that limit ended in `{stop}`"
        if stop
        else "so was one without it"
    )
    page = PAGE.format(
        **{k: found[k] for k in ("shards", "machine", "batch", "tokens", "same", "tensors")},
        idle=plain["idle"] / 1e6,
        bytes=plain["bytes"] / 1e6,
        network=plain["network"] / 1e6,
        table=table(head, rows),
        spare=found["spare"] / 1e6,
        limited=limited,
    )
    replace_section(ROOT / "docs" / "ray.md", "offload", page)
    if found["same"] != found["tensors"] or ours["failed"] or not stop:
        raise SystemExit("other tensors, or the limit was too small or too large")


if __name__ == "__main__":
    main()
