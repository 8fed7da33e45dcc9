"""A smaller model as drafter.

It keeps a cache of its own. What it ran of a tree that was accepted stays; what it did not run, as
another drafter proposed it or no drafter was asked, it catches up with in the pass that next asks
for it, at a price that :meth:`Assistant.seconds` knows.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...ir.cost import StepCurve
from ...ir.errors import SkimpError
from .costs import Costs
from .hf import HFTarget
from .node import Children, Tree
from .target import Target
from .verify import Sampling
from .words import Words


@dataclass(slots=True)
class _Row:
    """What a row's cache lacks of the committed text, and where nodes of the tree lie in it.

    ``last``: by node, the place of its last token among those run since the last commit; ``first``
    likewise. ``run``: so many tokens.
    """

    behind: list[int] = field(default_factory=list)
    first: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    run: int = 0


class Assistant:
    """A model that proposes its likeliest tokens; see :class:`~skimp.runtime.tree.node.Drafter`.

    Args:
        target: The small model, as a target that can grow trees (``verify(.., grow=True)``).
        words: Between the vocabulary of what it drafts for and its own.
        name: In reports.
        width: Most children per node.
        costs: Measured curves of ``target``; by default loaded or profiled in ``begin``.
    """

    def __init__(
        self, target: Any, words: Words, *, name: str = "model", width: int = 4,
        costs: Costs | None = None,
    ) -> None:  # fmt: skip
        self.name, self.target, self.words, self.width = name, target, words, width
        device = getattr(target, "device", torch.device("cpu")).type
        self.costs = costs or Costs(f"draft-{target.name}", device, 5.0)
        self._open = words.back >= 0
        self._rows: list[_Row] = []

    @classmethod
    def load(cls, path: str, target: Target, tokenizer: Any, model: Any) -> "Assistant":
        """Load a model as a drafter.

        Args:
            path: A folder, or a name on the hub.
            target: What it drafts for.
            tokenizer: The target's; without one, equal sizes of vocabulary count as equal ones.
            model: The target's model, whose device is used.

        Raises:
            SkimpError: It cannot be loaded, or shares too few tokens with the target.
        """
        from ..models import load_decoder
        from .fused import target_of

        loaded = load_decoder(path)
        small: Any = loaded.model.to(getattr(model, "device", "cpu"))
        made = target_of(small) if small.device.type == "cpu" else HFTarget(small)
        sizes = target.vocabulary, made.vocabulary
        if tokenizer is not None:
            words = Words.between(tokenizer, loaded.tokenizer, sizes)
        elif abs(sizes[0] - sizes[1]) < 1024:
            words = Words.same(*sizes)
        else:
            raise SkimpError(
                f"{path} has {sizes[1]} tokens, the model {sizes[0]}: give the model's tokenizer, "
                "so that the tokens that they share can be found"
            )
        return cls(made, words, name=f"model {path}")

    def begin(self, prompts: Sequence[Sequence[int]], hidden: Tensor) -> None:
        """Run the prompts."""
        spelt = [self.words.spell(p) for p in prompts]
        room = self.target.limit - 1
        self.target.prefill([s[-room:] for s in spelt])
        self._rows = [_Row() for _ in prompts]

    def prepare(self) -> float:
        """Profile the small model where it has not been; returns seconds spent."""
        before = self.costs.spent
        self.costs.prepare(self.target, self.target.lengths())
        return self.costs.spent - before

    def expand(self, trees: Sequence[Tree], nodes: Sequence[tuple[int, int]]) -> list[Children]:
        """Run nodes, and what is before them and was not run; propose the likeliest."""
        logits, fit = self._logits(trees, nodes)
        found = iter(self._children(logits) if logits is not None else ())
        return [next(found) if ok else Children([], []) for ok in fit]

    def laws(
        self, trees: Sequence[Tree], nodes: Sequence[tuple[int, int]], sampling: Sampling
    ) -> list[Tensor | None]:
        """Run nodes likewise; give the law of what follows, over the target's tokens."""
        logits, fit = self._logits(trees, nodes)
        made: list[Tensor | None] = []
        rows = iter(logits.cpu() if logits is not None else ())
        for ok in fit:
            made.append(self._law(next(rows), sampling) if ok else None)
        return made

    def _law(self, logits: Tensor, sampling: Sampling) -> Tensor:
        law = sampling.law(logits.float().masked_fill(~self._open, float("-inf")))
        mapped = torch.zeros(len(self.words.there))
        return mapped.index_add_(0, self.words.back[self._open], law[self._open])

    def _logits(
        self, trees: Sequence[Tree], nodes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor | None, list[bool]]:
        """Run nodes; logits ``[n, V]`` of those for which there was room, and which these are."""
        start = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in self._rows]
        parents: list[list[int]] = [[] for _ in self._rows]
        grow = any(r.run for r in self._rows)
        rooms = [self.target.limit - n for n in self.target.lengths()]
        fit = [
            self._enter(self._rows[row], rooms[row], trees[row], node, tokens[row], parents[row])
            for row, node in nodes
        ]
        total = sum(map(len, tokens))
        if not total:
            return None, fit
        logits, _ = self.target.verify(
            [torch.tensor(t, dtype=torch.int64) for t in tokens],
            [torch.tensor(p, dtype=torch.int64) for p in parents],
            grow=grow,
        )
        first, at = 0, []  # where what a row ran before would lie in this pass
        for state, new in zip(self._rows, tokens, strict=True):
            at.append(first - state.run + len(new))
            first += len(new)
        where = [at[r] + self._rows[r].last[n] for (r, n), ok in zip(nodes, fit, strict=True) if ok]
        self._curve().observe(total, time.perf_counter() - start)
        return logits[where], fit

    def _enter(
        self,
        state: _Row,
        room: int,
        tree: Tree,
        node: int,
        tokens: list[int],
        parents: list[int],
    ) -> bool:
        """Add a node to what is run, after its ancestors; says whether there is room."""
        missing = [n for n in tree.path(node) if n not in state.last]
        spelt = [self.words.there[tree.tokens[n]] for n in missing]
        if missing[0] == 0:
            spelt[0] = (*state.behind, *spelt[0])
        if state.run + sum(map(len, spelt)) > room:
            return False
        for n, new in zip(missing, spelt, strict=True):
            above = state.last[tree.parents[n]] if n else -1
            state.first[n] = state.run
            for token in new:
                tokens.append(token)
                parents.append(above)
                above = state.run
                state.run += 1
            state.last[n] = state.run - 1
        return True

    def _children(self, logits: Tensor) -> list[Children]:
        """The likeliest tokens that both vocabularies have."""
        x = logits.float()
        total = x.logsumexp(-1, keepdim=True)
        if not bool(self._open.all()):
            x = x.masked_fill(~self._open.to(x.device), float("-inf"))
        most = x.topk(self.width, -1)
        chances = (most.values - total).exp().tolist()
        tokens = self.words.back[most.indices.cpu()].tolist()
        found = []
        for words, ps in zip(tokens, chances, strict=True):
            kept = [(w, p) for w, p in zip(words, ps, strict=True) if p > 1e-4 and w >= 0]
            found.append(Children([w for w, _ in kept], [p for _, p in kept]))
        return found

    def commit(
        self, trees: Sequence[Tree], accepted: Sequence[Sequence[int]], hidden: Sequence[Tensor]
    ) -> None:
        """Keep what was run of the accepted path; remember what was not."""
        paths = []
        for row, tree, path in zip(self._rows, trees, accepted, strict=True):
            kept: list[int] = []
            if path and path[0] in row.last:
                row.behind = []  # it ran before the root
            for node in path:
                if node in row.last:
                    kept += range(row.first[node], row.last[node] + 1)
                else:
                    row.behind += self.words.there[tree.tokens[node]]
            paths.append(torch.tensor(kept, dtype=torch.int64))
            row.first, row.last, row.run = {}, {}, 0
        self.target.keep(paths)

    def drop(self, rows: Sequence[int]) -> None:
        """Remove rows."""
        gone = set(rows)
        self._rows = [r for i, r in enumerate(self._rows) if i not in gone]
        self.target.drop(rows)

    def seconds(self, nodes: int) -> float:
        """By the measured curve, with what it is behind."""
        behind = sum(len(r.behind) for r in self._rows if not r.run)
        return self._curve()(nodes + behind)

    def _curve(self) -> StepCurve:
        return self.costs.at(len(self._rows), max(self.target.lengths()))
