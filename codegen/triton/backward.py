"""Differentiate the op on GPUs through the experts that ran."""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .emit import emit_grads
from .launch import Launch, cdiv, programs, stand_ins
from .load import load
from .spec import Tiles, TritonSpec, padded


@cache
def _module(spec: TritonSpec) -> Any:
    return load(emit_grads(spec), f"grads_{spec.name}")


def tiles_for(spec: TritonSpec) -> Tiles:
    """Small enough for a gated float32 block not to spill."""
    n = 32 if spec.dtype == "float32" else 64
    return Tiles(n, min(n, padded(spec.expert_size)), 32, 32, 4, 2)


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
) -> tuple[Tensor | None, ...]:
    """Gradients of ``x, w_in, b_in, w_gate, b_gate, w_out, b_out``; the selection has none.

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

    The input's sums are atomic; those of weights are not. Memory is two, gated three, times
    ``rows * d_ff``, written only where an expert ran.
    """
    rows = math.prod(x.shape[:-1])
    given = (w_in, b_in, w_gate, b_gate, w_out, b_out)
    if rows == 0:
        return (torch.zeros_like(x), *(None if t is None else torch.zeros_like(t) for t in given))
    x2, scores, grad = x.reshape(rows, -1).contiguous(), scores.contiguous(), grad.contiguous()
    tau = tau.to(x.device)
    first = stand_ins(w_in.contiguous(), b_in, w_gate, b_gate)
    w_out = w_out.contiguous()
    tiles, module = tiles_for(spec), _module(spec)
    launch = Launch(spec, tiles, x.device)
    lists = launch.lists(scores, tau, rows)
    h, g_up = (x.new_empty(rows, spec.d_ff) for _ in range(2))
    g_gate = x.new_empty(rows, spec.d_ff) if spec.gated else g_up
    grid = (min(lists.most, programs(x.device, tiles)),)
    where = (lists.rows, lists.counts, lists.tiles, lists.total)
    module.grads_hidden[grid](
        x2, *where, *first, grad, w_out, h, g_up, g_gate,
        SPAN=lists.span, **tiles.constants, **launch.options,
    )  # fmt: skip
    sizes = dict(BM=tiles.rows, BH=tiles.neurons, BK=tiles.depth)
    sums = torch.zeros(rows, spec.d, dtype=torch.float32, device=x.device)
    module.grads_input[grid](
        *where, g_up, g_gate, first[0], first[2], sums, SPAN=lists.span, **sizes, **launch.options
    )

    def weight(left: Tensor, right: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        width = right.numel() // rows
        out = x.new_empty(spec.d_ff, width)
        alone = None if bias is None else x.new_empty(spec.d_ff)
        tall = cdiv(spec.expert_size, tiles.neurons)
        module.grads_weight[(spec.experts * tall * cdiv(width, tiles.depth),)](
            lists.rows, lists.counts, left, right, out, out if alone is None else alone,
            lists.entries // spec.experts, W=width, SUM=alone is not None, SPAN=lists.span,
            **sizes, **launch.options,
        )  # fmt: skip
        return out, alone

    into, into_bias = weight(g_up, x2, b_in)
    gate, gate_bias = weight(g_gate, x2, b_gate) if spec.gated else (None, None)
    out, _ = weight(h, grad, None)
    last = None if b_out is None else grad.reshape(rows, -1).sum(0)
    return sums.to(x.dtype).view(x.shape), into, into_bias, gate, gate_bias, out, last
