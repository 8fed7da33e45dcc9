"""Run passes in order: copy, apply, verify, record; store each finished stage and go on from it."""

import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from ..ir import artefact
from ..ir.cost import write_atomically
from ..ir.errors import ArtefactError, VerificationError, out_of_memory
from ..ir.text import BlockLine
from .base import Context, Pass, call, not_finite
from .data import Batch
from .layers import Layers, forget
from .lift import blocks
from .offload import Offload


def run(
    passes: Sequence[Pass],
    gm: GraphModule,
    context: Context,
    *,
    folder: Path | None = None,
    identity: str = "",
    by_layer: bool = False,
) -> tuple[GraphModule, list[dict[str, Any]]]:
    """Apply passes one after another.

    Args:
        passes: In order.
        gm: A graph with blocks; it stays as it is.
        context: What the passes work with.
        folder: Where each finished stage is stored. A run that finds the same passes (or the
            first of them) finished there for the same ``identity`` goes on after them.
        identity: What else a stored stage depends on: the data and the model.
        by_layer: Within a stage, store each layer too, and go on from these.

    Returns:
        The graph, and one record per pass: its spec, seconds, whether it changed the graph,
        and its statistics.

    Raises:
        VerificationError: A pass broke the graph; names the passes before it.
        ClusterError: A pass that is the first process's work changed more than blocks.
    """
    fuel = int(os.environ.get("SKIMP_FUEL", len(passes)))
    plan = [str(p) for p in passes[:fuel]]
    ranks, offload = context.ranks, context.offload
    history: list[dict[str, Any]] = []
    if ranks.first:
        gm, history = _resume(gm, plan, folder, identity, offload)
        verify(gm, context.held_out[0], "the input", [])
    if ranks.told(lambda: bool(history)):
        gm = gm if ranks.first else offload.copy(gm)
        history = ranks.follow(gm, offload, history)
    for p in passes[len(history) : fuel]:
        start = time.monotonic()
        gm = offload.copy(gm)
        context.progress(p.name, 0, 1)
        record: dict[str, Any] = {}
        if ranks.first or p.together:
            kept: AbstractContextManager[None] = nullcontext()
            if by_layer and folder is not None:
                so_far = " | ".join([identity, *plan[: len(history) + 1]])
                kept = Layers(folder, so_far).kept(context)
            with kept:
                result = p.run(gm, context)
            gm, seconds = result.gm, time.monotonic() - start
            record = {
                "pass": str(p),
                "seconds": round(seconds, 3),
                "modified": result.modified,
                "stats": result.stats,
            }
        if ranks.first:
            verify(gm, context.held_out[0], p.name, [str(r["pass"]) for r in history])
        record = ranks.follow(gm, offload, record)
        if record["modified"]:
            _mark(gm, p.name)
        history.append(record)
        if not ranks.first:
            continue
        context.progress(p.name, 1, 1, f"took {seconds:.0f} s")
        _dump(gm, len(history), p.name, seconds)
        if folder is not None:
            artefact.write(folder, gm, {"identity": identity, "history": history})
            forget(folder)
    if folder is not None:
        forget(folder)  # what was killed a moment ago had not come to it
    return gm, history


def verify(gm: GraphModule, batch: Batch, name: str, before: Sequence[str]) -> None:
    """Check that a graph is well formed, its parameters finite, and that it runs.

    Raises:
        VerificationError: It is not, with the pass to blame.
    """
    after = f" (after {', '.join(before)})" if before else ""
    try:
        gm.graph.lint()
        with torch.no_grad():
            call(gm, batch)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        if out_of_memory(error):
            raise  # no fault of the pass
        raise VerificationError(f"{name}{after} left a graph that does not run: {error}") from error
    if bad := not_finite(gm):
        raise VerificationError(
            f"{name}{after} left values that are not finite in {', '.join(bad[:5])}; "
            "repair the checkpoint, or lower the pass's learning rate"
        )


def _resume(
    gm: GraphModule, plan: Sequence[str], folder: Path | None, identity: str, offload: Offload
) -> tuple[GraphModule, list[dict[str, Any]]]:
    if folder is None or not (folder / artefact.INDEX).exists():
        return gm, []
    try:
        record = artefact.read_index(folder)["record"]
    except ArtefactError:
        return gm, []
    history: list[dict[str, Any]] = record.get("history", [])
    done = [str(r["pass"]) for r in history]
    if record.get("identity") != identity or done != list(plan[: len(done)]):
        return gm, []
    resumed = offload.copy(gm)
    try:
        artefact.read_into(folder, resumed)
    except ArtefactError:  # damaged since: begin again rather than go on from it
        return gm, []
    return offload.move(resumed), history


def _mark(gm: GraphModule, name: str) -> None:
    """Note on every block's node which pass touched it."""
    names = set(blocks(gm))
    for node in gm.graph.nodes:
        if node.op == "call_module" and node.target in names:
            node.meta["skimp.provenance"] = (*node.meta.get("skimp.provenance", ()), name)


def _dump(gm: GraphModule, index: int, name: str, seconds: float) -> None:
    """Write the graph after a pass into the folder that ``SKIMP_DUMP`` names."""
    target = os.environ.get("SKIMP_DUMP")
    if not target:
        return
    lines = [f"# after {name}, which took {seconds * 1000:.0f} ms"]
    lines += [f"# {BlockLine.of(n, b)}" for n, b in blocks(gm).items()]
    text = "\n".join([*lines, gm.print_readable(print_output=False)])
    write_atomically(Path(target) / f"{index:02}-{name}.py", text.encode())


def spec(passes: Sequence[Pass]) -> str:
    """The pipeline as text: the same in the record, the cache key and the command line."""
    return " | ".join(str(p) for p in passes)
