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
from torch.utils.checkpoint import checkpoint

from ..ir.block import DynkFFN, Router, relative
from .allot import allot, options, tau_at
from .base import (
    Context,
    Pass,
    PassResult,
    cosine_distance,
    device_of,
    embedding_weights,
    expert_norms,
    first_tensor,
    hoyer,
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
from .precision import mixed_precision


class _Gated(nn.Module):
    """A block in training: the share of experts that run is set, the threshold follows."""

    def __init__(self, block: DynkFFN, alpha: float = 0.0, relative: bool = False) -> None:
        super().__init__()
        self.block = block
        self.alpha = alpha
        self.relative = relative
        self.share = 1.0
        self.mask: Tensor | None = None
        self.router_loss = self.hoyer = torch.tensor(0.0)

    def forward(self, x: Tensor) -> Tensor:
        block = self.block
        if block.gate_routed:
            gate = block.gate(x)
            h, compared = block.times_up(gate, x), gate.detach().abs()
        else:
            h = block.hidden(x)
            compared = self._routed(h, x)
        if self.alpha:
            self.hoyer = real_rows(hoyer(h)[..., None], self.mask).mean()
        run = (compared >= tau_at(real_rows(compared, self.mask), self.share))[..., None]
        h = h.unflatten(-1, (block.experts, block.expert_size))
        return block.project((h * run).flatten(-2))

    def _routed(self, h: Tensor, x: Tensor) -> Tensor:
        """What tau is compared with, by a router that learns from the norms of its experts."""
        router = self.block.router
        assert isinstance(router, Router)
        scores = router.score(x.detach())
        with torch.no_grad():
            norms = expert_norms(self.block, h)
        if self.relative:
            norms = relative_norms(norms)
        self.router_loss = relative_error(scores, norms, self.mask, norms.float().square().mean())
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
            from one to the next (gradient checkpointing); 1 keeps everything.
    """

    name: ClassVar[str] = "recover"
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
        gated = {name: _Gated(b, self.alpha, self.relative) for name, b in blocks(gm).items()}
        routers = [p for g in gated.values() for p in g.block.router.parameters()]
        held = {id(p) for p in routers}
        embeddings = embedding_weights(gm)
        body = [p for p in gm.parameters() if id(p) not in held and id(p) not in embeddings]
        groups = [dict(params=body, lr=self.lr), dict(params=routers, lr=self.router_lr)]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
        peaks = [self.lr, self.router_lr]
        generator = torch.Generator().manual_seed(context.seed)
        found = None if self.even else options(gm, context)
        stream, device = cycle(context.train), device_of(gm)
        stats: dict[str, Any] = {}
        learning = trainable(gm, [*body, *routers])
        offloaded = context.offload.training(optimizer)
        with learning, offloaded, replaced(gm, dict(gated)):
            for step, fraction in paced(self.steps, self.seconds):
                wobble = float(torch.empty(1).uniform_(-1, 1, generator=generator))
                share = self.share + (1 - self.share) / 2 * max(0.0, 1 - fraction / 0.3)
                share = min(1.0, share * math.exp(self.jitter * wobble))
                shares = dict.fromkeys(gated, share) if found is None else allot(found, share)
                for name, g in gated.items():
                    g.share = shares[name]
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * learning_rate(step, fraction)
                with mixed_precision(device):
                    loss, distance = self._loss(gm, gated, context, next(stream))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(body, 1.0)
                optimizer.step()
                stats = {"steps": step + 1, "loss": loss.item(), "distance": distance}
                done = step + 1 if fraction == step / self.steps else fraction * self.steps
                context.progress(self.name, done, self.steps, f"distance {distance:.3f}")
        return PassResult(gm, True, stats)

    def _loss(
        self, gm: GraphModule, gated: dict[str, _Gated], context: Context, batch: Batch
    ) -> tuple[Tensor, float]:
        mask = real_tokens(batch)
        for g in gated.values():
            g.mask = mask
        with torch.no_grad():
            want, want_states = _with_states(context.teacher, list(gated), batch)
        got, got_states = _with_states(gm, list(gated), batch, self.segments)
        pairs = [(got_states[n], want_states[n]) for n in got_states]
        loss = torch.stack([relative_error(a, b, mask) for a, b in pairs]).mean()
        if context.distance is cosine_distance:  # of logits, the divergence says it all
            loss = loss + relative_error(first_tensor(got), first_tensor(want), mask)
        read, wanted = context.output(got, batch).float(), context.output(want, batch).float()
        distance = context.distance(read, wanted)
        if context.loss is not None:
            loss = loss + task_loss(context, got, batch)
        extra = [g.router_loss + self.alpha * g.hoyer for g in gated.values()]
        return loss + 2 * distance + torch.stack(extra).mean(), distance.item()


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

    def run_in(self, segments: int, inputs: Sequence[Any]) -> Any:
        """Run the graph in parts; what is inside a part is computed again for the backward pass."""
        nodes = list(self.graph.nodes)
        values = dict(zip((n for n in nodes if n.op == "placeholder"), inputs, strict=True))
        body = [n for n in nodes if n.op not in ("placeholder", "output")]
        size = -(-len(body) // segments)
        for start in range(0, len(body), size):
            part = body[start : start + size]
            inside = set(part)
            reads = dict.fromkeys(a for n in part for a in n.all_input_nodes if a not in inside)
            gives = [n for n in part if any(u not in inside for u in n.users)]

            def run(
                *known: Any,
                part: list[Node] = part,
                reads: dict[Node, None] = reads,
                gives: list[Node] = gives,
            ) -> list[Any]:
                self.env = dict(zip(reads, known, strict=True))
                for n in part:
                    self.env[n] = self.run_node(n)
                return [self.env[n] for n in gives]

            found = checkpoint(run, *(values[n] for n in reads), use_reentrant=False)
            values |= dict(zip(gives, found, strict=True))
        self.env = values
        return self.run_node(nodes[-1])

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
    gm: GraphModule, names: list[str], batch: Batch, segments: int = 1
) -> tuple[Any, dict[str, Tensor]]:
    """Run a model and keep the states that its norms give, and the input of every block."""
    tap = _Tap(gm)
    inputs = [batch[str(n.target)] for n in gm.graph.nodes if n.op == "placeholder"]
    with looking(gm, lambda name, _, x: tap.states.__setitem__(name, x), names):
        if segments > 1:
            outputs = tap.run_in(segments, inputs)
        else:
            outputs = tap.run(*inputs, enable_io_processing=False)
        states = dict(tap.states)  # running a segment again would add to them
    return gm.graph.process_outputs(outputs), states


def relative_error(
    got: Tensor, want: Tensor, mask: Tensor | None, scale: Tensor | None = None
) -> Tensor:
    """Mean squared error over real tokens, divided by the variance of what is wanted, or ``scale``.

    Rows are reduced before padding is dropped: to drop it first, autograd would scatter the
    gradient of every column.
    """
    error = (got.float() - want.float()).square().mean(-1, keepdim=True)
    scale = want.float().var() if scale is None else scale
    return real_rows(error, mask).mean() / scale.clamp_min(1e-12)
