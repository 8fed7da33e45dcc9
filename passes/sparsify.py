"""Make the hidden activations sparse, without labels.

    act = gelu | silu  -->  act = relu          (relufy)
    min |y - y_dense|^2 / var(y_dense) + alpha * Hoyer(h)    per block, on the dense model's inputs

Each network learns alone to give the dense network's outputs on the dense model's inputs
(layer-wise self-distillation), so blocks do not wait for each other and nothing is back-propagated
through attention. Square Hoyer is the sparsity term of D2DMoE, section 3.1. A GELU or SiLU that
is kept is never zero, so there the term is taken of clamp(pre-activation, min) - min instead. A
user's own loss comes next, in :mod:`.finetune`.
"""

import math
import time
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from ..ir.block import DynkFFN, Projection
from .base import Context, Pass, PassResult, capture, device_of, hoyer, trainable
from .lift import blocks
from .precision import bfloat16_pays, mixed_precision


@dataclass(frozen=True)
class Relufy(Pass):
    """Replace the activation of every block by ReLU, which is zero where it does not fire.

    Squared ReLU is so already, and stays.
    """

    name: ClassVar[str] = "relufy"

    def run(self, gm: GraphModule, context: Context) -> PassResult:
        """Set the activation; weights stay as they are."""
        before = {name: b.act for name, b in blocks(gm).items()}
        smooth = [b for b in blocks(gm).values() if b.act not in ("relu", "relu2")]
        for block in smooth:
            block.act = "relu"
        return PassResult(gm, bool(smooth), {"was": before})


@dataclass(frozen=True)
class Sparsify(Pass):
    """Distil each dense network into its sparse block, layer by layer.

    Attributes:
        tokens: Tokens to train on; the data is repeated if it holds fewer.
        epochs: Passes over each chunk while its activations are in memory.
        alpha: Weight of the square Hoyer term (of the share of active neurons).
        lr: Peak learning rate of Adam.
        chunk: Tokens whose activations are held in memory at once.
        batch: Rows per step.
        seconds: Stop after this long, the schedule shortened to match.
        clamp: For models that keep GELU or SiLU: the pre-activation (of a gated network, the
            gate's) under which a neuron counts as silent, -10 in the paper's code. ``None`` takes
            the term of the hidden activations, for ReLU.
    """

    name: ClassVar[str] = "sparsify"
    tokens: int = 130_000
    epochs: int = 2
    alpha: float = 0.05
    lr: float = 5e-4
    chunk: int = 16_000
    batch: int = 512
    seconds: float = math.inf
    clamp: float | None = None

    def run(self, gm: GraphModule, context: Context) -> PassResult:
        """Train the blocks of ``gm`` that replaced networks."""
        return self.distil(gm, context, {n: b for n, b in blocks(gm).items() if not b.linear})

    def distil(self, gm: GraphModule, context: Context, students: dict[str, DynkFFN]) -> PassResult:
        """Train these blocks of ``gm`` to give what the teacher's modules of their names give."""
        teachers = {n: context.teacher.get_submodule(n) for n in students}
        trained = {
            n: [p for k, p in b.named_parameters() if not k.startswith("router.")]
            for n, b in students.items()
        }
        optimizers = {
            n: torch.optim.Adam(p, lr=self.lr, betas=(0.9, 0.99), fused=True)
            for n, p in trained.items()
        }
        students = dict(students)
        narrow = bfloat16_pays(device_of(gm))  # asked once: workers could measure differently
        stream, done, start = cycle(context.train), 0, time.monotonic()
        stats: dict[str, Any] = {}
        learning = [p for group in trained.values() for p in group]
        with trainable(gm, learning):
            while (fraction := self._fraction(done, start)) < 1:
                limit = min(self.chunk, self.tokens - done)
                inputs = capture(context.teacher, stream, limit, list(students), context.offload)
                held = len(inputs[next(iter(students))])
                fit = partial(self._fit, fraction=fraction, seed=context.seed + done, narrow=narrow)
                jobs = (
                    (students[n], teachers[n], inputs.pop(n), optimizers[n]) for n in list(students)
                )
                for name, fitted in zip(students, context.each(fit, jobs), strict=True):
                    students[name], optimizers[name], stats[name] = fitted
                    gm.set_submodule(name, students[name])
                done += held
                mean = sum(s["zeros"] for s in stats.values()) / len(stats)
                context.progress(self.name, done, self.tokens, f"{mean:.0%} zeros")
        return PassResult(gm, True, {"tokens": done, "blocks": stats})

    def _fraction(self, done: int, start: float) -> float:
        return max(done / self.tokens, (time.monotonic() - start) / self.seconds)

    def _fit(
        self,
        job: tuple[DynkFFN, Any, Tensor, torch.optim.Optimizer],
        *,
        fraction: float,
        seed: int,
        narrow: bool,
    ) -> tuple[DynkFFN, torch.optim.Optimizer, dict[str, float]]:
        """Train one block on one chunk; every block sees its rows in the same order."""
        block, teacher, x, optimizer = job
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            dense = teacher if isinstance(teacher, Projection) else teacher.every_expert
            want = torch.cat([dense(part) for part in x.split(4096)])
            variance = want.var().clamp_min(1e-12)
        warm = min(1.0, (fraction + 0.02) * 10)
        for group in optimizer.param_groups:
            group["lr"] = self.lr * warm * (0.5 + 0.5 * math.cos(math.pi * fraction) + 0.02)
        alpha = self.alpha * min(1.0, 2 * fraction + 0.02)  # the paper's linear warm-up
        error = zeros = torch.tensor(0.0)
        for _ in range(self.epochs):
            order = torch.randperm(len(x), generator=generator).to(x.device)
            for rows in order.split(self.batch):
                with mixed_precision(x.device, narrow):
                    pre = block.pre_activation(x[rows])
                    h = block.fire(pre, x[rows])
                    active = h if self.clamp is None else pre.clamp_min(self.clamp) - self.clamp
                    error = F.mse_loss(block.project(h).float(), want[rows]) / variance
                    loss = error + alpha * hoyer(active.float()).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                zeros = (active.detach() == 0).float().mean()
        optimizer.zero_grad(set_to_none=True)  # else those of all layers stay until the next chunk
        return block, optimizer, {"error": error.item(), "zeros": zeros.item()}
