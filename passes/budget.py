"""Choose the thresholds: how much to spend, or how much quality to keep.

One knob, the share of experts that run, sets the tau of every block: the quantile of the block's
own scores, relative to each row's largest, at that share, or at the one it is allotted. A single
tau for all blocks would spend on the blocks with flat scores rather than on those that need it.
Static selection has no threshold: the best experts of every row run, as many as the share says.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule

from ..ir.cost import dense_flops
from ..ir.cost import evaluate as cost
from .allot import allot, options, tau_at
from .base import Context, Pass, PassResult, capture, kl_divergence
from .lift import blocks, lifted_layers
from .quality import evaluate

_TARGET = re.compile(r"\s*(cosine|flops|kl)\s*(>=|<=)\s*(0?\.\d+|1(?:\.0*)?|0)\s*")


def parse_target(text: str) -> tuple[str, float]:
    """Read ``cosine >= 0.98``, ``flops <= 0.6`` or ``kl <= 0.05``.

    Raises:
        ValueError: Any other text.
    """
    match = _TARGET.fullmatch(text)
    if match is None or (match[1] == "cosine") != (match[2] == ">="):
        raise ValueError(
            f"budget {text!r} is neither like 'cosine >= 0.98' nor 'flops <= 0.6' or 'kl <= 0.05'"
        )
    return match[1], float(match[3])


def set_tau(model: nn.Module, tau: float | Mapping[str, float] | Sequence[float]) -> None:
    """Turn the knob of a converted model; takes effect on the next call, with no compilation.

    Args:
        model: A converted model, compiled or not.
        tau: One threshold in ``[0, 1]`` for all blocks, or one per block by name or in order. Of
            a block whose gate is its router, any that is not negative: the least magnitude.

    Raises:
        ValueError: A threshold out of range, or a number of thresholds that does not fit.
    """
    found = blocks(getattr(model, "_orig_mod", model))
    if not found:
        raise ValueError(f"{type(model).__name__} holds no dynamic-k block; convert it first")
    if isinstance(tau, Mapping):
        values = dict(tau)
    elif isinstance(tau, Sequence):
        values = dict(zip(found, tau, strict=True))
    else:
        values = dict.fromkeys(found, float(tau))
    for name, value in values.items():
        if name not in found:
            raise ValueError(f"no block is named {name!r}; there are {', '.join(found)}")
        most = math.inf if found[name].gate_routed else 1
        if not 0 <= value <= most:
            raise ValueError(f"tau {value} of {name} is outside [0, {most}]")
    with torch.no_grad():
        for name, value in values.items():
            found[name].tau.fill_(value)
            found[name].router.top = 0


def set_top(model: nn.Module, share: float) -> None:
    """Run the same number of experts for every row, those that score best, in place of a tau.

    Args:
        model: A converted model.
        share: Of each block's experts; at least one runs.

    Raises:
        ValueError: A gate is the router of a block; it knows thresholds alone.
    """
    for name, block in blocks(model).items():
        if block.gate_routed:
            raise ValueError(f"the gate of {name} is its router, which has no static selection")
        block.router.top = min(block.experts, max(1, round(share * block.experts)))
        with torch.no_grad():
            block.tau.fill_(1.0)


def taus_at(
    gm: GraphModule, context: Context, shares: Sequence[float], *, even: bool = True
) -> list[dict[str, float]]:
    """Thresholds of every block at which each of the shares of all experts runs.

    Args:
        gm: A graph with blocks whose routers are trained.
        context: Of which the held-out data is looked at.
        shares: For each of which thresholds are returned.
        even: The same share in every block; else as :mod:`.allot` gives it to each.
    """
    inputs = capture(gm, context.held_out, 8192, offload=context.offload)
    result: list[dict[str, float]] = [{} for _ in shares]
    if even:
        wanted = [dict.fromkeys(inputs, share) for share in shares]
    else:
        found = options(gm, context)
        wanted = [allot(found, share) for share in shares]
    for name, block in blocks(gm).items():
        with torch.no_grad():
            compared = block.compared(inputs[name])
        most = math.inf if block.gate_routed else 1.0
        for taus, by_name in zip(result, wanted, strict=True):
            taus[name] = min(most, float(tau_at(compared, by_name[name], sample=4096)))
    return result


@dataclass(frozen=True)
class Budget(Pass):
    """Set tau so that a target holds on held-out data.

    Attributes:
        target: ``flops <= x`` (of what is converted, routers included), ``cosine >= x``, or
            ``kl <= x`` of a language model (nats per token).
        tolerance: Of the share, where a search ends.
        static: Run the same number of experts for every row, as MoEfication does, not those that
            reach a threshold.
        even: The same share in every block; else as :mod:`.allot` gives it to each.
    """

    name: ClassVar[str] = "budget"
    target: str = "flops <= 0.55"
    tolerance: float = 0.01
    static: bool = False
    even: bool = True

    def run(self, gm: GraphModule, context: Context) -> PassResult:
        """Set the thresholds of ``gm``."""
        kind, wanted = parse_target(self.target)
        if kind == "kl" and context.distance is not kl_divergence:
            raise ValueError(f"budget {self.target!r} needs a language model's logits")
        low, high = 0.0, 1.0
        tried: list[dict[str, Any]] = []
        margin = 0.003  # other text will differ a little
        if kind == "flops":
            low = high = _share_within(gm, wanted - margin)
        while True:
            share = (low + high) / 2
            if self.static:
                set_top(gm, share)
            else:
                set_tau(gm, taus_at(gm, context, [share], even=self.even)[0])
            quality = evaluate(gm, context, context.held_out)
            tried.append(
                dict(
                    share=share,
                    cosine=quality.cosine,
                    flops=quality.flops,
                    distance=quality.distance,
                )
            )
            note = f"distance {quality.distance:.3f}"
            context.progress(self.name, len(tried), len(tried) + 1, note)
            kept = quality.distance <= wanted if kind == "kl" else quality.cosine >= wanted
            if kind == "flops":
                # A share counts scores of a sample; thresholds change what later blocks see.
                over = quality.flops - wanted
                if -2 * margin <= over <= 0 or share == 0 or (len(tried) >= 5 and over <= 0):
                    break
                # after some tries only down, so that the end is within the budget
                step = max(over, 0) + margin if len(tried) >= 4 else over + margin
                low = high = min(1.0, max(0.0, share - step))
            elif high - low <= self.tolerance:
                if kept or high >= 1:
                    break
                low = high = min(1.0, high + self.tolerance)
            elif kept:
                high = share
            else:
                low = share
        taus = {name: float(b.tau) for name, b in blocks(gm).items()}
        return PassResult(gm, True, {"tau": taus, "tried": tried})


def _share_within(gm: GraphModule, wanted: float) -> float:
    """The share of experts at which blocks take so much of what they replaced, at least 0."""
    dense = sum(dense_flops(p) for p in lifted_layers(gm).values())
    router = sum(cost("router_flops", b) for b in blocks(gm).values())
    experts = sum(cost("flops", b) for b in blocks(gm).values()) - router
    return min(1.0, max(0.0, (wanted * dense - router) / experts))
