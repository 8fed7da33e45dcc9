"""The one op: ``skimp::dynk_ffn``, a feed-forward network that runs the experts a row needs.

Rule (D2DMoE, arXiv 2310.04361, section 3.3): expert ``i`` runs for a row iff
``scores_i >= tau * max_j scores_j``. Selected experts are summed unweighted; ``b_out`` is added
once. The rule is written here as "not below", so that a NaN score runs every expert and the NaN
reaches the output instead of vanishing. For the same reason a row whose scores are all zero runs
every expert: no evidence is never a licence to skip.

With ``act="scored"`` experts are summed weighted by their scores, which then may be negative, and
``tau`` is compared with their magnitudes as they are: a score has the scale of what it multiplies.
A gated network is such a mixture, of experts of one neuron whose router is the gate.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "gelu_quick": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
    "identity": lambda x: x,
}
"""Activations by their name in the op. ``gelu`` is the exact form (erf); ``relu2`` is squared."""

SCORED = "scored"
"""In the place of an activation: an expert is multiplied by its score."""

_CPU_KERNELS: list[Callable[..., Tensor]] = []
_CUDA_KERNELS: list[Callable[..., Tensor]] = []
_CUDA_BACKWARDS: list[Callable[..., list[Tensor] | None]] = []


def use_cpu_kernel(kernel: Callable[..., Tensor] | None) -> None:
    """Let code generation serve the op on CPU; ``None`` goes back to the reference.

    Args:
        kernel: A function with the op's arguments that returns the op's result.
    """
    _CPU_KERNELS[:] = [] if kernel is None else [kernel]


def use_cuda_kernel(
    kernel: Callable[..., Tensor] | None,
    backward: Callable[..., list[Tensor] | None] | None = None,
) -> None:
    """The same on CUDA devices.

    Args:
        kernel: See :func:`use_cpu_kernel`.
        backward: A function with the arguments of :func:`reference_backward` that returns its
            result, or ``None`` where it serves them not.
    """
    _CUDA_KERNELS[:] = [] if kernel is None else [kernel]
    _CUDA_BACKWARDS[:] = [] if backward is None else [backward]


def select(scores: Tensor, tau: Tensor, act: str = "identity") -> Tensor:
    """Which experts run.

    Args:
        scores: Router output, ``[.., E]``, non-negative, of any sign where they weight experts.
        tau: Threshold relative to the row's largest score, 0-d, in ``[0, 1]``; where scores weight
            experts, of their magnitude.
        act: Of the call.

    Returns:
        Bool mask ``[.., E]``; every row has at least one ``True``, unless scores weight experts.
    """
    # compared in float32: compilers keep an intermediate wider than its dtype, so that a limit
    # rounded to bfloat16 would tie with scores in eager and not in compiled code
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if act == SCORED:
        return torch.bitwise_not(wide.abs() < tau.to(wide.dtype))
    limit = tau.to(wide.dtype) * wide.amax(-1, keepdim=True)
    return torch.bitwise_not(wide < limit)


TIE = 2e-6
"""By so little rounding can move a threshold (16 units of float32)."""


def ties(scores: Tensor, tau: Tensor, act: str = "identity") -> Tensor:
    """The rows in which rounding decides which experts run.

    Args:
        scores: As in :func:`select`.
        tau: Likewise. At 0 nothing ties, for every expert runs.
        act: Likewise.

    Returns:
        Bool ``[..]``.
    """
    by = TIE * scores.abs().amax(-1, keepdim=True) if act == SCORED else TIE
    moved = select(scores, tau + by, act) ^ select(scores, tau - by, act)
    return (moved & (tau > 0)).any(-1)


def hidden(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    act: str,
) -> Tensor:
    """Hidden activations ``[.., d_ff]`` of all experts, before the second projection.

    Where scores weight experts, before that.
    """
    up = F.linear(x, w_in, b_in)
    if act == SCORED:
        return up
    if w_gate is None:
        return ACTIVATIONS[act](up)
    return ACTIVATIONS[act](F.linear(x, w_gate, b_gate)) * up


def reference(
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
    """Define the op in plain PyTorch: dense computation times the mask.

    Args:
        x: Rows, ``[.., d]``.
        scores: Router output, ``[.., E]``, with ``E = d_ff / expert_size``; see :func:`select`.
        tau: Threshold, 0-d tensor; 0 runs every expert.
        w_in: ``[d_ff, d]``; the neurons of an expert are adjacent.
        b_in: ``[d_ff]`` or ``None``.
        w_gate: ``[d_ff, d]`` for a gated network, else ``None``.
        b_gate: ``[d_ff]`` or ``None``.
        w_out: ``[d_ff, d_out]``, neuron-major.
        b_out: ``[d_out]`` or ``None``.
        expert_size: Neurons per expert.
        act: A key of :data:`ACTIVATIONS`, or :data:`SCORED` of a network that is not gated.

    Returns:
        ``[.., d_out]``, the dtype of ``x``.
    """
    h = hidden(x, w_in, b_in, w_gate, b_gate, act)
    if act == SCORED:
        h = h * scores.repeat_interleave(expert_size, dim=-1)
    mask = select(scores, tau, act).repeat_interleave(expert_size, dim=-1)
    # where, not a product: an infinite activation of a skipped expert must not become NaN
    y = torch.where(mask, h, h.new_zeros(())) @ w_out
    return y if b_out is None else y + b_out


@torch.library.custom_op("skimp::dynk_ffn", mutates_args=())
def dynk_ffn(
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
    """Run the op; arguments and result as in :func:`reference`."""
    args = (x, scores, tau, w_in, b_in, w_gate, b_gate, w_out, b_out, expert_size, act)
    if _CPU_KERNELS and x.device.type == "cpu":
        return _CPU_KERNELS[0](*args)
    if _CUDA_KERNELS and x.device.type == "cuda":
        return _CUDA_KERNELS[0](*args)
    return reference(*args).contiguous()


@dynk_ffn.register_fake
def _(
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
    if act not in ACTIVATIONS and (act != SCORED or w_gate is not None):
        raise ValueError(
            f"act is {act!r}; it must be one of {sorted(ACTIVATIONS)}, or, without a gate, {SCORED}"
        )
    if scores.shape[-1] * expert_size != w_in.shape[0]:
        raise ValueError(
            f"{scores.shape[-1]} experts of {expert_size} neurons do not make "
            f"d_ff = {w_in.shape[0]}"
        )
    return x.new_empty((*x.shape[:-1], w_out.shape[1]))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:  # type: ignore[type-arg]
    *tensors, expert_size, act = inputs
    ctx.save_for_backward(*tensors)
    ctx.static = (expert_size, act)  # type: ignore[attr-defined]


def reference_backward(
    grad: Tensor, tensors: list[Tensor | None], expert_size: int, act: str, wanted: list[bool]
) -> list[Tensor]:
    """Differentiate :func:`reference`, in time and memory like a dense network.

    Args:
        grad: Of the output, ``[.., d_out]``.
        tensors: ``x, scores, tau, w_in, b_in, w_gate, b_gate, w_out, b_out`` of the call.
        expert_size: Of the call.
        act: Of the call.
        wanted: For which of ``tensors``, never of tau: a selection has no gradient. Scores have
            one only where they weight experts.

    Returns:
        A gradient for each that is wanted.
    """
    with torch.enable_grad():
        leaves = [None if t is None else t.detach() for t in tensors]
        live = [
            leaf.requires_grad_()
            for leaf, want in zip(leaves, wanted, strict=True)
            if want and leaf is not None
        ]
        y = reference(*leaves, expert_size, act)  # type: ignore[arg-type, call-arg]
    return list(torch.autograd.grad(y, live, grad))


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiate through the selected experts; the selection itself has no gradient."""
    saved = list(ctx.saved_tensors)  # type: ignore[attr-defined]
    needs = ctx.needs_input_grad  # type: ignore[attr-defined]
    constant = (2,) if ctx.static[1] == SCORED else (1, 2)  # type: ignore[attr-defined]
    wanted = [t is not None and needs[i] and i not in constant for i, t in enumerate(saved)]
    args = (grad, saved, *ctx.static, wanted)  # type: ignore[attr-defined]
    found: list[Tensor] | None = None
    if _CUDA_BACKWARDS and grad.device.type == "cuda":
        found = _CUDA_BACKWARDS[0](*args)
    if found is None and any(wanted):
        found = reference_backward(*args)
    following = iter(found or [])
    return (*(next(following) if want else None for want in wanted), None, None)


dynk_ffn.register_autograd(_backward, setup_context=_setup_context)
