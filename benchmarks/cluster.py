"""Convert SmolLM2-135M in one process, and on a cluster of two nodes of which a worker is killed.

    python benchmarks/cluster.py [--page]

Both nodes are on this machine: what is looked at is whether the bits are the same and how much
memory the workers take, not speed. The recipe is short, so the model is of no use. It writes
``benchmarks/results/cluster.json``, and from that a section of ``docs/ray.md``.
"""

import argparse
import contextlib
import json
import os
import signal
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch
from page import replace_section, table
from skimp.ir.cost import write_atomically
from skimp.ir.measure import machine
from skimp.passes.budget import Budget
from skimp.passes.convert import convert
from skimp.passes.data import embedded_text
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify
from skimp.runtime.cluster import on_ray
from skimp.runtime.language import windows
from skimp.runtime.models import DECODER, load_pretrained

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cluster.json"
CHUNK = 2048
RECIPE = [
    Relufy(),
    Sparsify(tokens=2 * CHUNK, chunk=CHUNK, epochs=1),  # two chunks: optimisers travel too
    Split(rows=CHUNK),
    Route(tokens=CHUNK, steps=5, relative=True),
    Recover(steps=1, relative=True),
    Budget("flops <= 0.7"),
]
EVERY = 0.005
"""Seconds between two looks at the memory of workers."""
PAGE = """`benchmarks/cluster.py` converts SmolLM2-135M by a short recipe on two nodes of one
machine ({machine}), one worker killed in the middle of a layer: {same} of {tensors} tensors have
the bits of the conversion in one process. What a worker takes at most, in MB beyond the
{alone:.0f} of one that has loaded all it needs:

{table}
A layer of `sparsify` is {weights:.1f} MB of weights (its own, and those it learns from),
{gradients:.1f} MB of gradients, {moments:.1f} MB of the optimiser's state and {inputs:.1f} MB of
inputs ({tokens:,} tokens). What is computed on the way is not counted in it.
"""


def reported(work, marker, item):
    """On a worker: the work, and who did it; the first layer's is killed while it does."""
    if marker is not None and not marker.exists():
        marker.write_text(str(os.getpid()))
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()
        time.sleep(0.2)
    return os.getpid(), work(item)


def idle(item):
    """On a worker: next to no work, but of the kind that loads all that it needs."""
    import skimp.passes.convert  # noqa: F401

    small = torch.nn.Linear(64, 64)
    optimizer = torch.optim.Adam(small.parameters(), fused=True)
    small(torch.ones(32, 64)).square().mean().backward()
    optimizer.step()
    time.sleep(1)


class Memory:
    """Peaks by stage and worker, bytes: of what is a worker's own, and with shared pages."""

    def __init__(self):
        self.stage, self.pids, self.own, self.all = "", set(), {}, {}
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self):
        while True:
            stage = self.stage
            for pid in list(self.pids):
                with contextlib.suppress(OSError, KeyError):  # it has ended
                    told = status(pid)
                    for found, key in ((self.own, "RssAnon"), (self.all, "VmRSS")):
                        found[stage, pid] = max(found.get((stage, pid), 0), told[key])
            time.sleep(EVERY)

    def watching(self, each, marker=None):
        """The same as ``each`` does, the memory of those who do it watched."""

        def other(work, items):
            self.stage = getattr(getattr(work, "func", work), "__self__", None)
            self.stage = self.stage.name if self.stage is not None else "idle"
            for pid, result in each(partial(reported, work, marker), items):
                self.pids.add(pid)
                yield result

        return other

    def by_stage(self):
        """``{stage: (own, all)}``, of the worker that took most."""
        return {
            s: tuple(max(n for (t, _), n in f.items() if t == s) for f in (self.own, self.all))
            for s in dict.fromkeys(s for s, _ in self.own)
        }


