"""Serve ``skimp::dynk_ffn`` on GPUs with generated kernels.

No call waits for the device: which experts run is decided and counted there, buffers have static
upper bounds, and launches depend only on shapes, so that calls can be captured in a CUDA graph.
Gradients are those of the experts that ran (:mod:`skimp.codegen.triton.backward`).
"""

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import CompileError
from ...ir.op import reference, use_cuda_kernel
from ..spec import Weights, constants_of, shapes_fit
from .launch import extent, is_served, module_of, run
from .load import interpreting
from .spec import PRECISIONS, Tiles, TritonSpec, choose, shape_class
from .tuned import recall

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_precision: list[str] = []
_fallbacks: dict[str, int] = {}
_prepared: dict[tuple[Any, ...], TritonSpec | str] = {}


def install() -> None:
    """Let the op run generated kernels on CUDA tensors from now on, in this process."""
    from .backward import differentiate  # which asks this module what fits

    use_cuda_kernel(dynk_ffn_cuda, differentiate)


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
    spec = prepare(x, scores, weights, expert_size, act)
    if isinstance(spec, str):
        _warn(spec)
        return reference(
            x, scores, tau, w_in, b_in, w_gate, b_gate, w_out, b_out, expert_size, act
        ).contiguous()
    plan, tiles = plan_of(spec, x)
    return run(spec, plan, x, scores, tau, *weights, tiles=tiles)


def plan_of(spec: TritonSpec, x: Tensor) -> tuple[str, Tiles | None]:
    """Which kernels serve rows ``x``, and the tiles that tuning found for them, if it did.

    Of symbolic rows only the class is looked at, which guards it.
    """
    rows = math.prod(x.shape[:-1])
    deterministic = torch.are_deterministic_algorithms_enabled()
    plan = choose(spec, rows, deterministic=deterministic)
    if deterministic or is_served(spec):
        return plan, None
    known = isinstance(rows, int)
    plan_tuned = recall(spec, shape_class(extent(rows)), x.device)
    # what was best for most rows of a class of symbols need not be able to run the others
    return plan_tuned if plan_tuned and (known or plan_tuned[0] == plan) else (plan, None)


def followed_precision() -> str:
    """The arithmetic of float32 products, now."""
    followed = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return _precision[0] if _precision else followed


def prepare(
    x: Tensor, scores: Tensor, weights: Weights, expert_size: int, act: str
) -> TritonSpec | str:
    """The spec of such arguments, or why no kernel fits them; remembered."""
    precision = followed_precision()
    key = (
        act, precision, x.dtype, scores.dtype, x.device,
        # sizes are constants of the text, never symbols
        int(expert_size), int(x.shape[-1]), int(scores.shape[-1]),
        x.shape[:-1] == scores.shape[:-1],
        *((None if t is None else (t.dtype, tuple(map(int, t.shape)), t.device)) for t in weights),
        scores.device,
    )  # fmt: skip
    spec = _prepared.get(key)
    if spec is None:
        spec = _prepared[key] = _prepare(x, scores, weights, int(expert_size), act, precision)
    return spec


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
        if not is_served(spec):
            module_of(spec)
    except CompileError as error:
        return str(error)
    return spec


def _warn(reason: str) -> None:
    if reason not in _fallbacks:
        warnings.warn(f"skimp::dynk_ffn runs its plain reference: {reason}", stacklevel=4)
    _fallbacks[reason] = _fallbacks.get(reason, 0) + 1
