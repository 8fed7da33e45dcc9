"""Train routers to predict the L2 norm of each expert's output (D2DMoE, section 3.2).

What MoEfication's routers predict is there to compare with: how active each expert is. The
backbone is frozen. One pass over the data gives every block's inputs; labels are computed
from them once, in memory, and each router then sees them many times.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn import functional as F

from ..ir.block import PREDICTIONS, DynkFFN, Router
from .base import Context, Pass, PassResult, capture, expert_norms, relative_norms, trainable
from .lift import blocks
from .split import split


@dataclass(frozen=True)
class Split(Pass):
    """Make the neurons of each expert adjacent, by balanced k-means.

    The paper groups neurons whose weights point the same way. Neurons that fire on the same tokens
    are what a router can switch off together, and after sparsification that is known: at equal
    FLOPs it leaves less for the router to explain and the model closer to its teacher.

    Attributes:
        rows: Rows on which firing is compared; 0 groups by the weights, as the paper does.
    """

    name: ClassVar[str] = "split"
    rows: int = 4096

    def run(self, gm: GraphModule, context: Context) -> PassResult:
        """Permute the neurons of every block."""
        inputs: dict[str, Tensor] = {}
        if self.rows:
            inputs = capture(gm, context.train, self.rows, offload=context.offload)
        found = _learned(gm)
        jobs = ((block, inputs.pop(name, None), context.seed) for name, block in found.items())
        for i, (name, done) in enumerate(zip(found, context.each(self._split, jobs), strict=True)):
            (block,) = done
            gm.set_submodule(name, block)
            context.progress(self.name, i + 1, len(found), name)
        sizes = {n: f"{b.experts} x {b.expert_size}" for n, b in blocks(gm).items()}
        return PassResult(gm, True, sizes)

    def _split(self, job: tuple[DynkFFN, Tensor | None, int]) -> tuple[DynkFFN]:
        block, x, seed = job
        points = None
        if x is not None:
            with torch.no_grad():
                points = block.hidden(x[: self.rows]).T.contiguous()
        split(block, points=points, seed=seed)
        return (block,)


@dataclass(frozen=True)
class Route(Pass):
    """Fit every router: norms by mean squared error, activations by binary cross-entropy.

    Attributes:
        tokens: Rows whose activations are held in memory.
        steps: Optimisation steps per router.
        batch: Rows per step.
        lr: Peak learning rate of Adam; decays linearly.
        relative: Norms are learnt relative to their row's, as thresholds read them. It matters
            where rows differ much in size, as in decoders.
        predicts: ``norms``, or ``activations``: the sum of an expert's, as a share of the largest
            sum (MoEfication, arXiv 2110.01786, section 3.3).
    """

    name: ClassVar[str] = "route"
    tokens: int = 60_000
    steps: int = 900
    batch: int = 1024
    lr: float = 1e-2
    predicts: str = "norms"
    relative: bool = False

    def run(self, gm: GraphModule, context: Context) -> PassResult:
        """Train the routers of ``gm``.

        Raises:
            ValueError: There is no such prediction.
        """
        if self.predicts not in PREDICTIONS:
            raise ValueError(f"predicts is {self.predicts!r}; it is one of {sorted(PREDICTIONS)}")
        inputs = capture(gm, context.train, self.tokens, offload=context.offload)
        found, unexplained = _learned(gm), {}
        jobs = ((block, inputs.pop(name), context.seed) for name, block in found.items())
        for i, (name, fitted) in enumerate(zip(found, context.each(self._fit, jobs), strict=True)):
            block, error = fitted
            gm.set_submodule(name, block)
            unexplained[name] = error
            context.progress(self.name, i + 1, len(found), f"{error:.3f} unexplained")
        assert all(math.isfinite(v) for v in unexplained.values())
        return PassResult(gm, True, {"unexplained variance": unexplained})

    def _fit(self, job: tuple[DynkFFN, Tensor, int]) -> tuple[DynkFFN, float]:
        """Train the router of one block, which draws rows as if there were no other."""
        block, x, seed = job
        router = block.router
        assert isinstance(router, Router)
        generator = torch.Generator().manual_seed(seed)
        router.predicts, router.top = self.predicts, 0
        with torch.no_grad():
            labels, size = self._labels(block, x)
            if self.predicts == "norms":
                _least_squares(router, x[:8192], labels[:8192])
            variance = labels.var(0).mean().clamp_min(1e-12)
        optimizer = torch.optim.Adam(router.parameters(), lr=self.lr, fused=True)
        with trainable(block, list(router.parameters())):
            for step in range(self.steps):
                rows = self._draw(x, self.batch, generator)
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * (1 - step / self.steps) + 1e-5
                if self.predicts == "norms":
                    loss = F.mse_loss(router.score(x[rows]), labels[rows])
                else:
                    logits = router.predict(x[rows])
                    loss = F.binary_cross_entropy_with_logits(logits, labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
        with torch.no_grad():
            rows = self._draw(x, 4096, generator)
            error = F.mse_loss(router.score(x[rows]), labels[rows]) / variance
            router.up.weight.mul_(size)
        return block, error.item()

    def _draw(self, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(x), (min(count, len(x)),), generator=generator)
        return rows.to(x.device)

    def _labels(self, block: DynkFFN, x: Tensor) -> tuple[Tensor, float]:
        """What the router is to learn, ``[rows, E]``, and the unit that it is in."""
        wanted = torch.cat([self._measured(block, part) for part in x.split(4096)])
        if self.predicts != "norms":
            return wanted / wanted.max().clamp_min(1e-12), 1.0
        if self.relative:
            return relative_norms(wanted), 1.0
        size = float(wanted.square().mean().sqrt().clamp_min(1e-12))
        return wanted / size, size

    def _measured(self, block: DynkFFN, x: Tensor) -> Tensor:
        h = block.hidden(x)
        if self.predicts == "norms":
            return expert_norms(block, h)
        each = h.abs().view(-1, block.experts, block.expert_size)
        return each.sum(-1)


def _learned(gm: GraphModule) -> dict[str, DynkFFN]:
    """Blocks with a router of their own; where the gate is the router, there is nothing to do."""
    return {name: b for name, b in blocks(gm).items() if not b.gate_routed}


def _least_squares(router: Router, x: Tensor, labels: Tensor) -> None:
    """Start where random hidden neurons say most: each of size 1, the best weights on them.

    From random weights on both layers, hundreds of steps go by before a router knows more than the
    mean norm of each expert.
    """
    h = router.down(x).relu()
    size = h.square().mean(0).sqrt().clamp_min(1e-12)
    router.down.weight.div_(size[:, None])
    h = (h / size).double()
    gram = h.T @ h
    gram += 1e-3 * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), device=x.device)
    router.up.weight.copy_(torch.linalg.solve(gram, h.T @ labels.double()).T)
