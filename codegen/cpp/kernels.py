"""Serve ``skimp::dynk_ffn`` on CPU with generated kernels."""

import ctypes
import functools
import warnings
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ir.cost import Curves
from ...ir.errors import CompileError
from ...ir.measure import compare
from ...ir.op import SCORED, reference, use_cpu_kernel
from ..spec import Weights, constants_of, shapes_fit
from . import library
from .build import build
from .emit import ACTS, emit
from .spec import KernelSpec, LinearSpec, detect_isa

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
MOST_FEW = 64
"""Rows up to which the forms for few rows are written."""

ARGUMENTS: list[Any] = [
    *[ctypes.c_void_p] * 2, ctypes.c_float, *[ctypes.c_void_p] * 7,
    *[ctypes.c_int64] * 2, ctypes.c_int32,
]  # fmt: skip
"""Of the compiled function: x, scores, tau, the weights, y, rows, few, threads."""

LINEAR_ARGUMENTS: list[Any] = [
    ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_void_p)] * 3, *[ctypes.c_int64] * 2, ctypes.c_int32
]  # fmt: skip
"""The same of linear layers: x, arrays of w, b and y, how many, rows, threads."""

_fallbacks: dict[str, int] = {}


def install() -> None:
    """Let the op run generated kernels on CPU from now on, in this process."""
    use_cpu_kernel(dynk_ffn_cpu)


def fallbacks() -> dict[str, int]:
    """How often the plain reference ran instead of a kernel, by reason."""
    return dict(_fallbacks)


@functools.cache
def kernel(spec: KernelSpec | LinearSpec) -> Callable[..., int]:
    """The compiled function of a spec.

    Raises:
        CompileError: See :func:`skimp.codegen.cpp.build.build`.
    """
    block = isinstance(spec, KernelSpec)
    function = getattr(build(emit(spec), spec.name, spec.flags), "dynk_ffn" if block else "linear")
    function.argtypes = ARGUMENTS if block else LINEAR_ARGUMENTS
    function.restype = ctypes.c_int
    return cast(Callable[..., int], function)


@functools.cache
def ops() -> Any:
    """The namespace ``skimp_cpu``, compiled on first use.

    Raises:
        CompileError: See :func:`skimp.codegen.cpp.library.load`.
    """
    library.load(_resolve)
    return torch.ops.skimp_cpu


def _resolve(kind: str, fields: tuple[int, ...]) -> tuple[int, int]:
    """Build the kernel that C++ asks for; no exception may cross its frames."""
    try:
        spec = _spec(kind, fields)
        run = kernel(spec)
        return ctypes.cast(run, ctypes.c_void_p).value or 0, few_rows(spec)  # type: ignore[arg-type]
    except CompileError as error:
        _warn(str(error), f"skimp_cpu::{kind}")
        return 0, 0


def _spec(kind: str, fields: tuple[int, ...]) -> KernelSpec | LinearSpec:
    """The inverse of how library.cpp words a key."""
    if kind == "linear":
        d, d_out, bias, narrow = fields[:4]
        return LinearSpec(d, d_out, bool(bias), _NAMES[narrow], detect_isa())
    act, gated, b_in, b_gate, b_out, expert_size, d, d_ff, last = fields
    return KernelSpec(
        act=ACTS[act], gated=bool(gated), b_in=bool(b_in), b_gate=bool(b_gate), b_out=bool(b_out),
        expert_size=expert_size, d=d, d_ff=d_ff, d_out=last // 2, dtype=_NAMES[last % 2],
        isa=detect_isa(),
    )  # fmt: skip


_NAMES = ("float32", "bfloat16")


@functools.cache
def few_rows(spec: KernelSpec | LinearSpec) -> int:
    """Rows up to which the form for few rows is the fastest, measured once per machine.

    The alternative of a block is its form for many rows, with half of the experts active; that of
    a linear layer is PyTorch's.
    """
    curves = Curves.load()
    few = 0
    for rows in (1, 4, 8, 16, 32, MOST_FEW):
        names = [f"{spec.name}-rows={rows}-{form}" for form in ("few", "other")]
        if any(n not in curves.seconds for n in names):
            calls = dict(zip(names, _forms(spec, rows), strict=True))
            timed = compare(calls, names[0], seconds=0.02, least=15, most=100).timings
            curves.seconds |= {n: timed[n].low for n in names}  # whatever else is running
            curves.store()
        if curves.seconds[names[0]] <= curves.seconds[names[1]]:
            few = rows
    return few


