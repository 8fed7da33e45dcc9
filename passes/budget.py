"""Choose the thresholds: how much to spend, or how much quality to keep.

One knob, the share of experts that run, sets the tau of every block: the quantile of the block's
own scores, relative to each row's largest, at that share. A single tau for all blocks would spend
on the blocks with flat scores rather than on those that need it.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.fx import GraphModule

from ..ir.cost import dense_flops
from ..ir.cost import evaluate as cost
from .base import Context, Pass, PassResult, capture, kl_divergence
from .lift import blocks, lifted_layers
from .quality import evaluate
from .recover import relative, relative_quantile

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
        tau: One threshold in ``[0, 1]`` for all blocks, or one per block by name or in order.

    Raises:
        ValueError: A threshold outside ``[0, 1]``, or a number of thresholds that does not fit.
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
        if not 0 <= value <= 1:
            raise ValueError(f"tau {value} of {name} is outside [0, 1]")
    with torch.no_grad():
        for name, value in values.items():
            found[name].tau.fill_(value)


def taus_at(gm: GraphModule, context: Context, shares: Sequence[float]) -> list[dict[str, float]]:
    """Thresholds of every block at which each of the shares of its experts runs."""
    inputs = capture(gm, context.held_out, 8192)
    result: list[dict[str, float]] = [{} for _ in shares]
    for name, block in blocks(gm).items():
        with torch.no_grad():
            ratio = relative(block.router(inputs[name]))
        for taus, share in zip(result, shares, strict=True):
            exact = relative_quantile(ratio, share, sample=4096)
            taus[name] = 0.0 if share >= 1 else min(1.0, float(exact))
    return result


@dataclass(frozen=True)
class Budget(Pass):
    """Set tau so that a target holds on held-out data.

    Attributes:
        target: ``flops <= x`` (of what is converted, routers included), ``cosine >= x``, or
            ``kl <= x`` of a language model (nats per token).
        tolerance: Of the share, where a search ends.
    """

    name: ClassVar[str] = "budget"
    target: str = "flops <= 0.55"
    tolerance: float = 0.01

    def run(self, gm: GraphModule, context: Context) -> PassResult:
        """Set the thresholds of ``gm``."""
        kind, wanted = parse_target(self.target)
        if kind == "kl" and context.distance is not kl_divergence:
            raise ValueError(f"budget {self.target!r} needs a language model's logits")
        low, high = 0.0, 1.0
        tried: list[dict[str, Any]] = []
        margin = 0.003  # other text will differ a little
        if kind == "flops":
            low = high = max(0.0, wanted - margin - _router_share(gm))
        while True:
            share = (low + high) / 2
            taus = taus_at(gm, context, [share])[0]
            set_tau(gm, taus)
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
                low = high = max(0.0, share - step)
            elif high - low <= self.tolerance:
                if kept or high >= 1:
                    break
                low = high = min(1.0, high + self.tolerance)
            elif kept:
                high = share
            else:
                low = share
        return PassResult(gm, True, {"tau": taus, "tried": tried})


def _router_share(gm: GraphModule) -> float:
    dense = sum(dense_flops(p) for p in lifted_layers(gm).values())
    return sum(cost("router_flops", b) for b in blocks(gm).values()) / dense
