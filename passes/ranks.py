"""Several processes that train one model, each with a share of its weights and of every batch.

Parameters, gradients and what optimisers know are divided by FSDP2 (arXiv 2304.11277), layer by
layer. A loss is a mean over rows, of which each process has some; means and outputs are exchanged,
so every process knows the loss of the whole batch, and its gradient is that of one process up to
rounding. Passes that do not train the whole model are the first process's work; the others are
told what became of it.
"""

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from ..ir.errors import CalibrationError, ClusterError, first_line
from .data import Batch
from .lift import lifted_layers
from .offload import Offload

T = TypeVar("T")
_PATIENCE = timedelta(days=30)
"""The others wait while the first works; if one dies, torchrun ends them all."""


def launched() -> bool:
    """Whether this is one of several processes that torchrun started."""
    return dist.is_torchelastic_launched() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process writes and prints."""
    return not launched() or os.environ["RANK"] == "0"


class Ranks:
    """The processes at work; by default this one alone, for which nothing here does anything."""

    def __init__(self, size: int = 1, rank: int = 0) -> None:
        self.size = size
        self.rank = rank
        self.rows: list[int] | None = None
        """Rows of the batch by process; ``None`` while each computes the whole of it."""

    @property
    def first(self) -> bool:
        """Whether this process does what one has to do for all."""
        return not self.rank

    def told(self, make: Callable[[], T]) -> T:
        """What the first process makes, for instance of a measurement.

        It is pickled on its way: the processes of one torchrun run the same program and trust each
        other.
        """
        if self.size == 1:
            return make()
        made = [make() if self.first else None]
        dist.broadcast_object_list(made, 0, device=torch.device("cpu"))
        return made[0]  # type: ignore[return-value]

    def in_step(self, paced: Iterable[tuple[int, float]]) -> Iterator[tuple[int, float]]:
        """The steps of the first process, whose clock decides when to stop."""
        steps = iter(paced)
        while (step := self.told(lambda: next(steps, None))) is not None:
            yield step

    def agree(self, identity: str) -> None:
        """Check that all convert the same.

        Raises:
            CalibrationError: They do not.
        """
        if self.told(lambda: identity) != identity:
            raise CalibrationError(
                f"process {self.rank} has another model, other data or options than process 0; "
                "give all of them the same, and load the model in the same way"
            )

    def part(self, batch: Batch) -> Batch:
        """The rows of a batch that are this process's; all, if there are fewer than processes."""
        count = len(next(v for v in batch.values() if isinstance(v, Tensor) and v.dim()))
        self.rows = None
        if self.size == 1 or count < self.size:
            return batch
        shares = torch.arange(count).tensor_split(self.size)
        self.rows = [len(s) for s in shares]
        mine = slice(int(shares[self.rank][0]), int(shares[self.rank][-1]) + 1)
        return {
            name: v[mine] if isinstance(v, Tensor) and v.dim() and len(v) == count else v
            for name, v in batch.items()
        }

    def whole(self, outputs: T) -> T:
        """Tensors of which each process has rows, for the whole batch; gradients reach the own."""
        if self.rows is None:
            return outputs
        rows, rank = self.rows, self.rank

        def join(x: Tensor) -> Tensor:
            known = x.dim() and not len(x) % rows[rank]
            return _Whole.apply(x, rows, rank) if known else x  # type: ignore[no-untyped-call]

        return pytree.tree_map_only(Tensor, join, outputs)  # type: ignore[no-any-return]

    def mean(self, means: Tensor, counts: Sequence[int]) -> Tensor:
        """Means over everything, from those over as many of this process.

        Args:
            means: ``[n]``; gradients reach them.
            counts: Of what each is the mean.
        """
        if self.rows is None:
            return means
        own = torch.tensor(counts, dtype=torch.float64, device=means.device)
        share = (own / _summed(own)).to(means.dtype)
        return _Sum.apply(means * share, self.size)  # type: ignore[no-untyped-call, no-any-return]

    def variances(self, tensors: Sequence[Tensor]) -> Tensor:
        """Of each tensor, of which each process has a part."""
        if self.rows is None:
            return torch.stack([t.float().var() for t in tensors])
        pairs = [torch.var_mean(t.float(), correction=0) for t in tensors]
        own, means = (torch.stack(x).double() for x in zip(*pairs, strict=True))
        counts = [t.numel() for t in tensors]
        spread = own + (means - self.mean(means, counts)).square()
        total = _summed(torch.tensor(counts, dtype=torch.float64, device=own.device))
        return (self.mean(spread, counts) * total / (total - 1)).float()

    def follow(self, gm: GraphModule, offload: Offload, told: T) -> T:
        """Make this process's graph the first's, in place.

        Returns:
            What the first has ``told``.

        Raises:
            ClusterError: More than blocks and values has changed.
        """
        if self.size == 1:
            return told
        named = [n.name for n in gm.graph.nodes]
        names, made, told = self.told(
            lambda: (named, {n: _empty(m) for n, m in lifted_layers(gm).items()}, told)
        )
        if names != named:
            raise ClusterError("a pass changed the graph itself; convert in one process")
        if not self.first:
            device = next(gm.parameters()).device
            for name, module in made.items():
                gm.set_submodule(name, module.to_empty(device=device))
            offload.move(gm)
        for t in (*gm.parameters(), *gm.buffers()):
            value = t.detach().contiguous()
            dist.broadcast(value.view(-1).view(torch.uint8), 0)
            if not t.is_contiguous():
                t.detach().copy_(value)
        return told


def _empty(module: nn.Module) -> nn.Module:
    """A copy that knows the shapes alone."""
    memo: dict[int, Any] = {}
    for t in (*module.parameters(), *module.buffers()):
        value = torch.empty_like(t, device="meta")
        learns = isinstance(t, nn.Parameter)
        memo[id(t)] = nn.Parameter(value, requires_grad=False) if learns else value
    return copy.deepcopy(module, memo)


def _summed(x: Tensor) -> Tensor:
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


class _Sum(torch.autograd.Function):
    """Over the processes. FSDP takes the mean of their gradients, hence the factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * ctx.size, None


class _Whole(torch.autograd.Function):
    """All rows, of which the own ones have a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], rank: int) -> Tensor:
        each = len(x) // rows[rank]  # of a batch's row there may be several
        ctx.own = slice(sum(rows[:rank]) * each, sum(rows[: rank + 1]) * each)
        ctx.size = len(rows)
        padded = x.new_zeros(max(rows) * each, *x.shape[1:])
        padded[: len(x)] = x
        found = [torch.empty_like(padded) for _ in rows]
        dist.all_gather(found, padded)
        return torch.cat([f[: n * each] for f, n in zip(found, rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0][ctx.own] * ctx.size, None, None


@contextmanager
def joined() -> Iterator[Ranks]:
    """The processes that torchrun started, or this one alone.

    Raises:
        ClusterError: Another process has ended.
    """
    if not launched():
        yield Ranks()
        return
    ours = not dist.is_initialized()
    if ours:
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_world_size(), dist.get_rank())
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise ClusterError(
                f"process {dist.get_rank()} lost the others ({first_line(error)}); one of them "
                "has ended and says why"
            ) from error
        raise
    if ours:
        dist.destroy_process_group()
