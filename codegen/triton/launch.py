"""Launch the kernels of one call, eagerly or into a graph that is being traced."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...ir.op import reference
from .emit import emit, emit_grads
from .load import load
from .spec import (
    FEW_ROWS,
    MANY,
    SPAN,
    Family,
    Tiles,
    TritonSpec,
    default_tiles,
    few_constants,
    padded,
    score_route_tiles,
    score_tiles,
    scores_fit,
    selection_rows,
)

Router = tuple[Tensor, Tensor]
"""Weights ``[width, d]`` and ``[E, width]`` of ``abs(relu(x down^T) up^T)``, in the dtype of x."""

_served: dict[TritonSpec, Any] = {}


def serve(modules: Mapping[TritonSpec, Any]) -> None:
    """Launch these kernels, compiled ahead of time, instead of generated ones; not in graphs.

    Args:
        modules: By spec what has the kernels of :func:`modules_of` as attributes, compiled with
            default tiles for many rows.
    """
    _served.clear()
    _served.update(modules)


def is_served(spec: TritonSpec) -> bool:
    """Whether :func:`serve` was given the kernels of a block."""
    return spec in _served


def run(
    spec: TritonSpec,
    plan: str,
    x: Tensor,
    scores: Tensor | Router,
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
        scores: The router's, or its weights: where :func:`skimp.codegen.triton.spec.scores_fit`,
            the kernel that decides which experts run then also computes the scores.
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
    x, tau = x.contiguous(), tau.to(x.device, torch.float32)
    if isinstance(scores, Tensor):
        scores = scores.contiguous()
    elif not scores_fit(spec, plan, int(scores[0].shape[0])):
        scores = (torch.relu(x @ scores[0].T) @ scores[1].T).abs()
    if traced and plan == "masked":
        # dense products and what lies between them: Inductor makes one kernel of the latter
        more = (w_in, b_in, w_gate, b_gate, w_out, b_out, spec.expert_size, spec.act)
        return reference(x, _given(scores), tau, *more).contiguous()
    w_in, w_out = w_in.contiguous(), w_out.contiguous()
    first = stand_ins(w_in, b_in, w_gate, b_gate)
    launch = Launch(spec, tiles or tiles_of(spec, plan, rows, x.device), x.device, traced=traced)
    if plan == "few":
        y = launch.few(x, scores, tau, first, w_out, b_out, rows)
    elif plan == "masked":
        flat = x.view(rows, -1)
        up = _product(flat, w_in, b_in)
        gate = w_in if w_gate is None else _product(flat, w_gate, b_gate)
        launch.masked(up, gate, _given(scores), tau, rows)
        y = _second(up, w_out, b_out)
    elif plan == "blocks":
        y = _second(launch.blocks(x, _given(scores), tau, first, rows), w_out, b_out)
    elif plan == "lists":
        h = x.new_empty(rows, spec.d_ff)
        lists = launch.lists(x, scores, tau, rows, rests=True)
        launch.walk("lists_hidden", x, lists, [*first, h])
        y = _second(h, w_out, b_out)
    else:
        sums = torch.zeros(rows * spec.d_out, dtype=torch.float32, device=x.device)
        launch.walk("pairs", x, launch.lists(x, scores, tau, rows), [*first, w_out, sums])
        y = launch.finish(sums, b_out, x.dtype)
    return y.view(shape)


def _given(scores: Tensor | Router) -> Tensor:
    assert isinstance(scores, Tensor)
    return scores


def tiles_of(spec: TritonSpec, plan: str, rows: int, device: torch.device) -> Tiles:
    """The tiles of a call that was not tuned; of kernels compiled ahead, those they have."""
    most = MANY if is_served(spec) and plan != "few" else extent(rows)
    return default_tiles(spec, plan, most, family(device))


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
        ahead = None if traced else _served.get(spec)  # a tracer takes no compiled kernels
        self.module = module_of(spec) if ahead is None else ahead
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
        self, x: Tensor, scores: Tensor | Router, tau: Tensor, first: list[Tensor], w_out: Tensor,
        b_out: Tensor | None, rows: int,
    ) -> Tensor:  # fmt: skip
        """The whole block for few rows: ``[rows * d_out]``."""
        n = rows * self.spec.d_out
        sums = self.zeros(n + 1)
        one = rows == 1
        y = x.new_empty(self.spec.d_out if one else 1)
        bias = w_out if b_out is None else b_out.contiguous()
        listed = not isinstance(scores, Tensor)
        if isinstance(scores, Tensor):
            selected = (scores, scores, scores, scores)  # the last three are not read
        else:
            selected = self.score(x, scores, tau, rows)
        self.kernel("few")[(cdiv(self.spec.d_ff, self.tiles.neurons),)](
            x, selected[0], tau, *selected[1:], *first, w_out, bias, sums, y, rows,
            **few_constants(self.tiles, one, listed), **self.options,
        )  # fmt: skip
        return y if one else self.finish(sums.narrow(0, 0, n), b_out, x.dtype)

    def score(
        self, x: Tensor, router: Router, tau: Tensor, rows: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a router makes of at most :data:`FEW_ROWS` rows, in one launch.

        Returns:
            Scores ``[rows, E]``; below which of them an expert rests, ``[rows]``; the experts that
            some row needs, ``[E]``, and how many they are, ``[1]``.
        """
        down, up = (t.contiguous() for t in router)
        width, experts = int(down.shape[0]), self.spec.experts
        tiles = score_tiles(self.spec, rows == 1)
        scores = x.new_empty(rows, experts)
        limits = torch.empty(rows, dtype=torch.float32, device=self.device)
        active = torch.empty(experts, dtype=torch.int32, device=self.device)
        total = torch.empty(1, dtype=torch.int32, device=self.device)
        self.kernel("score")[(cdiv(width, tiles.neurons),)](
            x, down, up, tau, self.zeros(rows * experts + 1), scores, limits, active, total, rows,
            W=width, RP=tiles.rows, BH=tiles.neurons, BK=tiles.depth,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )  # fmt: skip
        return scores, limits, active, total

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
        """Activate ``up`` in place, or weight it by the scores, zero where an expert rests."""
        sizes = dict(BM=self.tiles.rows, BH=self.tiles.neurons)
        grid = cdiv(rows, self.tiles.rows) * cdiv(self.spec.d_ff, self.tiles.neurons)
        if self.spec.scored:
            self.kernel("weighted")[(grid,)](up, scores, tau, rows, **sizes, **self.options)
            return
        limits = self.thresholds(scores, tau, rows)
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

    def lists(
        self, x: Tensor, scores: Tensor | Router, tau: Tensor, rows: int, *, rests: bool = False
    ) -> Lists:
        """List the rows of each expert (``rests``: and those that it skips), and their tiles."""
        experts, tile = self.spec.experts, self.tiles.rows
        fixed = is_served(self.spec) or not isinstance(rows, int)
        span = SPAN if fixed else min(SPAN, padded(rows, max(tile, 64)))
        entries = cdiv(rows, span) * experts
        counts = self.zeros(entries * (2 if rests else 1), torch.int32)
        listed = torch.empty(entries * span, dtype=torch.int32, device=self.device)
        # no more tiles than this, whatever the routing; how many there are, the device knows
        most = entries * (span // tile)
        tiles = torch.empty(most, dtype=torch.int32, device=self.device)
        total = torch.empty(1, dtype=torch.int32, device=self.device)
        if isinstance(scores, Tensor):
            block = selection_rows(self.spec, "pairs")
            self.kernel("route")[(cdiv(rows, block),)](
                scores, tau, counts, listed, rows, BR=block, SPAN=span, RESTS=rests
            )
        else:
            down, up = (t.contiguous() for t in scores)
            width = int(down.shape[0])
            own = score_route_tiles(self.spec, width)
            self.kernel("score_route")[(cdiv(rows, own.rows),)](
                x, down, up, tau, counts, listed, rows, W=width, WP=padded(width), BR=own.rows,
                BK=own.depth, SPAN=span, RESTS=rests, num_warps=own.warps, num_stages=own.stages,
            )  # fmt: skip
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
def family(device: torch.device) -> Family:
    """What the tiles of a device depend on; of one that is not here, as of the commonest."""
    if torch.version.hip is not None:
        return "cdna"
    if device.type != "cuda" or not torch.cuda.is_available():
        return "ampere"
    return "hopper" if torch.cuda.get_device_capability(device) >= (9, 0) else "ampere"


def programs(device: torch.device, tiles: Tiles) -> int:
    """How many programs walk the tiles: as many as can be resident at once."""
    return _processors(device) * max(1, 16 // tiles.warps)


@functools.cache
def module_of(spec: TritonSpec) -> Any:
    """The generated module of a block."""
    return load(emit(spec), spec.name)


def grads_of(spec: TritonSpec) -> Any:
    """The module that differentiates a block, generated or served."""
    return _served[spec] if spec in _served else _grads_of(spec)


@functools.cache
def _grads_of(spec: TritonSpec) -> Any:
    return load(emit_grads(spec), f"grads_{spec.name}")