def status(pid):
    """Memory of a process by the names of ``/proc``, bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {
        k: 1024 * int(v.split()[0]) for k, _, v in (x.partition(":") for x in lines) if "kB" in v
    }


@contextlib.contextmanager
def two_nodes():
    """The address of a cluster of two nodes with a worker each."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # or Ray leaves loopback
    from ray.cluster_utils import Cluster

    node = dict(num_cpus=1, object_store_memory=400 * 2**20)
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        cluster.add_node(**node)
        yield cluster.address
    finally:
        cluster.shutdown()


def size(value):
    """Bytes of the tensors in what travels."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, torch.nn.Module):
        return sum(t.nbytes for t in (*value.parameters(), *value.buffers()))
    return 0


def run(folder):
    """Both conversions, what came of them, and what a layer of sparsify takes."""
    layer = {}

    def looked_at(work, items):
        """``map``, which looks at the first layer of sparsify."""
        for item in items:
            if not layer and isinstance(getattr(work, "func", work).__self__, Sparsify):
                block, teacher, inputs, _ = item
                learns = [p for n, p in block.named_parameters() if not n.startswith("router.")]
                layer["weights"], layer["inputs"] = size(block) + size(teacher), size(inputs)
                layer["moments"] = 2 * sum(map(size, learns))
            yield work(item)

    loaded = load_pretrained(DECODER)
    data = windows(loaded.tokenizer, embedded_text(), length=256, batch=4)[: 2 * CHUNK // 1024 + 1]

    def converted(each):
        done = convert(
            loaded.model, data[1:], held_out=data[:1], passes=RECIPE, expert_size=4, each=each
        )
        return done.model.state_dict()

    want = converted(looked_at)
    with two_nodes() as address, on_ray(address) as each:
        memory = Memory()
        list(memory.watching(each)(idle, range(4)))
        list(memory.watching(each)(idle, range(4)))  # now that they are known
        marker = folder / "killed"
        got = converted(memory.watching(each, marker))
        killed, peaks = Path("/proc", marker.read_text()), memory.by_stage()
        print({s: f"{a / 1e6:.0f}, {b / 1e6:.0f} MB" for s, (a, b) in peaks.items()}, flush=True)
        if killed.exists() or got.keys() != want.keys():
            raise SystemExit("other tensors, or nobody was killed")
    other = [k for k in want if not torch.equal(got[k], want[k])]
    own, everything = peaks.pop("idle")
    return {
        "model": DECODER,
        "machine": machine(),
        "recipe": [str(p) for p in RECIPE],
        "tokens": CHUNK,
        "tensors": len(want),
        "same": len(want) - len(other),
        "first_other": other[:1],
        "bytes": sum(t.nbytes for t in want.values()),
        "workers": len(memory.pids),
        "layer": layer,
        "idle": {"own": own, "all": everything},
        "peak": {s: {"own": a - own, "all": b - everything} for s, (a, b) in peaks.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--page", action="store_true", help="only write the page again")
    if not parser.parse_args().page:
        with tempfile.TemporaryDirectory() as folder:
            found = run(Path(folder))
        write_atomically(RESULTS, json.dumps(found, indent=1).encode() + b"\n")
    found = json.loads(RESULTS.read_bytes())
    layer, peak = found["layer"], found["peak"]
    layer["gradients"] = layer["moments"] / 2  # Adam keeps two numbers for each of them
    two = 2 * sum(layer.values())
    rows = [[f"`{s}`", *(f"{p[k] / 1e6:.0f}" for k in ("own", "all"))] for s, p in peak.items()]
    rows.append(["two layers", f"{two / 1e6:.0f}", ""])
    told = table(["pass", "its own", "with what it saw of the object store"], rows)
    sizes = {k: v / 1e6 for k, v in layer.items()}
    page = PAGE.format(table=told, alone=found["idle"]["own"] / 1e6, **found, **sizes)
    replace_section(ROOT / "docs" / "ray.md", "cluster", page)
    if found["first_other"]:
        raise SystemExit(f"{found['tensors'] - found['same']} tensors differ")
    if max(p["own"] for p in peak.values()) > two:
        raise SystemExit("a worker took more than two layers")


if __name__ == "__main__":
    main()
