"""What a pass is, and what it works with."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..ir.block import DynkFFN
from ..ir.errors import CalibrationError
from .data import LABELS, Batch, real_tokens
from .lift import blocks
from .offload import Offload
from .ranks import Ranks


class Progress(Protocol):
    """Told how far a stage has come."""

    def __call__(self, stage: str, done: float, total: float, note: str = "") -> None:
        """``done`` of ``total`` units of ``stage`` are finished."""


def silent(stage: str, done: float, total: float, note: str = "") -> None:
    """Report nothing."""


def not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters that hold NaN or infinity; buffers, such as masks, may."""
    return [n for n, p in model.named_parameters() if not _finite(p.detach())]


def _finite(t: Tensor) -> bool:
    # in parts: the comparison takes several times the memory of what is compared
    return all(bool(torch.isfinite(part).all()) for part in t.flatten().split(2**20))


def first_tensor(outputs: Any) -> Tensor:
    """The first floating tensor of a model's output."""
    if isinstance(outputs, Tensor):
        return outputs
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return next(v for v in values if isinstance(v, Tensor) and v.is_floating_point())


def pooled(outputs: Any, batch: Batch) -> Tensor:
    """One vector per sequence ``[batch, d]``: the mean of the first output over real tokens."""
    states, mask = first_tensor(outputs), real_tokens(batch)
    if states.dim() < 3:
        return states
    if mask is None or mask.shape != states.shape[:2]:
        return states.flatten(1, -2).mean(1)
    weights = mask[..., None].to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1).clamp_min(1)


class Each(Protocol):
    """Does the same for every block, wherever it likes, and gives the results in their order.

    ``map`` does it here, one block after another; :func:`skimp.runtime.cluster.on_ray` gives one
    that asks the workers of a cluster. What is done may change what it is given, but a worker
    has a copy: what has changed must be returned. A pass gives it tuples that begin with a block,
    and gets such tuples: the block, its optimiser if there is one, then what JSON can hold.
    """

    def __call__(self, work: Callable[[Any], Any], items: Iterable[Any], /) -> Iterable[Any]:
        """Results of ``work``, which like ``items`` can be pickled."""


Loss = Callable[[Any, Batch], Tensor]
"""From a model's output and the whole batch to one number to be made small, 0-d."""


def next_tokens(outputs: Any, batch: Batch) -> Tensor:
    """Logits of every real token of a language model, ``[tokens, vocabulary]``."""
    return real_rows(first_tensor(outputs), real_tokens(batch))


def reads_logits(outputs: Any) -> bool:
    """Whether a model's output is logits per token, as a language model's is."""
    logits = outputs.get("logits") if isinstance(outputs, dict) else None
    return isinstance(logits, Tensor) and logits.dim() == 3 and logits is first_tensor(outputs)


def cosine_distance(got: Tensor, want: Tensor) -> Tensor:
    """One minus the mean cosine of rows, 0-d."""
    return 1 - F.cosine_similarity(got, want, dim=-1).mean()


def kl_divergence(got: Tensor, want: Tensor, rows: int | None = None) -> Tensor:
    """Mean Kullback-Leibler divergence to the teacher's next token, nats per token, 0-d.

    Args:
        got: The student's logits, ``[tokens, vocabulary]``.
        want: The teacher's.
        rows: Taken at a time, and again in the backward pass: for a large vocabulary the
            softmax of a batch is larger than all other activations. By default 256, on GPUs 4096.
    """
    rows = rows or (256 if got.device.type == "cpu" else 4096)

    def part(g: Tensor, w: Tensor) -> Tensor:
        logs = g.float().log_softmax(-1), w.float().log_softmax(-1)
        return F.kl_div(*logs, reduction="sum", log_target=True)

    total = torch.zeros((), device=got.device)
    for g, w in zip(got.split(rows), want.split(rows), strict=True):
        again = g.requires_grad
        total = total + (checkpoint(part, g, w, use_reentrant=False) if again else part(g, w))
    return total / max(len(got), 1)