def _forms(
    spec: KernelSpec | LinearSpec, rows: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    """Calls of the form for few rows and of its alternative, on arguments made up.

    Each call has other weights than the last, since in a model they are not in the nearest cache.
    """
    run, threads = kernel(spec), torch.get_num_threads()
    dtype = getattr(torch, spec.dtype)
    x, y = torch.randn(rows, spec.d).to(dtype), torch.empty(rows, spec.d_out, dtype=dtype)
    zeros = torch.zeros(max(spec.d_ff, spec.d_out), dtype=dtype)

    def filled(n: int, m: int) -> Tensor:
        return (torch.randn(n, m) / m**0.5).to(dtype)  # type: ignore[no-any-return]

    if isinstance(spec, LinearSpec):
        b = zeros[: spec.d_out] if spec.bias else None
        copies = _copies(lambda: (filled(spec.d_out, spec.d), b))
        layers = cycle(copies)
        arrays = cycle([[_array(t) for t in (*c, y)] for c in copies])
        kept = x, y, copies  # while arrays hold nothing but their addresses
        return (
            lambda: run(kept[0].data_ptr(), *next(arrays), 1, rows, threads),
            lambda: F.linear(x, *next(layers)),  # type: ignore[arg-type]
        )
    scores = (torch.rand(rows, spec.d_ff // spec.expert_size) < 0.5).to(dtype)
    blocks = cycle(
        _copies(
            lambda: (
                filled(spec.d_ff, spec.d), zeros[: spec.d_ff] if spec.b_in else None,
                filled(spec.d_ff, spec.d) if spec.gated else None, zeros if spec.b_gate else None,
                filled(spec.d_ff, spec.d_out), zeros[: spec.d_out] if spec.b_out else None,
            )
        )
    )  # fmt: skip

    def form(few: int) -> Callable[[], object]:
        return lambda: run(
            *_pointers([x, scores]), 0.5, *_pointers([*next(blocks), y]), rows, few, threads
        )

    def dense() -> Tensor:  # what library.cpp then computes
        w_in, b_in, _, _, w_out, b_out = next(blocks)
        assert w_in is not None
        assert w_out is not None
        return F.linear(F.linear(x, w_in, b_in).mul_(scores), w_out.T, b_out)

    return form(MOST_FEW), dense if spec.act == SCORED and spec.expert_size == 1 else form(0)


def _copies(make: Callable[[], Weights]) -> list[Weights]:
    """Weights enough to fill a second-level cache."""
    first = make()
    size = sum(t.nbytes for t in first if t is not None)
    return [first, *(make() for _ in range(min(100, 2**23 // size)))]


def _array(tensor: Tensor | None) -> Any:
    return (ctypes.c_void_p * 1)(*_pointers([tensor]))


def _pointers(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [t if t is None else t.data_ptr() for t in tensors]


def dynk_ffn_cpu(
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

    Storage is float32 or bfloat16, accumulation float32. Neurons whose activation is exactly zero
    are left out of the second product. Other dtypes, and machines without a compiler, run the
    reference, with a warning the first time.
    """
    args = (x, scores, tau, w_in, b_in, w_gate, b_gate, w_out, b_out, expert_size, act)
    if reason := unserved(*args):
        _warn(reason)
        return reference(*args).contiguous()
    return ops().dynk_ffn(*args)  # type: ignore[no-any-return]


def unserved(
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
) -> str:
    """Why no kernel serves such arguments, real or fake; empty if one does."""
    weights = (w_in, b_in, w_gate, b_gate, w_out, b_out)
    tensors = [t for t in (x, scores, *weights) if t is not None]
    if x.dtype not in DTYPES or any(t.dtype is not x.dtype for t in tensors):
        return f"dtype {', '.join(sorted({str(t.dtype) for t in tensors}))}"
    if any(t.device.type != "cpu" for t in tensors):
        return "weights that are not on the CPU"
    if not shapes_fit(x, scores, weights, expert_size):
        return "shapes that do not fit one another, or are empty"
    return _failure(weights, expert_size, act, DTYPES[x.dtype])


def _failure(weights: Weights, expert_size: int, act: str, dtype: str) -> str:
    spec = KernelSpec(**constants_of(weights, expert_size, act, dtype), isa=detect_isa())
    return _failed(spec)


@functools.cache
def _failed(spec: KernelSpec) -> str:
    try:
        kernel(spec)
        ops()
    except CompileError as error:
        return str(error)
    return ""


def _warn(reason: str, op: str = "skimp::dynk_ffn") -> None:
    if reason not in _fallbacks:
        warnings.warn(f"{op} runs its plain reference: {reason}", stacklevel=4)
    _fallbacks[reason] = _fallbacks.get(reason, 0) + 1
