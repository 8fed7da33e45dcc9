"""Launch the kernels of one call, eagerly or into a graph that is being traced."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ...ir.op import reference
from .emit import emit
from .load import load
from .spec import (
    FEW_ROWS,
    MANY,
    SPAN,
    Tiles,
    TritonSpec,
    default_tiles,
    padded,
    score_tiles,
    selection_rows,
)


def run(
    spec: TritonSpec,
    plan: str,
    x: Tensor,
    scores: Tensor,
    tau: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    tiles: Tiles | None = None,
    traced: bool = False,
) -> Tensor:
    """Run one plan of :func:`skimp.codegen.triton.spec.choose` on tensors that fit the spec.

    Args:
        spec: Of the block.
        plan: Which kernels.
        x: As :func:`skimp.ir.reference` takes it, like the others up to ``b_out``.
        scores: The router's.
        tau: Threshold.
        w_in: Weights, like the five that follow.
        b_in: Or ``None``.
        w_gate: Or ``None``.
        b_gate: Or ``None``.
        w_out: Of the second product.
        b_out: Or ``None``.
        tiles: Of the plan; by default :func:`skimp.codegen.triton.spec.default_tiles`.
        traced: Into a graph: rows may be symbolic, and what is no kernel of its own stays ordinary
            PyTorch, for Inductor to fuse with its neighbours.

    Raises:
        CompileError: See :func:`skimp.codegen.triton.load.load`.
    """
    shape = (*x.shape[:-1], spec.d_out)
    rows = math.prod(x.shape[:-1])
    if rows == 0:
        return x.new_empty(shape)
    if traced and plan == "masked":
        # dense products and what lies between them: Inductor makes one kernel of the latter
        more = (w_in, b_in, w_gate, b_gate, w_out, b_out, spec.expert_size, spec.act)
        return reference(x, scores, tau, *more).contiguous()
    x, scores = x.contiguous(), scores.contiguous()
    w_in, w_out = w_in.contiguous(), w_out.contiguous()
    first = stand_ins(w_in, b_in, w_gate, b_gate)
    if tau.device != x.device:
        tau = tau.to(x.device)
    tiles = tiles or default_tiles(spec, plan, extent(rows), hopper=hopper(x.device))
    launch = Launch(spec, tiles, x.device, traced=traced)
    if plan == "few":
        y = launch.few(x, scores, tau, first, w_out, b_out, rows)
    elif plan == "masked":
        flat = x.view(rows, -1)
        up = _product(flat, w_in, b_in)
        gate = w_in if w_gate is None else _product(flat, w_gate, b_gate)
        launch.masked(up, gate, scores, tau, rows)
        y = _second(up, w_out, b_out)
    elif plan == "blocks":
        y = _second(launch.blocks(x, scores, tau, first, rows), w_out, b_out)
    elif plan == "lists":
        h = x.new_empty(rows, spec.d_ff)
        launch.walk("lists_hidden", x, launch.lists(scores, tau, rows, rests=True), [*first, h])
        y = _second(h, w_out, b_out)
    else:
        sums = torch.zeros(rows * spec.d_out, dtype=torch.float32, device=x.device)
        launch.walk("pairs", x, launch.lists(scores, tau, rows), [*first, w_out, sums])
        y = launch.finish(sums, b_out, x.dtype)
    return y.view(shape)


def score(spec: TritonSpec, x: Tensor, down: Tensor, up: Tensor, *, traced: bool = False) -> Tensor:
    """A router's scores of at most :data:`FEW_ROWS` rows, in one launch: ``[.., E]``.

    Args:
        spec: Of the block that it routes for.
        x: Rows, ``[.., d]``.
        down: First weight of the router, ``[width, d]``, in the dtype of ``x``.
        up: Second weight, ``[E, width]``.
        traced: See :func:`run`.
    """
    rows, width = math.prod(x.shape[:-1]), int(down.shape[0])
    tiles = score_tiles(spec, rows == 1)
    launch = Launch(spec, tiles, x.device, traced=traced)
    scores = x.new_empty((*x.shape[:-1], spec.experts))
    launch.kernel("score")[(cdiv(width, tiles.neurons),)](
        x.contiguous(), down, up, launch.zeros(rows * spec.experts + 1), scores, rows,
        W=width, RP=tiles.rows, BH=tiles.neurons, BK=tiles.depth, **launch.options,
    )  # fmt: skip
    return scores


def stand_ins(w_in: Tensor, *others: Tensor | None) -> list[Tensor]:
    """The pointers of the first product; any stands in for what no kernel is emitted to read."""
    return [w_in, *(w_in if t is None else t.contiguous() for t in others)]


def extent(rows: int) -> int:
    """A number of rows for which to choose tiles: itself, or of a symbol the most of its class."""
    if isinstance(rows, int):
        return rows
    return FEW_ROWS if rows <= FEW_ROWS else MANY


def _product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """A linear layer whose result may be written to."""
    return torch.mm(x, w.T) if b is None else torch.addmm(b, x, w.T)


def _second(h: Tensor, w_out: Tensor, b_out: Tensor | None) -> Tensor:
    """The second product as PyTorch does it."""
    return torch.mm(h, w_out) if b_out is None else torch.addmm(b_out, h, w_out)


class Lists:
    """The rows of each expert, on the device: see the kernels ``route`` and ``number``."""

    __slots__ = ("counts", "entries", "most", "rests", "rows", "span", "tiles", "total")

    def __init__(self, rows: Tensor, counts: Tensor, tiles: Tensor, total: Tensor, span: int,
                 entries: int, most: int, rests: bool) -> None:  # fmt: skip
        self.rows, self.counts, self.tiles, self.total = rows, counts, tiles, total
        self.span, self.entries, self.most, self.rests = span, entries, most, rests


class Launch:
    """The launches of one call."""

    __slots__ = ("constants", "device", "module", "options", "spec", "tiles", "traced")

    def __init__(
        self, spec: TritonSpec, tiles: Tiles, device: torch.device, *, traced: bool = False
    ) -> None:
        self.spec, self.tiles, self.device, self.traced = spec, tiles, device, traced
        self.module = module_of(spec)
        self.constants = tiles.constants
        self.options = dict(num_warps=tiles.warps, num_stages=tiles.stages)

    def kernel(self, name: str) -> Any:
        """A kernel of the generated module."""
        found = getattr(self.module, name)
        return torch.library.wrap_triton(found) if self.traced else found

    def zeros(self, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """What kernels add to."""
        return torch.zeros(n, dtype=dtype, device=self.device)

    def few(
        self, x: Tensor, scores: Tensor, tau: Tensor, first: list[Tensor], w_out: Tensor,
        b_out: Tensor | None, rows: int,
    ) -> Tensor:  # fmt: skip
        """The whole block for few rows: ``[rows * d_out]``."""
        n = rows * self.spec.d_out
        sums = self.zeros(n + 1)
        one = rows == 1
        y = x.new_empty(self.spec.d_out if one else 1)
        bias = w_out if b_out is None else b_out.contiguous()
        constants = {k: v for k, v in self.constants.items() if k != "BM"}
        self.kernel("few")[(cdiv(self.spec.d_ff, self.tiles.neurons),)](
            x, scores, tau, *first, w_out, bias, sums, y, rows,
            RP=1 if one else FEW_ROWS, **constants, **self.options,
        )  # fmt: skip
        return y if one else self.finish(sums.narrow(0, 0, n), b_out, x.dtype)

    def finish(self, sums: Tensor, b_out: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Sums ``[rows * d_out]`` and the bias, as ``dtype``."""
        if self.traced:
            y = sums.view(-1, self.spec.d_out)
            return (y if b_out is None else y + b_out).to(dtype).view(-1)
        n = sums.numel()
        y = torch.empty(n, dtype=dtype, device=self.device)
        bias = y if b_out is None else b_out.contiguous()
        self.kernel("finish")[(cdiv(n, 1024),)](sums, bias, y, n, BN=1024)
        return y

    def thresholds(self, scores: Tensor, tau: Tensor, rows: int) -> Tensor:
        """Below which score an expert rests, ``[rows]``."""
        limits = torch.empty(rows, dtype=torch.float32, device=self.device)
        across = selection_rows(self.spec, "masked")
        self.kernel("thresholds")[(cdiv(rows, across),)](scores, tau, limits, rows, BR=across)
        return limits

    def masked(self, up: Tensor, gate: Tensor, scores: Tensor, tau: Tensor, rows: int) -> None:
        """Activate ``up`` in place, zero where an expert rests."""
        limits = self.thresholds(scores, tau, rows)
        sizes = dict(BM=self.tiles.rows, BH=self.tiles.neurons)
        grid = cdiv(rows, self.tiles.rows) * cdiv(self.spec.d_ff, self.tiles.neurons)
        self.kernel("masked")[(grid,)](up, gate, scores, limits, rows, **sizes, **self.options)

    def blocks(
        self, x: Tensor, scores: Tensor, tau: Tensor, first: list[Tensor], rows: int
    ) -> Tensor:
        """Hidden activations ``[rows, d_ff]``, block by block."""
        h = x.new_empty(rows, self.spec.d_ff)
        limits = self.thresholds(scores, tau, rows)
        grid = cdiv(rows, self.tiles.rows) * cdiv(self.spec.d_ff, self.tiles.neurons)
        self.kernel("blocks")[(grid,)](
            x, scores, limits, *first, h, rows, **self.constants, **self.options
        )
        return h

    def lists(self, scores: Tensor, tau: Tensor, rows: int, *, rests: bool = False) -> Lists:
        """List the rows of each expert (``rests``: and those that it skips), and their tiles."""
        experts, tile = self.spec.experts, self.tiles.rows
        span = min(SPAN, padded(rows, max(tile, 64))) if isinstance(rows, int) else SPAN
        entries = cdiv(rows, span) * experts
        counts = self.zeros(entries * (2 if rests else 1), torch.int32)
        listed = torch.empty(entries * span, dtype=torch.int32, device=self.device)
        # no more tiles than this, whatever the routing; how many there are, the device knows
        most = entries * (span // tile)
        tiles = torch.empty(most, dtype=torch.int32, device=self.device)
        total = torch.empty(1, dtype=torch.int32, device=self.device)
        block = selection_rows(self.spec, "pairs")
        self.kernel("route")[(cdiv(rows, block),)](
            scores, tau, counts, listed, rows, BR=block, SPAN=span, RESTS=rests
        )
        self.kernel("number")[(1,)](
            counts, tiles, total, entries, BM=tile, PER=span // tile, BE=128, RESTS=rests,
            num_warps=8,
        )  # fmt: skip
        return Lists(listed, counts, tiles, total, span, entries, most, rests)

    def walk(self, name: str, x: Tensor, lists: Lists, more: list[Tensor]) -> None:
        """Let the kernel ``name`` walk the tiles of the lists."""
        resident = programs(self.device, self.tiles)
        grid = min(lists.most, resident) if isinstance(lists.most, int) else resident
        self.kernel(name)[(grid,)](
            x, lists.rows, lists.counts, lists.tiles, lists.total, *more,
            *([lists.entries] if lists.rests else []),
            SPAN=lists.span, **self.constants, **self.options,
        )  # fmt: skip


def cdiv(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # the interpreter: more than one, to walk in strides
    if not torch.cuda.is_available():
        return 132  # traced for a card that is elsewhere
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether a device multiplies matrices with whole warp groups."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def programs(device: torch.device, tiles: Tiles) -> int:
    """How many programs walk the tiles: as many as can be resident at once."""
    return _processors(device) * max(1, 16 // tiles.warps)


@functools.cache
def module_of(spec: TritonSpec) -> Any:
    """The generated module of a block."""
    return load(emit(spec), spec.name)