@dataclass(slots=True)
class Context:
    """What passes may use beside the graph.

    Attributes:
        teacher: The model as it was, its networks lifted into blocks that stay dense and, where
            they are converted too, its attention projections into linear layers under the names
            that their blocks have in the student.
        train: Batches to train on.
        held_out: Batches to choose thresholds on.
        output: From a model's output and the batch to what its user reads, ``[rows, m]``.
        distance: Between a student's and the teacher's of these, 0-d: :func:`cosine_distance`, or
            :func:`kl_divergence` for a language model.
        progress: Told how far a stage has come.
        seed: Of every random choice.
        kept: The data last asked for, and the teacher's outputs for each batch of it.
        loss: The user's task, if there is one; else everything is learnt from the teacher.
        each: Does what passes do to every block alone.
        offload: Where the tensors that passes make lie.
        ranks: The processes at work.
    """

    teacher: GraphModule
    train: Sequence[Batch]
    held_out: Sequence[Batch]
    output: Callable[[Any, Batch], Tensor] = pooled
    progress: Progress = silent
    seed: int = 0
    kept: tuple[Sequence[Batch], list[Tensor]] | None = None
    loss: Loss | None = None
    distance: Callable[[Tensor, Tensor], Tensor] = cosine_distance
    each: Each = map
    offload: Offload = field(default_factory=Offload)
    ranks: Ranks = field(default_factory=Ranks)

    def __post_init__(self) -> None:
        if not self.train or not self.held_out:
            raise CalibrationError(
                "the calibration set is empty; give at least a few hundred passages or inputs"
            )

    def training(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager[None]:
        """Where what training makes lies: in memory, if processes have divided it."""
        return nullcontext() if self.ranks.size > 1 else self.offload.training(optimizer)


def call(gm: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch without what only the loss reads."""
    return gm(**{name: value for name, value in batch.items() if name != LABELS})


def task_loss(context: Context, outputs: Any, batch: Batch) -> Tensor:
    """The user's loss, checked.

    Raises:
        CalibrationError: It is not one finite number that depends on the outputs.
    """
    assert context.loss is not None
    value = context.loss(outputs, batch)
    if not isinstance(value, Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise CalibrationError(f"loss returned {shape}; it must return a tensor of one number")
    if not value.requires_grad:
        raise CalibrationError(
            "loss returned a number that does not depend on the model's outputs, so nothing can "
            "be learnt from it; do not detach them or use .item()"
        )
    if not bool(torch.isfinite(value)):
        raise CalibrationError(
            f"loss returned {value.item()}; check the labels, or lower the learning rate"
        )
    return value.reshape(())


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass returns: the graph, whether it changed, and what was measured on the way."""

    gm: GraphModule
    modified: bool
    stats: dict[str, Any]


@dataclass(frozen=True)
class Pass:
    """A step from graph to graph. Its fields are its options; it changes only what it is given."""

    name: ClassVar[str] = "pass"
    together: ClassVar[bool] = False
    """Every process takes part; else it is the first's work, and of blocks alone."""

    def run(self, gm: GraphModule, context: Context) -> PassResult:
        """Apply the pass to ``gm``, which the pipeline has copied for it."""
        raise NotImplementedError

    def __str__(self) -> str:
        """The spec: name and options, ``sparsify{tokens=1000}``."""
        options = ",".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self))
        return f"{self.name}{{{options}}}"


def capture(
    gm: nn.Module,
    data: Iterable[Batch],
    limit: int | None = None,
    names: Sequence[str] | None = None,
    offload: Offload | None = None,
) -> dict[str, Tensor]:
    """Inputs of every block, rows of real tokens only: ``{name: [rows, d]}``.

    Blocks that read one tensor, as query, key and value do, share the rows.

    Args:
        gm: A model with blocks.
        data: Batches, run in order.
        limit: Stop after this many rows (of the first block).
        names: Other modules to look at, in place of the blocks.
        offload: Where the rows lie; by default in memory.
    """
    rows: dict[str, list[Tensor]] = {name: [] for name in (blocks(gm) if names is None else names)}
    place, count = offload or Offload(), 0
    for _ in watch(gm, data, lambda name, _, x: rows[name].append(x), list(rows), place):
        count += len(next(iter(rows.values()))[-1])
        if limit is not None and count >= limit:
            break
    joined: dict[tuple[int, ...], Tensor] = {}
    for parts in rows.values():
        key = tuple(map(id, parts))
        joined[key] = joined[key] if key in joined else place.join(parts)
    return {name: joined[tuple(map(id, parts))] for name, parts in rows.items()}


def watch(
    gm: nn.Module,
    data: Iterable[Batch],
    look: Callable[[str, Any, Tensor], None],
    names: Sequence[str] | None = None,
    offload: Offload | None = None,
) -> Iterator[tuple[Batch, Any]]:
    """Run a model without gradients and show what enters each block.

    Args:
        gm: A model with blocks.
        data: Batches, run in order.
        look: Called with a block's name, the block, and its input's rows of real tokens.
        names: Other modules to look at, in place of the blocks.
        offload: Where the rows lie that are shown; by default in memory.

    Yields:
        Each batch with the model's output.
    """
    place = offload or Offload()
    mask: Tensor | None = None
    last: tuple[Tensor, Tensor] | None = None  # several blocks may read one tensor, in a row

    def see(name: str, block: Any, x: Tensor) -> None:
        nonlocal last
        if last is None or last[0] is not x:
            last = (x, place.move(real_rows(x.detach(), mask)))
        look(name, block, last[1])

    with looking(gm, see, names):
        for batch in data:
            mask, last = real_tokens(batch), None
            with torch.no_grad():
                outputs = call(gm, batch)
            yield batch, outputs


