"""Which feed-forward networks are found, in every model family that transformers ships.

Each family is built short (:mod:`zoo`), exported and searched in a process of its own. What is
found is held against a count that never sees the graph: pairs of linear modules of the module tree
that have the shapes d -> f -> d, among the modules that ran. A site that is not such a pair is a
false one until a person has looked at it.

    .venv/bin/python benchmarks/coverage.py --minutes 5     # goes on where the last call ended
    .venv/bin/python benchmarks/coverage.py --ray HOST:6379 # the same by the workers of a cluster
"""

import argparse
import json
import multiprocessing as mp
import random
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from skimp.ir.cost import write_atomically
from torch import nn
from zoo import build, families, inputs

RESULTS = Path(__file__).parent / "results" / "coverage.json"
TABLE = Path(__file__).parent.parent / "docs" / "coverage.md"
_ATTENTION = re.compile(
    r"(^|\.)((?!\w*norm)\w*(attn|attention)\w*|query|key|value|qkv|[qkv]_proj|in_proj|out_proj)"
    r"(\.|$)",
    re.I,
)


def linears(model: nn.Module, ran: set[str]) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear module that ran and is no part of attention, by path."""
    result = {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if path not in ran or _ATTENTION.search(path) or not isinstance(weight, nn.Parameter):
            continue
        if isinstance(module, nn.Linear):
            result[path] = (module.in_features, module.out_features)
        elif weight.dim() == 2 and hasattr(module, "nf"):  # Conv1D stores [in, out]
            result[path] = (weight.shape[0], weight.shape[1])
    return result


def expected(model: nn.Module, ran: set[str]) -> dict[str, list[str]]:
    """Feed-forward networks by the module tree: the last linear to the one or two before it.

    Partners share the parent; where none does, the parent of the parent, if they follow each other.
    """
    found = linears(model, ran)
    order = {path: i for i, path in enumerate(found)}
    pairs: dict[str, list[str]] = {}
    for down, (f, d) in found.items():
        if f == d:
            continue
        for up in (1, 2):
            home = down.rsplit(".", up)[0]
            near = [
                path
                for path, (i, o) in found.items()
                if i == d and o in (f, 2 * f) and path.rsplit(".", up)[0] == home
            ]
            if not near:
                continue
            # one set of weights serves one network: of d -> f and f -> d the first is the entry
            gap = order[down] - order[near[0 if up == 1 else -1]]
            if gap > 0 and (up == 1 or gap == 1):
                pairs[down] = near
            break
    return pairs


def examine(kind: str, name: str) -> dict[str, Any]:
    """Build, export, search and count one family."""
    from skimp.ir.errors import TraceError
    from skimp.passes.find import find
    from skimp.passes.trace import trace

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        model = build(kind, name)
    except Exception as error:  # of 600 families some need files, packages or parts
        return {"status": "not built", "reason": _line(error)}
    reasons = []
    for modality, batch in inputs(model):
        try:
            gm = trace(model, batch)
        except TraceError as error:
            reasons.append(f"{'+'.join(batch)}: {_line(error)}")
            continue
        result = find(gm)
        ran = {
            re.sub(r"@\d+", "", path)
            for node in gm.graph.nodes
            for path, _ in (node.meta.get("nn_module_stack") or {}).values()
        }
        pairs = expected(model, ran)
        sites = {s.w_out.removesuffix(".weight"): s for s in result.sites}
        last = {n.name: _owner(n) for n in gm.graph.nodes}
        near = {last.get(m.nodes[-1], ""): m.reason for m in result.misses}
        return {
            "status": "searched",
            "modality": modality,
            "inputs": list(batch),
            "expected": len(pairs),
            "found": len(pairs.keys() & sites.keys()),
            "missed": {p: near.get(p, "nothing like it was seen") for p in pairs.keys() - sites},
            "extra": {p: f"{sites[p].d} -> {sites[p].d_ff}" for p in sites.keys() - pairs.keys()},
            "activations": sorted({s.act for s in result.sites}),
            "gated": sorted({s.gated for s in result.sites}),
            "near": dict(Counter(m.reason for m in result.misses)),
            "experts": any(p.dim() == 3 and "expert" in n for n, p in model.named_parameters()),
        }
    return {"status": "not exported", "modality": modality, "reason": " | ".join(reasons)}


def _owner(node: torch.fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
    return re.sub(r"@\d+", "", str(stack[-1][0]))


def _line(error: BaseException) -> str:
    lines = [x.strip() for x in str(error).splitlines() if x.strip()]
    return f"{type(error).__name__}: {(lines or ['?'])[0][:240]}"


def _child(kind: str, name: str, pipe: Any) -> None:
    start = time.monotonic()
    result = examine(kind, name)
    pipe.send(result | {"class": name, "seconds": round(time.monotonic() - start, 1)})


def here(todo: dict[str, str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Examine families, each in a fork of this process, which has imported what they need.

    Yields:
        What came of one, by its model type.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    examine("bert", "BertModel")  # imports what every export needs, once for all forks
    context = mp.get_context("fork")
    end = time.monotonic() + 60 * args.minutes
    waiting = list(todo.items())
    busy: dict[str, tuple[Any, Any, float]] = {}
    while busy or (waiting and time.monotonic() < end):
        while waiting and len(busy) < args.workers and time.monotonic() < end:
            kind, name = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(kind, name, theirs), daemon=True)
            process.start()
            theirs.close()
            busy[kind] = (process, ours, time.monotonic())
        for kind, (process, pipe, start) in list(busy.items()):
            late = time.monotonic() - start > args.timeout
            if not pipe.poll(0.02) and process.is_alive() and not late:
                continue
            try:
                result = pipe.recv() if pipe.poll() else None
            except EOFError:
                result = None
            process.kill()
            process.join()
            del busy[kind]
            if result is None:
                why = f"more than {args.timeout} s" if late else f"ended with {process.exitcode}"
                result = {"status": "no answer", "class": todo[kind], "reason": why}
            yield {kind: result}
        time.sleep(0.02)


def on_cluster(todo: dict[str, str], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same as :func:`here`, by the workers of a Ray cluster, some families a task.

    Yields:
        What came of the families of a task, by model type.

    Raises:
        ClusterError: See :func:`skimp.runtime.cluster.on_ray`.
    """
    from skimp.runtime.cluster import on_ray

    end, kinds = time.monotonic() + 60 * args.minutes, list(todo)

    def parts() -> Iterator[list[str]]:
        for first in range(0, len(kinds), args.part):
            if time.monotonic() < end:
                yield kinds[first : first + args.part]

    with on_ray(args.ray) as each:
        yield from each(
            partial(_in_a_worker, str(Path(__file__).absolute()), args.timeout), parts()
        )


