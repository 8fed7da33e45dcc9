"""Make the activations sparse while the model learns its user's task (D2DMoE, section 3.1).

    loss(outputs, batch) + alpha * mean over blocks of Hoyer(h)

All weights but tables of embeddings learn, end to end and with every expert running. Sparsify
comes before: it repairs what the change of activation broke, without labels and far more cheaply,
so this starts near the task.
"""

import math
from dataclasses import dataclass
from itertools import cycle
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter

from ..ir.block import DynkFFN
from ..ir.errors import CalibrationError
from .base import (
    Context,
    Pass,
    PassResult,
    call,
    hoyer,
    learnable,
    learning_rate,
    paced,
    real_rows,
    replaced,
    task_loss,
    trainable,
)
from .data import real_tokens
from .lift import blocks
from .parts import run
from .sharded import sharded


class _Watched(nn.Module):
    """A block that runs every expert and keeps how dense its activations were."""

    def __init__(self, block: DynkFFN) -> None:
        super().__init__()
        self.block = block
        self.mask: Tensor | None = None
        self.hoyer = self.zeros = torch.tensor(0.0)
        self.rows = 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.block.hidden(x)
        rows = real_rows(h, self.mask)
        self.hoyer = hoyer(rows).mean()
        self.zeros = (rows.detach() == 0).float().mean()
        self.rows = len(rows)
        return self.block.project(h)


@dataclass(frozen=True)
class Finetune(Pass):
    """Train the whole model on the user's loss and the square Hoyer term.

    Attributes:
        steps: Optimisation steps; the data is repeated if it holds fewer batches.
        lr: Peak learning rate of AdamW; cosine decay.
        alpha: Weight of the square Hoyer term (of the share of active neurons).
        seconds: Stop after this long, the schedule shortened to match.
    """

    name: ClassVar[str] = "finetune"
    together: ClassVar[bool] = True
    steps: int = 300
    lr: float = 1e-4
    alpha: float = 0.05
    seconds: float = math.inf

    def run(self, gm: GraphModule, context: Context) -> PassResult:
        """Train ``gm``.

        Raises:
            CalibrationError: No loss was given, or it gives no number to learn from.
        """
        if context.loss is None:
            raise CalibrationError("finetune needs the task's loss: convert(..., loss=...)")
        watched = {name: _Watched(b) for name, b in blocks(gm).items()}
        routers = {id(p) for w in watched.values() for p in w.block.router.parameters()}
        body = [p for p in learnable(gm) if id(p) not in routers]
        stream, ranks = cycle(context.train), context.ranks
        stats: dict[str, float] = {}
        with (
            replaced(gm, dict(watched)),
            sharded(ranks, gm, body, context.offload) as (body, parts),
        ):
            optimizer = torch.optim.AdamW(
                body, lr=self.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
            )
            with trainable(gm, body), context.training(optimizer):
                for step, fraction in ranks.in_step(paced(self.steps, self.seconds)):
                    batch = next(stream)
                    own = ranks.part(batch)
                    for w in watched.values():
                        w.mask = real_tokens(own)
                    for group in optimizer.param_groups:
                        group["lr"] = self.lr * learning_rate(step, fraction)
                    got = run(Interpreter(gm), own, parts) if parts else call(gm, own)
                    task = task_loss(context, ranks.whole(got), batch)
                    rows = [w.rows for w in watched.values()]
                    density = ranks.mean(torch.stack([w.hoyer for w in watched.values()]), rows)
                    alpha = self.alpha * min(1.0, 2 * fraction + 0.02)  # the paper's linear warm-up
                    optimizer.zero_grad(set_to_none=True)
                    (task + alpha * density.mean()).backward()
                    torch.nn.utils.clip_grad_norm_(body, 1.0)
                    optimizer.step()
                    zeros = ranks.mean(torch.stack([w.zeros for w in watched.values()]), rows)
                    stats = {"steps": step + 1, "loss": task.item(), "zeros": zeros.mean().item()}
                    context.progress(self.name, step + 1, self.steps, f"loss {stats['loss']:.3f}")
        return PassResult(gm, True, stats)
