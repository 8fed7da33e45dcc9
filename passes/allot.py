"""Give each block the share of its experts that it can least do without.

    min  sum_b error_b(s_b)    where    sum_b s_b flops_b = s sum_b flops_b

The error is what a block's output loses at a share ``s_b``, relative to its variance, on held-out
rows. The sum is separable, so one price of a FLOP decides for all: each block takes the share at
which its error and what it pays are least together (Lagrange), and the price follows from ``s``.
Blocks whose experts matter little pay for those that are hard to skip, as attention projections
are.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..ir.block import DynkFFN
from ..ir.cost import evaluate as cost
from .base import Context, capture
from .lift import blocks

STEPS = (0.03, 0.06, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Shares that are looked at."""


@dataclass(frozen=True, slots=True)
class Options:
    """What one block loses at each of :data:`STEPS`.

    Attributes:
        errors: Of its output, relative to the variance.
        flops: Per row, of all its experts, without the router.
    """

    errors: tuple[float, ...]
    flops: float


def tau_at(compared: Tensor, share: float, sample: int = 256) -> Tensor:
    """The tau at which a share of the experts run.

    Args:
        compared: What tau is compared with, ``[rows, E]``, see :meth:`DynkFFN.compared`.
        share: Of (row, expert) pairs that should run.
        sample: Rows to look at, evenly spaced.
    """
    if share >= 1:
        return compared.new_zeros(())
    rows = compared[:: max(1, len(compared) // sample)]
    values = rows.flatten()[: 2**24].float()
    # experts that never fire score 0, and a threshold of 0 would run them all
    least = torch.where(values > 0, values, 1.0).amin()
    return torch.maximum(torch.quantile(values, 1 - share), least)


def options(gm: GraphModule, context: Context, rows: int = 1024) -> dict[str, Options]:
    """Measure every block on held-out rows."""
    inputs = capture(gm, context.held_out, rows, offload=context.offload)
    return {n: _options(b, inputs[n][:rows]) for n, b in blocks(gm).items()}


@torch.no_grad()
def _options(block: DynkFFN, x: Tensor) -> Options:
    h, compared = block.hidden(x), block.compared(x)
    whole = block.project(h)
    variance = whole.float().var().clamp_min(1e-12)
    h = h.unflatten(-1, (block.experts, block.expert_size))
    errors = []
    for share in STEPS:
        run = compared >= tau_at(compared, share, len(x))
        y = block.project((h * run[..., None]).flatten(-2))
        errors.append(float((y - whole).float().square().mean() / variance))
    return Options(tuple(errors), cost("flops", block) - cost("router_flops", block))


def allot(found: Mapping[str, Options], share: float) -> dict[str, float]:
    """The share of each block at which all together run a share of their experts' FLOPs.

    Args:
        found: What :func:`options` measured.
        share: Of all experts, by FLOPs.

    Returns:
        By name; between two of :data:`STEPS` where the whole would else miss ``share``.
    """
    if share >= 1:
        return dict.fromkeys(found, 1.0)
    total = sum(o.flops for o in found.values())

    def at(price: float) -> dict[str, float]:
        best = {}
        for name, o in found.items():
            paid = price * o.flops / total
            totals = [e + paid * s for e, s in zip(o.errors, STEPS, strict=True)]
            best[name] = STEPS[totals.index(min(totals))]
        return best

    def spent(shares: Mapping[str, float]) -> float:
        return sum(s * found[n].flops for n, s in shares.items()) / total

    low, high = -30.0, 30.0  # of the price's logarithm; a high price buys little
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(math.exp(middle))) > share else (low, middle)
    few, many = at(math.exp(high)), at(math.exp(low))
    gap = spent(many) - spent(few)
    part = min(1.0, max(0.0, (share - spent(few)) / gap)) if gap > 0 else 0.0
    mixed = {n: few[n] + part * (many[n] - few[n]) for n in found}
    over = share / spent(mixed)  # beyond what the steps allow
    return {n: min(1.0, s * over) if over < 1 else s for n, s in mixed.items()}
