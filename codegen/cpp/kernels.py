"""Serve ``skimp::dynk_ffn`` on CPU with generated kernels."""

import ctypes
import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ir.errors import CompileError
from ...ir.op import reference, use_cpu_kernel
from ..spec import Weights, constants_of, shapes_fit
from .build import build
from .emit import emit
from .spec import KernelSpec, LinearSpec, detect_isa

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FEW_ROWS = 64
ARGUMENTS: list[Any] = [
    *[ctypes.c_void_p] * 2, ctypes.c_float, *[ctypes.c_void_p] * 7, ctypes.c_int64, ctypes.c_int32,
]  # fmt: skip
"""Of the compiled function: x, scores, tau, the weights, y, rows, threads."""

LINEAR_ARGUMENTS: list[Any] = [*[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int32]
"""The same of a linear layer: x, w, b, y, rows, threads."""

_fallbacks: dict[str, int] = {}


def install() -> None:
    """Let the op run generated kernels on CPU from now on, in this process."""
    use_cpu_kernel(dynk_ffn_cpu)


def fallbacks() -> dict[str, int]:
    """How often the plain reference ran instead of a kernel, by reason."""
    return dict(_fallbacks)


@functools.cache
def kernel(spec: KernelSpec) -> Callable[..., int]:
    """The compiled function of a spec.

    Raises:
        CompileError: See :func:`skimp.codegen.cpp.build.build`.
    """
    return _function(spec, "dynk_ffn", ARGUMENTS)


def _function(spec: KernelSpec | LinearSpec, name: str, arguments: list[Any]) -> Callable[..., int]:
    function = getattr(build(emit(spec), spec.name, spec.flags), name)
    function.argtypes = arguments
    function.restype = ctypes.c_int
    return cast(Callable[..., int], function)


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
    shape, others = x.shape, scores.shape
    key = (
        act, expert_size, x.dtype, shape[-1], others[-1], w_in.shape, w_out.shape,
        scores.dtype, scores.is_cpu, w_in.dtype, w_in.is_cpu, w_out.dtype, w_out.is_cpu,
        None if b_in is None else (b_in.dtype, b_in.shape),
        None if w_gate is None else (w_gate.dtype, w_gate.shape),
        None if b_gate is None else (b_gate.dtype, b_gate.shape),
        None if b_out is None else (b_out.dtype, b_out.shape),
        shape[:-1] == others[:-1],
    )  # fmt: skip
    run = _prepared.get(key)
    if run is None:
        weights = (w_in, b_in, w_gate, b_gate, w_out, b_out)
        run = _prepared[key] = _prepare(x, scores, weights, expert_size, act)
    if isinstance(run, str):
        return _plain(
            run, x, scores, tau, w_in, b_in, w_gate, b_gate, w_out, b_out, expert_size, act
        )
    x, scores = x.contiguous(), scores.contiguous()  # names keep copies alive during the call
    w_in, w_out = w_in.contiguous(), w_out.contiguous()
    b_in = None if b_in is None else b_in.contiguous()
    w_gate = None if w_gate is None else w_gate.contiguous()
    b_gate = None if b_gate is None else b_gate.contiguous()
    b_out = None if b_out is None else b_out.contiguous()
    y = x.new_empty((*shape[:-1], w_out.shape[1]))
    rows = x.numel() // shape[-1]
    if run(
        x.data_ptr(),
        scores.data_ptr(),
        float(tau),
        w_in.data_ptr(),
        None if b_in is None else b_in.data_ptr(),
        None if w_gate is None else w_gate.data_ptr(),
        None if b_gate is None else b_gate.data_ptr(),
        w_out.data_ptr(),
        None if b_out is None else b_out.data_ptr(),
        y.data_ptr(),
        rows,
        torch.get_num_threads(),
    ):
        raise MemoryError(f"no memory for the scratch of {rows} rows of skimp::dynk_ffn")
    return y


_prepared: dict[tuple[Any, ...], Callable[..., int] | str] = {}


def _prepare(
    x: Tensor, scores: Tensor, weights: Weights, expert_size: int, act: str
) -> Callable[..., int] | str:
    """The kernel for such arguments, or why there is none. Kernels trust what is checked here."""
    tensors = [t for t in (x, scores, *weights) if t is not None]
    if x.dtype not in _DTYPES or any(t.dtype is not x.dtype for t in tensors):
        return f"dtype {', '.join(sorted({str(t.dtype) for t in tensors}))}"
    if not all(t.is_cpu for t in tensors):
        return "weights that are not on the CPU"
    if not shapes_fit(x, scores, weights, expert_size):
        return "shapes that do not fit one another, or are empty"
    constants = constants_of(weights, expert_size, act, _DTYPES[x.dtype])
    spec = KernelSpec(**constants, isa=detect_isa())
    try:
        return kernel(spec)
    except CompileError as error:
        return str(error)


@functools.cache
def _linear_kernel(spec: LinearSpec) -> Callable[..., int] | str:
    """The compiled function of a spec, or why there is none."""
    try:
        return _function(spec, "linear", LINEAR_ARGUMENTS)
    except CompileError as error:
        return str(error)


def linear_cpu(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """A dense linear layer, ``w`` as in :func:`torch.nn.functional.linear`, fast for few rows.

    More than 64 rows, other dtypes and machines without a compiler go to PyTorch.
    """
    rows = x.numel() // max(1, x.shape[-1])
    same = all(t is None or (t.dtype is x.dtype and t.is_cpu) for t in (x, w, b))
    fits = x.shape[-1] == w.shape[-1] and w.dim() == 2 and (b is None or b.shape == w.shape[:1])
    if rows > FEW_ROWS or x.dtype not in _DTYPES or not (same and fits) or 0 in w.shape:
        return F.linear(x, w, b)
    run = _linear_kernel(
        LinearSpec(w.shape[1], w.shape[0], b is not None, _DTYPES[x.dtype], detect_isa())
    )
    if isinstance(run, str):
        _warn(run, "skimp::linear")
        return F.linear(x, w, b)
    x, w, b = x.contiguous(), w.contiguous(), None if b is None else b.contiguous()
    y = x.new_empty((*x.shape[:-1], w.shape[0]))
    bias = None if b is None else b.data_ptr()
    if run(x.data_ptr(), w.data_ptr(), bias, y.data_ptr(), rows, torch.get_num_threads()):
        raise MemoryError(f"no memory for the scratch of {rows} rows of a linear layer")
    return y


linear = torch.library.custom_op("skimp::linear", linear_cpu, mutates_args=())
"""Inference only: :func:`linear_cpu` as an op that survives capture."""


@linear.register_fake
def _(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _warn(reason: str, op: str = "skimp::dynk_ffn") -> None:
    if reason not in _fallbacks:
        warnings.warn(f"{op} runs its plain reference: {reason}", stacklevel=4)
    _fallbacks[reason] = _fallbacks.get(reason, 0) + 1


def _plain(reason: str, *args: object) -> Tensor:
    _warn(reason)
    return reference(*args).contiguous()  # type: ignore[arg-type]
