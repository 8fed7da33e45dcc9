"""Serve ``skimp::dynk_ffn`` on GPUs with generated kernels.

No call waits for the device: which experts run is decided and counted there, buffers have static
upper bounds, and launches depend only on shapes, so that calls can be captured in a CUDA graph.
Differentiation goes through the masked dense formula (:mod:`skimp.ir.op`), which reads the same
selection: exact, in memory and time as dense training.
"""

import functools
import warnings
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import CompileError
from ...ir.op import reference, use_cuda_kernel
from ..spec import Weights, constants_of, shapes_fit
from .emit import emit
from .load import interpreting, load
from .spec import (
    FEW_ROWS,
    PRECISIONS,
    SPAN,
    Tiles,
    TritonSpec,
    choose,
    default_tiles,
    padded,
    selection_rows,
    shape_class,
)
from .tuned import recall

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_precision: list[str] = []
_fallbacks: dict[str, int] = {}
_prepared: dict[tuple[Any, ...], TritonSpec | str] = {}


def install() -> None:
    """Let the op run generated kernels on CUDA tensors from now on, in this process."""
    use_cuda_kernel(dynk_ffn_cuda)


def use_float32(precision: str | None) -> None:
    """Choose the arithmetic of float32 products.

    Args:
        precision: ``ieee``; ``tf32``; ``tf32x3``, which splits operands so that three products on
            tensor cores come within some 1e-6 of IEEE arithmetic; or ``None`` to follow
            :func:`torch.get_float32_matmul_precision`.

    Raises:
        ValueError: Another word.
    """
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    _precision[:] = [] if precision is None else [precision]


def fallbacks() -> dict[str, int]:
    """How often the plain reference ran instead of a kernel, by reason."""
    return dict(_fallbacks)


def dynk_ffn_cuda(
    x: Tensor,
    scores: Tensor,
    tau: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    expert_size: int,
    act: str,
) -> Tensor:
    """Run the op; arguments and result as in :func:`skimp.ir.reference`.

    Storage is float32, bfloat16 or float16, accumulation float32; float32 products follow
    :func:`torch.get_float32_matmul_precision` (``highest`` is IEEE arithmetic, else TF32) unless
    :func:`use_float32` says otherwise. Few rows, and ``tf32x3``, sum atomically unless
    :func:`torch.use_deterministic_algorithms` is on. Other dtypes, and machines
    without Triton, run the reference, with a warning the first time.
    """
    weights = (w_in, b_in, w_gate, b_gate, w_out, b_out)
    followed = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    precision = _precision[0] if _precision else followed
    key = (
        act, expert_size, precision, x.dtype, x.shape[-1], scores.shape[-1], scores.dtype, x.device,
        x.shape[:-1] == scores.shape[:-1],
        *((None if t is None else (t.dtype, t.shape, t.device)) for t in weights),
        scores.device,
    )  # fmt: skip
    spec = _prepared.get(key)
    if spec is None:
        spec = _prepared[key] = _prepare(x, scores, weights, expert_size, act, precision)
    if isinstance(spec, str):
        _warn(spec)
        return reference(
            x, scores, tau, w_in, b_in, w_gate, b_gate, w_out, b_out, expert_size, act
        ).contiguous()
    rows = x.numel() // x.shape[-1]
    deterministic = torch.are_deterministic_algorithms_enabled()
    found = None if deterministic else recall(spec, shape_class(rows), x.device)
    plan, tiles = found or (choose(spec, rows, deterministic=deterministic), None)
    return run(spec, plan, x, scores, tau, *weights, tiles=tiles)


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
) -> Tensor:
    """Run one plan of :func:`skimp.codegen.triton.spec.choose` on tensors that fit the spec.

    Raises:
        CompileError: See :func:`skimp.codegen.triton.load.load`.
    """
    shape = (*x.shape[:-1], spec.d_out)
    rows = x.numel() // spec.d
    y = x.new_empty(shape)
    if rows == 0:
        return y
    x, scores = x.contiguous(), scores.contiguous()
    w_in, w_out = w_in.contiguous(), w_out.contiguous()
    # kernels are not emitted to read what is absent; any pointer stands in for it
    first = [w_in, *(w_in if t is None else t.contiguous() for t in (b_in, w_gate, b_gate))]
    bias = w_in if b_out is None else b_out.contiguous()
    if tau.device != x.device:
        tau = tau.to(x.device)
    tiles = tiles or default_tiles(spec, plan, rows, hopper=_hopper(x.device))
    launch = _Launch(spec, tiles, _module(spec), x.device)
    if plan == "few":
        launch.few(x, scores, tau, first, w_out, bias, y, rows)
    elif plan == "masked":
        flat = x.view(rows, -1)
        up = _product(flat, w_in, b_in)
        gate = up if w_gate is None else _product(flat, w_gate, b_gate)
        launch.masked(up, gate, scores, tau, rows)
        _second(up, w_out, b_out, y)
    elif plan == "blocks":
        h = launch.blocks(x, scores, tau, first, rows)
        _second(h, w_out, b_out, y)
    elif plan == "lists":
        h = x.new_empty(rows, spec.d_ff)
        launch.walk("lists_hidden", x, scores, tau, [*first, h], rows)
        _second(h, w_out, b_out, y)
    else:
        sums = torch.zeros(rows, spec.d_out, dtype=torch.float32, device=x.device)
        launch.walk("pairs", x, scores, tau, [*first, w_out, sums], rows)
        launch.finish(sums, bias, y)
    return y


