"""Let the model learn to live with what it skips: self-distillation with routing switched on.

    loss = |states - teacher's|^2 / var   after every norm, into every block, and at the output
         + distance of the outputs that the user reads: 1 - cosine of embeddings, or the
           divergence KL(teacher | student) of a language model's next tokens
         + |router - expert norms|^2
     + the user's loss, if there is one

Experts, attention and norms learn from the distillation, routers from the norms of their experts
as these change, and a gate that is the router as the part of its neuron that it is. Routers get no
gradient through the selection: with a straight-through estimator and no regression to hold them,
scores drift away from the norms and the selection decays; with both, the estimator gained nothing
that could be measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional as F

from ..ir.block import DynkFFN, Router, relative
from .allot import allot, options, tau_at
from .base import (
    Context,
    Pass,
    PassResult,
    cosine_distance,
    device_of,
    expert_norms,
    first_tensor,
    hoyer,
    learnable,
    learning_rate,
    looking,
    paced,
    real_rows,
    relative_norms,
    replaced,
    task_loss,
    trainable,
)
from .data import Batch, real_tokens
from .lift import blocks
from .parts import Parts, run
from .precision import bfloat16_pays, mixed_precision
from .ranks import Ranks
from .sharded import sharded


class _Gated(nn.Module):
    """A block in training: the share of experts that run is set, the threshold follows.

    Attributes:
        mask: Of real tokens, in this process's part of the batch.
        whole_mask: In all of it.
        error: Of the router, by row; divided by ``size`` it is its loss.
        hoyer: By row.
    """

    def __init__(
        self,
        block: DynkFFN,
        alpha: float = 0.0,
        relative: bool = False,
        ranks: Ranks | None = None,
    ) -> None:
        super().__init__()
        self.ranks = ranks or Ranks()
        self.block = block
        self.alpha = alpha
        self.relative = relative
        self.share = 1.0
        self.mask: Tensor | None = None
        self.whole_mask: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        self.error = self.hoyer = self.size = x.new_zeros(1)  # what is not learnt
        if block.gate_routed:
            gate = block.gate(x)
            h, compared = block.times_up(gate, x), gate.detach().abs()
        else:
            h = block.hidden(x)
            compared = self._routed(h, x)
        if self.alpha:
            self.hoyer = real_rows(hoyer(h)[..., None], self.mask)
        tau = tau_at(real_rows(self.ranks.whole(compared), self.whole_mask), self.share)
        h = h.unflatten(-1, (block.experts, block.expert_size))
        return block.project((h * (compared >= tau)[..., None]).flatten(-2))

    def _routed(self, h: Tensor, x: Tensor) -> Tensor:
        """What tau is compared with, by a router that learns from the norms of its experts."""
        router = self.block.router
        assert isinstance(router, Router)
        scores = router.score(x.detach())
        with torch.no_grad():
            norms = expert_norms(self.block, h)
        if self.relative:
            norms = relative_norms(norms)
        self.error = error_rows(scores, norms, self.mask)
        self.size = norms.float().square().mean(-1)
        return relative(scores.detach())


@dataclass(frozen=True)
class Recover(Pass):
    """Train experts and routers together while only a share of the experts runs.

    Attributes:
        share: Mean share of experts that run, at the end; it starts higher.
        even: The same share in every block; else as :mod:`.allot` gives it to each.
        steps: Optimisation steps.
        lr: Peak learning rate of the model; AdamW, cosine decay.
        router_lr: The same of the routers.
        alpha: Weight of the square Hoyer term.
        jitter: The share varies by this factor from step to step, so that tau stays a knob.
        seconds: Stop after this long, the schedule shortened to match.
        relative: Routers learn norms relative to their row's, as in :class:`.Route`.
        segments: Cut the graph into so many parts and keep, for the backward pass, only what goes
            from one to the next (gradient checkpointing); 1 keeps everything. Among several
            processes each layer is a part.
    """

    name: ClassVar[str] = "recover"
    together: ClassVar[bool] = True
    share: float = 0.5
    steps: int = 150
    lr: float = 3e-4
    router_lr: float = 1e-3
    alpha: float = 0.0
    jitter: float = 0.2
    seconds: float = math.inf
    segments: int = 1
    even: bool = True
    relative: bool = False

    def run(self, gm: GraphModule, context: Context) -> PassResult:
        """Train ``gm``; thresholds are left to the budget."""
        ranks, offload, teacher = context.ranks, context.offload, context.teacher
        gated = {n: _Gated(b, self.alpha, self.relative, ranks) for n, b in blocks(gm).items()}
        routers = [p for g in gated.values() for p in g.block.router.parameters()]
        held = {id(p) for p in routers}
        body = [p for p in learnable(gm) if id(p) not in held]
        peaks, count = [self.lr, self.router_lr], len(body)
        generator = torch.Generator().manual_seed(context.seed)
        found = None if self.even else ranks.told(lambda: options(gm, context))
        stream, device = cycle(context.train), device_of(gm)
        narrow = ranks.told(lambda: bfloat16_pays(device))
        stats: dict[str, Any] = {}
        learning = [*body, *routers]
        del body, routers
        with (
            sharded(ranks, gm, learning, offload) as (learning, parts),
            sharded(ranks, teacher, learnable(teacher), offload) as (_, teacher_parts),
            trainable(gm, learning),
            replaced(gm, dict(gated)),
        ):
            groups = [
                dict(params=learning[:count], lr=self.lr),
                dict(params=learning[count:], lr=self.router_lr),
            ]
            optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
            if parts is None and self.segments > 1:
                parts = Parts(gm, self.segments)
            with context.training(optimizer):
                for step, fraction in ranks.in_step(paced(self.steps, self.seconds)):
                    wobble = float(torch.empty(1).uniform_(-1, 1, generator=generator))
                    share = self.share + (1 - self.share) / 2 * max(0.0, 1 - fraction / 0.3)
                    share = min(1.0, share * math.exp(self.jitter * wobble))
                    shares = dict.fromkeys(gated, share) if found is None else allot(found, share)
                    for name, g in gated.items():
                        g.share = shares[name]
                    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                        group["lr"] = peak * learning_rate(step, fraction)
                    with mixed_precision(device, narrow):
                        models = (gm, parts), (teacher, teacher_parts)
                        loss, distance = self._loss(models, gated, context, next(stream))
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(learning[:count], 1.0)
                    optimizer.step()
                    stats = {"steps": step + 1, "loss": loss.item(), "distance": distance}
                    done = step + 1 if fraction == step / self.steps else fraction * self.steps
                    context.progress(self.name, done, self.steps, f"distance {distance:.3f}")
        return PassResult(gm, True, stats)

    def _loss(
        self,
        models: Sequence[tuple[GraphModule, Parts | None]],
        gated: dict[str, _Gated],
        context: Context,
        batch: Batch,
    ) -> tuple[Tensor, float]:
        ranks = context.ranks
        own = ranks.part(batch)
        mask, whole_mask = real_tokens(own), real_tokens(batch)
        for g in gated.values():
            g.mask, g.whole_mask = mask, whole_mask
        (student, parts), (teacher, teacher_parts) = models
        with torch.no_grad():
            want, want_states = _with_states(teacher, list(gated), own, teacher_parts)
        got, got_states = _with_states(student, list(gated), own, parts)
        pairs = [(got_states[n], want_states[n]) for n in got_states]
        count = len(pairs)
        if context.distance is cosine_distance:  # of logits, the divergence says it all
            pairs.append((first_tensor(got), first_tensor(want)))
        errors = _means(ranks, [error_rows(a, b, mask) for a, b in pairs])
        errors = errors / ranks.variances([b for _, b in pairs]).clamp_min(1e-12)
        loss = errors[:count].mean() + errors[count:].sum()
        read, wanted = context.output(got, own).float(), context.output(want, own).float()
        distance = ranks.mean(context.distance(read, wanted)[None], [len(read)])[0]
        if context.loss is not None:
            loss = loss + task_loss(context, ranks.whole(got), batch)
        extra = _means(ranks, [g.error for g in gated.values()])
        extra = extra / _means(ranks, [g.size for g in gated.values()]).clamp_min(1e-12)
        extra = extra + self.alpha * _means(ranks, [g.hoyer for g in gated.values()])
        return loss + 2 * distance + extra.mean(), distance.item()


def _means(ranks: Ranks, rows: Sequence[Tensor]) -> Tensor:
    return ranks.mean(torch.stack([r.mean() for r in rows]), [r.numel() for r in rows])


_NORMS = {
    torch.ops.aten.layer_norm.default,
    torch.ops.aten.rms_norm.default,
}


class _Tap(Interpreter):
    """Run a graph and keep what its norms give: the states of every layer, all of one scale."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.states: dict[str, Tensor] = {}
        self.device = device_of(gm)
        self.wide = self.device.type == "cpu"

    def run_node(self, n: Node) -> Any:
        if self.wide and n.target is torch.ops.aten.scaled_dot_product_attention.default:
            result = self._attention(n)
        elif n.target is torch.ops.aten._assert_tensor_metadata.default:
            result = None  # of the dtypes that were traced, which training in bfloat16 changes
        else:
            result = super().run_node(n)
        if n.target in _NORMS:
            self.states[n.name] = result
        return result

    def _attention(self, n: Node) -> Any:
        """Stay in float32: on CPUs its backward is four times slower in bfloat16."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        wide: list[Any] = [
            a.float() if isinstance(a, Tensor) and a.dtype is torch.bfloat16 else a for a in args
        ]
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(*wide, **kwargs)


def _with_states(
    gm: GraphModule, names: list[str], batch: Batch, parts: Parts | None = None
) -> tuple[Any, dict[str, Tensor]]:
    """Run a model and keep the states that its norms give, and the input of every block."""
    tap = _Tap(gm)
    with looking(gm, lambda name, _, x: tap.states.__setitem__(name, x), names):
        outputs = run(tap, batch, parts)
        states = dict(tap.states)  # running a part again would add to them
    return outputs, states


def error_rows(got: Tensor, want: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error of every real token, ``[rows, 1]``.

    Rows are reduced before padding is dropped: to drop it first, autograd would scatter the
    gradient of every column.
    """
    return real_rows((got.float() - want.float()).square().mean(-1, keepdim=True), mask)
