"""Serve ``skimp::dynk_ffn`` on CPU with generated kernels."""

import ctypes
import functools
import warnings
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ...ir.errors import CompileError
from ...ir.op import reference, use_cpu_kernel
from .build import build
from .emit import emit
from .spec import KernelSpec, LinearSpec, detect_isa

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FEW_ROWS = 64
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
    library = build(emit(spec), spec.name, spec.flags)
    function = library.dynk_ffn
    pointer = ctypes.c_void_p
    function.argtypes = [
        *[pointer] * 2, ctypes.c_float, *[pointer] * 7, ctypes.c_int64, ctypes.c_int32,
    ]  # fmt: skip
    function.restype = ctypes.c_int
    return function


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
    args = (x, scores, tau, w_in, b_in, w_gate, b_gate, w_out, b_out)
    tensors = [t for i, t in enumerate(args) if t is not None and i != 2]
    if x.dtype not in _DTYPES or any(t.dtype is not x.dtype for t in tensors):
        return _plain(f"dtype {x.dtype}", *args, expert_size, act)
    spec = _spec(
        act, w_gate is not None, b_in is not None, b_gate is not None, b_out is not None,
        expert_size, *w_in.shape, w_out.shape[1], x.dtype,
    )  # fmt: skip
    try:
        run = kernel(spec)
    except CompileError as error:
        return _plain(str(error), *args, expert_size, act)
    held = [t.contiguous() for t in tensors]  # keeps copies alive during the call
    pointers = iter(held)
    p = [next(pointers).data_ptr() if t is not None else None for i, t in enumerate(args) if i != 2]
    y = torch.empty((*x.shape[:-1], w_out.shape[1]), dtype=x.dtype)
    rows = x.numel() // x.shape[-1]
    if run(p[0], p[1], float(tau), *p[2:], y.data_ptr(), rows, torch.get_num_threads()):
        raise MemoryError(f"no memory for the scratch of {rows} rows of {spec.name}")
    return y


@functools.cache
def _spec(
    act: str,
    gated: bool,
    b_in: bool,
    b_gate: bool,
    b_out: bool,
    expert_size: int,
    d_ff: int,
    d: int,
    d_out: int,
    dtype: torch.dtype,
) -> KernelSpec:
    return KernelSpec(
        act, gated, b_in, b_gate, b_out, expert_size, d, d_ff, d_out, _DTYPES[dtype], detect_isa()
    )


@functools.cache
def linear_kernel(spec: LinearSpec) -> Callable[..., int]:
    """The compiled function of a spec.

    Raises:
        CompileError: See :func:`skimp.codegen.cpp.build.build`.
    """
    function = build(emit(spec), spec.name, spec.flags).linear
    function.argtypes = [*[ctypes.c_void_p] * 4, ctypes.c_int64, ctypes.c_int32]
    function.restype = ctypes.c_int
    return cast(Callable[..., int], function)


def linear_cpu(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """A dense linear layer, ``w`` as in :func:`torch.nn.functional.linear`, fast for few rows.

    More than 64 rows, other dtypes and machines without a compiler go to PyTorch.
    """
    rows = x.numel() // max(1, x.shape[-1])
    same = w.dtype is x.dtype and (b is None or b.dtype is x.dtype)
    if rows > FEW_ROWS or x.dtype not in _DTYPES or not same or x.device.type != "cpu":
        return F.linear(x, w, b)
    try:
        run = linear_kernel(
            LinearSpec(w.shape[1], w.shape[0], b is not None, _DTYPES[x.dtype], detect_isa())
        )
    except CompileError as error:
        _warn(str(error), "skimp::linear")
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