def _product(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """A linear layer whose result may be written to."""
    return torch.mm(x, w.T) if b is None else torch.addmm(b, x, w.T)


def _second(h: Tensor, w_out: Tensor, b_out: Tensor | None, y: Tensor) -> None:
    """The second product as PyTorch does it, into ``y``."""
    flat = y.view(h.shape[0], -1)
    if b_out is None:
        torch.mm(h, w_out, out=flat)
    else:
        torch.addmm(b_out, h, w_out, out=flat)


class _Launch:
    """The launches of one call."""

    __slots__ = ("constants", "device", "module", "options", "spec", "tiles")

    def __init__(self, spec: TritonSpec, tiles: Tiles, module: Any, device: torch.device) -> None:
        self.spec, self.tiles, self.module, self.device = spec, tiles, module, device
        self.constants = tiles.constants
        self.options = dict(num_warps=tiles.warps, num_stages=tiles.stages)

    def few(
        self, x: Tensor, scores: Tensor, tau: Tensor, first: list[Tensor], w_out: Tensor,
        bias: Tensor, y: Tensor, rows: int,
    ) -> None:  # fmt: skip
        work = torch.zeros(rows * self.spec.d_out + 1, dtype=torch.float32, device=self.device)
        done = work[-1:].view(torch.int32)
        constants = {k: v for k, v in self.constants.items() if k != "BM"}
        self.module.few[(_cdiv(self.spec.d_ff, self.tiles.neurons),)](
            x, scores, tau, *first, w_out, bias, work, done, y, rows,
            RP=1 if rows == 1 else FEW_ROWS, **constants, **self.options,
        )  # fmt: skip

        if rows > 1:
            self.finish(work, bias, y)

    def finish(self, sums: Tensor, bias: Tensor, y: Tensor) -> None:
        n = y.numel()
        self.module.finish[(_cdiv(n, 1024),)](sums, bias, y, n, BN=1024)

    def thresholds(self, scores: Tensor, tau: Tensor, rows: int) -> Tensor:
        limits = torch.empty(rows, dtype=torch.float32, device=self.device)
        across = selection_rows(self.spec, "masked")
        self.module.thresholds[(_cdiv(rows, across),)](scores, tau, limits, rows, BR=across)
        return limits

    def masked(self, up: Tensor, gate: Tensor, scores: Tensor, tau: Tensor, rows: int) -> None:
        limits = self.thresholds(scores, tau, rows)
        sizes = dict(BM=self.tiles.rows, BH=self.tiles.neurons)
        grid = _cdiv(rows, self.tiles.rows) * _cdiv(self.spec.d_ff, self.tiles.neurons)
        self.module.masked[(grid,)](up, gate, scores, limits, rows, **sizes, **self.options)

    def blocks(
        self, x: Tensor, scores: Tensor, tau: Tensor, first: list[Tensor], rows: int
    ) -> Tensor:
        h = x.new_empty(rows, self.spec.d_ff)
        limits = self.thresholds(scores, tau, rows)
        grid = _cdiv(rows, self.tiles.rows) * _cdiv(self.spec.d_ff, self.tiles.neurons)
        self.module.blocks[(grid,)](
            x, scores, limits, *first, h, rows, **self.constants, **self.options
        )
        return h

    def walk(
        self, name: str, x: Tensor, scores: Tensor, tau: Tensor, more: list[Tensor], rows: int
    ) -> None:
        """Make the lists and their tiles, and let the kernel ``name`` walk them."""
        experts, tile = self.spec.experts, self.tiles.rows
        span = min(SPAN, padded(rows, max(tile, 64)))
        entries = _cdiv(rows, span) * experts
        rests = name == "lists_hidden"
        counts = torch.zeros(entries * (2 if rests else 1), dtype=torch.int32, device=self.device)
        lists = torch.empty(entries * span, dtype=torch.int32, device=self.device)
        # no more tiles than this, whatever the routing; how many there are, the device knows
        most = entries * (span // tile)
        tiles = torch.empty(most + 1, dtype=torch.int32, device=self.device)
        total = tiles[most:]
        block = selection_rows(self.spec, "pairs")
        self.module.route[(_cdiv(rows, block),)](
            scores, tau, counts, lists, rows, BR=block, SPAN=span, RESTS=rests
        )
        self.module.number[(1,)](
            counts,
            tiles,
            total,
            entries,
            BM=tile,
            PER=span // tile,
            BE=128,
            RESTS=rests,
            num_warps=8,
        )
        kernel = getattr(self.module, name)
        kernel[(min(most, programs(self.device, self.tiles)),)](
            x,
            lists,
            counts,
            tiles,
            total,
            *more,
            *([entries] if rests else []),
            SPAN=span,
            **self.constants,
            **self.options,
        )


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 3  # the interpreter: more than one, to walk in strides
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _hopper(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def programs(device: torch.device, tiles: Tiles) -> int:
    """How many programs walk the tiles: as many as can be resident at once."""
    return _processors(device) * max(1, 16 // tiles.warps)


@functools.cache
def _module(spec: TritonSpec) -> Any:
    return load(emit(spec), spec.name)


def _prepare(
    x: Tensor,
    scores: Tensor,
    weights: Weights,
    expert_size: int,
    act: str,
    precision: str,
) -> TritonSpec | str:
    """The spec of such arguments, or why there is none. Kernels trust what is checked here."""
    w_in, w_out = weights[0], weights[4]
    assert w_in is not None
    assert w_out is not None
    given = [t for t in (x, *weights) if t is not None]
    if x.dtype not in _DTYPES or scores.dtype not in _DTYPES or len({t.dtype for t in given}) > 1:
        return f"dtype {', '.join(sorted({str(t.dtype) for t in (*given, scores)}))}"
    if len({t.device for t in (*given, scores)}) > 1:
        return "tensors on several devices"
    if x.device.type != "cuda" and not interpreting():
        return f"kernels for GPUs cannot run on {x.device.type}"
    if w_in.dim() != 2 or w_out.dim() != 2:
        return "weights that are not matrices"
    fits = shapes_fit(x, scores, weights, expert_size)
    if not fits or max(w_in.numel(), w_out.numel()) >= 2**31:
        return "shapes that do not fit one another, are empty, or are too large"
    constants = constants_of(weights, expert_size, act, _DTYPES[x.dtype])
    spec = TritonSpec(**constants, precision=precision if x.dtype == torch.float32 else "ieee")
    try:
        _module(spec)
    except CompileError as error:
        return str(error)
    return spec


def _warn(reason: str) -> None:
    if reason not in _fallbacks:
        warnings.warn(f"skimp::dynk_ffn runs its plain reference: {reason}", stacklevel=4)
    _fallbacks[reason] = _fallbacks.get(reason, 0) + 1