def _in_a_worker(script: str, timeout: float, kinds: list[str]) -> dict[str, Any]:
    """This script once more: a worker of Ray has threads, so it is not what forks for a family."""
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch) / "results.json"
        words = [sys.executable, script, "--results", told, "--timeout", timeout, "--workers", 1]
        done = subprocess.run(
            [*map(str, words), "--only", *kinds], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{script} ended with {done.returncode}: {done.stderr[-1000:]}")
        found: dict[str, Any] = json.loads(told.read_bytes())
        return found


def run(todo: dict[str, str], results: dict[str, Any], args: argparse.Namespace) -> None:
    """Examine families, and store what came of them as it comes."""
    with closing((here if args.ray is None else on_cluster)(todo, args)) as found:
        for some in found:
            results |= some
            for kind, r in some.items():
                if not args.json:
                    print(f"{kind:32} {_short(r)}", flush=True)
            text = json.dumps(results, indent=1, sort_keys=True)
            write_atomically(args.results, text.encode())


def _short(r: dict[str, Any]) -> str:
    if r["status"] != "searched":
        return f"{r['status']}: {r['reason'][:150]}"
    text = f"{r['modality']:7}{r['found']} of {r['expected']}"
    for path, reason in list(r["missed"].items())[:1]:
        text += f"; missed {path}: {reason}"
    return text + (f"; EXTRA {r['extra']}" if r["extra"] else "")


def verdict(r: dict[str, Any]) -> str:
    """One word for a family."""
    if r["status"] != "searched":
        return r["status"]
    if not r["expected"]:
        return "found" if r["extra"] else "no FFN"
    if r["found"] == r["expected"]:
        return "found"
    return "partly" if r["found"] else ("near miss" if r["near"] else "none")


def summary(results: dict[str, Any]) -> dict[str, dict[str, int]]:
    """How many families of each modality came to which verdict."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    for r in results.values():
        table[r.get("modality", "unknown")][verdict(r)] += 1
    return {m: dict(c) for m, c in sorted(table.items())}


_WORDS = {
    "found": "every FFN found",
    "partly": "some found",
    "near miss": "none, with a reason",
    "none": "none",
    "no FFN": "has none of this form",
    "not exported": "not exported",
    "not built": "not built",
    "no answer": "no answer",
}


_PAGE = """\
# Which architectures are found

Written by `benchmarks/coverage.py` from `benchmarks/results/coverage.json`. Every family of models
that transformers ships is built short from its default config, exported with inputs made from its
signature, and searched; neither skimp nor the benchmark knows one by name. What is found is held
against a count that never sees the graph: pairs of linear modules d -> f -> d in the module tree,
among the modules that ran.

{table}
A family that has none of this form is made of convolutions or state spaces, or keeps its experts in
one tensor of three dimensions, so it is a mixture of experts already. One that is not built needs a
package or a config of its own; one that is not exported needs inputs that its signature does not
tell, or branches on values.

## Sites beyond the count

Networks d -> f -> d that the count does not see, since f = d or since their two linears are not
siblings. Each was looked at: they are feed-forward networks.

{extra}
## What is not found, and why

{missed}
## What was not searched

{silent}"""


def page(results: dict[str, Any]) -> str:
    """The page of the docs, from the results."""
    counts, kinds = summary(results), ("text", "vision", "audio", "other", "unknown")
    columns = [w for w in _WORDS if any(w in counts.get(m, {}) for m in kinds)]
    rows = []
    for modality in (m for m in kinds if m in counts):
        row = counts[modality]
        hold = sum(row.get(w, 0) for w in ("found", "partly", "near miss", "none"))
        share = f"{row.get('found', 0) / hold:.0%} of {hold}" if hold else "-"
        name = "not known" if modality == "unknown" else modality
        rows.append([name, *(str(row.get(w, 0)) for w in columns), share])
    head = ["", *(_WORDS[w] for w in columns), "every FFN found, of those that hold one"]
    extra, missed, silent = [], [], []
    for kind, r in sorted(results.items()):
        if sites := r.get("extra"):
            extra.append([kind, ", ".join(f"`{p}` {w}" for p, w in sites.items())])
        if verdict(r) in ("partly", "near miss", "none"):
            path, reason = next(iter(r["missed"].items()))
            missed.append([kind, f"{r['found']} of {r['expected']}", f"`{path}`", reason])
        if r["status"] != "searched":
            reason = r["reason"].split(" | ")[-1].replace("|", "/").replace("\n", " ")
            silent.append([kind, r["status"], f"`{reason[:160]}`"])
    return _PAGE.format(
        table=_table(head, rows),
        extra=_table(["family", "sites"], extra) if extra else "None.\n",
        missed=_table(["family", "found", "first that is missed", "reason"], missed),
        silent=_table(["family", "", "reason"], silent),
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1e9, help="stop starting after so long")
    parser.add_argument("--workers", type=int, default=2, help="families at once, without --ray")
    parser.add_argument("--timeout", type=float, default=120, help="seconds per family")
    parser.add_argument("--ray", help="a cluster, HOST:PORT, with this checkout on every node")
    parser.add_argument("--part", type=int, default=8, help="families a task of the cluster")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="of another file no page is written"
    )
    parser.add_argument("--only", nargs="*", help="model types, again even if known")
    parser.add_argument("--again", nargs="*", default=[], help="verdicts to examine again")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    held = args.results
    results: dict[str, Any] = json.loads(held.read_text()) if held.exists() else {}
    known = list(families().items())
    random.Random(0).shuffle(known)  # so that a part of them is a fair sample
    todo = {
        kind: name
        for kind, name in known
        if (kind in args.only if args.only else kind not in results)
        or (kind in results and verdict(results[kind]) in args.again)
    }
    run(todo, results, args)
    if held == RESULTS:
        write_atomically(TABLE, page(results).encode())
    if args.json:
        print(json.dumps(results))
        return
    for modality, counts in summary(results).items():
        print(modality, counts)


if __name__ == "__main__":
    main()