@contextmanager
def looking(
    gm: nn.Module, look: Callable[[str, Any, Tensor], None], names: Sequence[str] | None = None
) -> Iterator[None]:
    """Show what enters each block, as it comes, whoever calls the model meanwhile.

    Args:
        gm: A model with blocks.
        look: Called with a block's name, the block, and its input.
        names: Other modules to look at, in place of the blocks.
    """

    def hook(name: str, block: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            look(name, block, args[0])

        return see

    found = {n: gm.get_submodule(n) for n in (blocks(gm) if names is None else names)}
    handles = [b.register_forward_pre_hook(hook(n, b)) for n, b in found.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def real_rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """``[batch, length, d] -> [rows, d]`` without padding, where the mask fits."""
    if mask is not None and x.dim() > 2 and x.shape[:2] == mask.shape:
        return x[mask]
    if mask is not None and x.dim() == 2 and len(x) == mask.numel():
        return x[mask.flatten()]
    return x.reshape(-1, x.shape[-1])


def expert_norms(block: DynkFFN, h: Tensor) -> Tensor:
    """L2 norm of each expert's output, the routers' target (D2DMoE, section 3.2).

    With ``W_i`` the expert's rows of ``w_out``, ``|h_i W_i|^2 = h_i (W_i W_i^T) h_i``: the small
    Gram matrix costs ``e/d_out`` of computing the outputs.

    Args:
        block: The block.
        h: Hidden activations, ``[.., d_ff]``.

    Returns:
        ``[.., E]``.
    """
    w = block.w_out.detach().view(block.experts, block.expert_size, -1)
    gram = w @ w.transpose(1, 2)
    h = h.unflatten(-1, (block.experts, block.expert_size))
    squares = (torch.einsum("...ej,ejk->...ek", h, gram).float() * h).sum(-1)
    return squares.clamp_min(0).sqrt()


def relative_norms(norms: Tensor) -> Tensor:
    """Norms of each row, divided by their root mean square, ``[.., E]``.

    A threshold is relative to its row's largest score, so a router need not know how large a row
    is, and every row's order matters alike. Without this, the few rows of a language model whose
    activations are a hundred times the others' decide what a router learns.
    """
    return norms / norms.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def hoyer(h: Tensor) -> Tensor:
    """Square Hoyer over the last dimension, divided by its size: 1/n if one-hot, 1 if constant."""
    return h.abs().sum(-1).square() / (h.square().sum(-1) + 1e-15) / h.shape[-1]


@contextmanager
def replaced(gm: GraphModule, others: dict[str, nn.Module]) -> Iterator[None]:
    """Put other modules in the places of blocks for a while."""
    originals = {name: gm.get_submodule(name) for name in others}
    for name, module in others.items():
        gm.set_submodule(name, module)
    try:
        yield
    finally:
        for name, module in originals.items():
            gm.set_submodule(name, module)


def device_of(gm: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next(gm.parameters()).device


@contextmanager
def trainable(gm: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let these parameters, and no others of the model, learn for a while."""
    gm.requires_grad_(False)
    for p in parameters:
        p.requires_grad_(True)
    try:
        yield
    finally:
        gm.requires_grad_(False)
        for p in parameters:
            p.grad = None


def paced(steps: int, seconds: float) -> Iterator[tuple[int, float]]:
    """Count steps until they, or the time, are spent: each with the fraction that is behind it."""
    start = time.monotonic()
    for step in range(steps):
        fraction = max(step / steps, (time.monotonic() - start) / seconds)
        if fraction >= 1:
            return
        yield step, fraction


def learning_rate(step: int, fraction: float) -> float:
    """Share of the peak: up over 20 steps, then along a cosine to a twentieth."""
    return min(1.0, (step + 1) / 20) * (0.525 + 0.475 * math.cos(math.pi * fraction))


def learnable(gm: GraphModule) -> list[nn.Parameter]:
    """All but tables that a lookup reads: large, touched rarely by a short run, best left alone."""
    tables = set()
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and node.args[0].op == "get_attr":
            owner, _, leaf = str(node.args[0].target).rpartition(".")
            tables.add(id(getattr(gm.get_submodule(owner), leaf)))
    return [p for p in gm.parameters() if id(p) not in tables]
