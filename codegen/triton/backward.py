"""Differentiate the op on GPUs through the experts that ran.

``skimp::dynk_ffn_backward`` is opaque to a tracer: launches depend on real numbers of rows.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels import prepare
from .launch import Launch, cdiv, grads_of, programs, stand_ins
from .spec import TritonSpec, grad_tiles


def differentiate(
    grad: Tensor, tensors: list[Tensor | None], expert_size: int, act: str, wanted: list[bool]
) -> list[Tensor] | None:
    """As :func:`skimp.ir.op.reference_backward`, or ``None`` where no kernel fits.

    Nor does one where :func:`torch.use_deterministic_algorithms` is on and the input's gradient,
    whose sums are atomic, is wanted.
    """
    x, scores, tau, *weights = tensors
    assert x is not None
    assert scores is not None
    if wanted[0] and torch.are_deterministic_algorithms_enabled():
        return None
    spec = prepare(x, scores, tuple(weights), expert_size, act)
    if not isinstance(spec, TritonSpec) or spec.scored:
        return None  # forward warned of it; where scores weight experts, they have a gradient too
    return list(dynk_ffn_backward(grad, x, scores, tau, *weights, expert_size, act, wanted))


@torch.library.custom_op("skimp::dynk_ffn_backward", mutates_args=())
def dynk_ffn_backward(
    grad: Tensor,
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
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Run :func:`gradients`; only for arguments that fit a kernel."""
    weights = (w_in, b_in, w_gate, b_gate, w_out, b_out)
    spec = prepare(x, scores, weights, expert_size, act)
    assert isinstance(spec, TritonSpec), spec
    return gradients(spec, grad, x, scores, tau, *weights, wanted=wanted)


@dynk_ffn_backward.register_fake
def _(
    grad: Tensor,
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
    wanted: Sequence[bool],
) -> list[Tensor]:
    tensors = (x, scores, tau, w_in, b_in, w_gate, b_gate, w_out, b_out)
    chosen = [t for t, want in zip(tensors, wanted, strict=True) if want]
    return [t.new_empty(t.shape) for t in chosen if t is not None]


def gradients(
    spec: TritonSpec,
    grad: Tensor,
    x: Tensor,
    scores: Tensor,
    tau: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_gate: Tensor | None,
    b_gate: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    wanted: Sequence[bool] = (True, False, False, *[True] * 6),
) -> list[Tensor]:
    """Gradients through the experts that ran; the selection has none.

    Args:
        spec: Of the block.
        grad: Of the output, ``[.., d_out]``.
        x: As :func:`skimp.ir.reference` takes it, like all that follow.
        scores: The router's.
        tau: Threshold.
        w_in: Weights, like the five that follow.
        b_in: Or ``None``.
        w_gate: Or ``None``.
        b_gate: Or ``None``.
        w_out: Of the second product.
        b_out: Or ``None``.
        wanted: For which of ``x`` to ``b_out``; for ``None``, scores and tau there is none.

    Returns:
        A gradient for each that is wanted, contiguous, in the dtype of ``x``.

    The input's sums are atomic; those of weights are not. Memory is two, gated three, times
    ``rows * d_ff``, written only where an expert ran.
    """
    rows = math.prod(x.shape[:-1])
    given = (x, None, None, w_in, b_in, w_gate, b_gate, w_out, b_out)
    wants = [want and t is not None for t, want in zip(given, wanted, strict=True)]
    if rows == 0:
        shapes = [t.shape for t, want in zip(given, wants, strict=True) if want and t is not None]
        return [x.new_zeros(shape) for shape in shapes]
    x2, scores, grad = x.reshape(rows, -1).contiguous(), scores.contiguous(), grad.contiguous()
    tau = tau.to(x.device, torch.float32)
    first = stand_ins(w_in.contiguous(), b_in, w_gate, b_gate)
    w_out = w_out.contiguous()
    tiles, module = grad_tiles(spec), grads_of(spec)
    launch = Launch(spec, tiles, x.device)
    lists = launch.lists(x2, scores, tau, rows)
    h, g_up = (x.new_empty(rows, spec.d_ff) for _ in range(2))
    g_gate = x.new_empty(rows, spec.d_ff) if spec.gated else g_up
    grid = (min(lists.most, programs(x.device, tiles)),)
    where = (lists.rows, lists.counts, lists.tiles, lists.total)
    sizes = dict(BM=tiles.rows, BH=tiles.neurons, BK=tiles.depth)
    found: list[Tensor | None] = [None] * len(given)

    def weight(left: Tensor, right: Tensor, at: int, bias: int | None = None) -> None:
        alone = bias is not None and wants[bias]
        if not wants[at] and not alone:
            return
        width = right.numel() // rows
        out = x.new_empty(spec.d_ff, width)
        total = x.new_empty(spec.d_ff) if alone else out
        tall = cdiv(spec.expert_size, tiles.neurons)
        module.grads_weight[(spec.experts * tall * cdiv(width, tiles.depth),)](
            lists.rows, lists.counts, left, right, out, total, lists.entries // spec.experts,
            W=width, SUM=alone, SPAN=lists.span, **sizes, **launch.options,
        )  # fmt: skip
        found[at] = out
        if bias is not None:
            found[bias] = total

    if any(wants[:-1]):
        module.grads_hidden[grid](
            x2, *where, *first, grad, w_out, h, g_up, g_gate,
            SPAN=lists.span, **tiles.constants, **launch.options,
        )  # fmt: skip
        weight(g_up, x2, 3, 4)
        if spec.gated:
            weight(g_gate, x2, 5, 6)
        weight(h, grad, 7)
    if wants[0]:
        sums = torch.zeros(rows, spec.d, dtype=torch.float32, device=x.device)
        module.grads_input[grid](
            *where, g_up, g_gate, first[0], first[2], sums,
            SPAN=lists.span, **sizes, **launch.options,
        )  # fmt: skip
        found[0] = sums.to(x.dtype).view(x.shape)
    if wants[8]:
        found[8] = grad.reshape(rows, -1).sum(0)
    return [g for g, want in zip(found, wants, strict=True) if want and g is not None]
