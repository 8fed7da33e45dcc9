"""The model as its own drafter, most of its experts left out.

The weights and the cache of the text are the target's. Nodes run by routers' choice write their
keys and values where verification writes the exact ones a moment later, so nothing is kept and
nothing is caught up with. How much is left out is one threshold, chosen with the length of what is
drafted: the one whose chains give the most tokens per second by what was measured.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...ir.block import DynkFFN
from ...ir.cost import StepCurve
from ...ir.errors import SkimpError, TargetError
from ...passes.lift import blocks
from .costs import Costs
from .node import Children, Tree

TAUS = (0.02, 0.05, 0.1, 0.2, 0.35)
"""Thresholds tried, by default."""


def halves(model: Any) -> tuple[Any, dict[str, DynkFFN]]:
    """A converted model as what verifies, the dense network of tau = 0, and what drafts.

    Args:
        model: What ``from_pretrained`` makes of a folder that ``skimp.save_pretrained`` wrote.

    Returns:
        The dense model, and the dynamic-k blocks by the names of the modules they stand in for.

    Raises:
        TargetError: The model is not converted.
    """
    from ..hub.folder import dense_form

    found = blocks(model)
    if not found or not hasattr(model.config, "quantization_config"):
        raise TargetError(
            f"{type(model).__name__} has no experts to leave out: convert it (skimp.convert, then "
            "skimp.save_pretrained) and decode with that folder, or take another drafter"
        )
    dense = dense_form(model)
    dense.generation_config = model.generation_config
    return dense, {n: b for n, b in found.items() if isinstance(b, DynkFFN)}


class _Routed:
    """The target, when it runs only the experts that routers choose; what costs are asked of."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.vocabulary, self.limit = target.vocabulary, target.limit

    def verify(self, tokens: Sequence[Tensor], parents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As the drafter runs them."""
        found: tuple[Tensor, Tensor] = self.target.verify(tokens, parents, sparse=True)
        return found


class SparseSelf:
    """Proposes what the target's sparse form finds likeliest; see :class:`~.node.Drafter`.

    Args:
        target: With ``verify(.., grow=, sparse=)`` and ``threshold(tau)``.
        plain: Seconds of a pass of the target of so many rows, at the present batch.
        taus: Thresholds to choose among.
        width: Most children per node.
        longest: Chain considered when a threshold is chosen.
        costs: Curves by threshold; by default measured.

    Attributes:
        tau: The threshold in use.
        right: By threshold: share of its likeliest proposals that were right.
    """

    def __init__(
        self,
        target: Any,
        plain: Callable[[int], float],
        *,
        taus: Sequence[float] = TAUS,
        width: int = 3,
        longest: int = 8,
        costs: Sequence[Costs] | None = None,
    ) -> None:
        if not taus or not all(0 <= t <= 1 for t in taus):
            raise SkimpError(f"thresholds {list(taus)}: give at least one, each in [0, 1]")
        self.name, self.target, self.plain = "sparse", target, plain
        self.taus, self.width, self.longest = list(taus), width, longest
        device = getattr(target, "device", torch.device("cpu")).type
        self.costs = costs or [
            Costs(f"tau={t}-{target.name}", device, 10.0 / len(self.taus)) for t in self.taus
        ]
        self.right = [0.8 - 0.1 * i for i in range(len(self.taus))]  # until it is known
        self._used = [0] * len(self.taus)
        self._now, self._steps = 0, 0
        self._run: list[dict[int, int]] = []
        self._best: list[dict[int, int]] = []
        self._open: list[int | None] = []

    @property
    def tau(self) -> float:
        """The threshold in use."""
        return self.taus[self._now]

    def begin(self, prompts: Sequence[Sequence[int]], hidden: Tensor) -> None:
        """Nothing to run: the target did."""
        self._forget(len(prompts))
        self._open = [None] * len(prompts)

    def _forget(self, rows: int) -> None:
        self._run = [{} for _ in range(rows)]
        self._best = [{} for _ in range(rows)]

    def prepare(self) -> float:
        """Profile each threshold where it has not been; returns seconds spent."""
        spent = 0.0
        for tau, costs in zip(self.taus, self.costs, strict=True):
            self.target.threshold(tau)
            before = costs.spent
            costs.prepare(_Routed(self.target), self.target.lengths())  # type: ignore[arg-type]
            spent += costs.spent - before
        self.target.threshold(self.tau)
        return spent

    def expand(self, trees: Sequence[Tree], nodes: Sequence[tuple[int, int]]) -> list[Children]:
        """Run nodes of which the parents were run."""
        start = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in self._run]
        parents: list[list[int]] = [[] for _ in self._run]
        grow = any(self._run)
        if not grow:
            self.target.threshold(self.tau)
        before = [len(r) for r in self._run]
        for row, node in nodes:
            tree, run = trees[row], self._run[row]
            tokens[row].append(tree.tokens[node])
            parents[row].append(run[tree.parents[node]] if node else -1)
            run[node] = len(run)
        logits, _ = self.target.verify(
            [torch.tensor(t, dtype=torch.int64) for t in tokens],
            [torch.tensor(p, dtype=torch.int64) for p in parents],
            grow=grow,
            sparse=True,
        )
        first, at = 0, []
        for was, new in zip(before, tokens, strict=True):
            at.append(first - was)
            first += len(new)
        x = logits.float()[[at[row] + self._run[row][node] for row, node in nodes]]
        most = x.topk(self.width, -1)
        chances = (most.values - x.logsumexp(-1, keepdim=True)).exp().tolist()
        found = [
            Children(w, p, [self._now] * len(w))
            for w, p in zip(most.indices.tolist(), chances, strict=True)
        ]
        for (row, node), children in zip(nodes, found, strict=True):
            self._best[row][node] = children.tokens[0]
        self._curve(self._now).observe(len(nodes), time.perf_counter() - start)
        return found

    def commit(
        self, trees: Sequence[Tree], accepted: Sequence[Sequence[int]], hidden: Sequence[Tensor]
    ) -> None:
        """Count what was right, and choose the next threshold."""
        used = any(self._run)
        self._judge(trees)
        for row, (tree, path) in enumerate(zip(trees, accepted, strict=True)):
            best = self._best[row]
            for node, following in itertools.pairwise(path):
                if node in best:
                    self._count(best[node] == tree.tokens[following])
            self._open[row] = best.get(path[-1]) if path else None
        self._forget(len(trees))
        if used:
            self._choose()

    def _judge(self, trees: Sequence[Tree]) -> None:
        """What was proposed after the last accepted node: the next tree's root says."""
        for row, proposed in enumerate(self._open):
            if proposed is not None:
                self._count(proposed == trees[row].tokens[0])
                self._open[row] = None

    def _count(self, hit: bool) -> None:
        self.right[self._now] += 0.03 * (hit - self.right[self._now])
        self._used[self._now] += 1

    def _choose(self) -> None:
        """The best threshold so far; every now and then the one used least."""
        self._steps += 1
        now = max(range(len(self.taus)), key=self._gain)
        if self._steps % 24 == 0:
            now = min(range(len(self.taus)), key=lambda i: self._used[i])
        if now != self._now:
            self._now, self._open = now, [None] * len(self._open)  # those were of the other one

    def _gain(self, i: int) -> float:
        """Tokens per second of the best chain at a threshold, for one row."""
        curve, right = self._curve(i), min(self.right[i], 0.999)
        rows = max(len(self._run), 1)
        best, tokens = 0.0, 1.0
        for n in range(1, self.longest + 1):
            tokens += right**n
            taken = n * curve(rows) + self.plain(rows * (1 + n))
            best = max(best, rows * tokens / taken)
        return best

    def drop(self, rows: Sequence[int]) -> None:
        """Remove rows."""
        gone = set(rows)
        self._run = [r for i, r in enumerate(self._run) if i not in gone]
        self._best = [b for i, b in enumerate(self._best) if i not in gone]
        self._open = [o for i, o in enumerate(self._open) if i not in gone]

    def seconds(self, nodes: int) -> float:
        """By the curve of the threshold in use."""
        return self._curve(self._now)(nodes)

    def _curve(self, i: int) -> StepCurve:
        return self.costs[i].at(max(len(self._run), 1), max(self.target.lengths(), default=1))
