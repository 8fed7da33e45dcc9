"""Children drawn from a drafter's law, for verification in several rounds.

A sample of the drafter's law is accepted a little more often than its likeliest tokens are, if the
text is sampled too. What is verified must then not depend on what was drawn: each node's number of
children is fixed before they are drawn, all of them are verified, and the chain goes on below the
one drawn first.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ...ir.errors import SkimpError
from .calibrate import Draft
from .node import Drafter, Tree
from .policy import MOST, Base
from .verify import Sampling, draft_without_replacement


@runtime_checkable
class Draws(Protocol):
    """A drafter that knows its law of the next token, over the target's vocabulary."""

    def laws(
        self, trees: Sequence[Tree], nodes: Sequence[tuple[int, int]], sampling: Sampling
    ) -> list[Tensor | None]:
        """``[V]`` per node, as :meth:`~.node.Drafter.expand` runs them; ``None``: no room left."""
        ...


@dataclass(slots=True)
class DrawnPolicy(Base):
    """Chains of drawn tokens, as long as they pay at the rate achieved.

    Attributes:
        width: Children drawn per node.
        longest: Most levels.
        sampling: How the text is sampled: the drafter's law takes the same form.
        generator: Of the draws; the text has streams of its own.
        right: By level: how often one of the children drawn there was accepted, of those reached.
    """

    width: int = 2
    longest: int = 8
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=1.0))
    generator: torch.Generator = field(default_factory=torch.Generator)
    right: list[float] = field(default_factory=lambda: [0.6] * 8)

    def follow(self, sampling: Sampling) -> None:
        """Draw as the text is sampled.

        Raises:
            SkimpError: It is not sampled.
        """
        if sampling.greedy:
            raise SkimpError("drafts are drawn for sampled text: set a temperature above 0")
        self.sampling = sampling
        self.generator.manual_seed(sampling.seed * 7_368_787 + 1)

    def draft(self, roots: Sequence[int], depth: Sequence[int]) -> list[Draft]:
        """Level by level; how many levels is decided by what was accepted before."""
        drafts = self.start(roots)
        trees = [d.tree for d in drafts]
        drafter: Drafter = self.drafters[0]
        assert isinstance(drafter, Draws)
        front = [(row, 0) for row in range(len(roots)) if depth[row] > 0]
        rate = self.rate.value(len(roots) / self.curve(len(roots)))
        reach, rows = 1.0, len(roots)
        for level in range(self.longest):
            if not front or rows + self.width * len(front) > len(roots) + MOST:
                break
            if not self._pays(reach, level, len(front), rows, rate):
                break
            below = []
            laws = drafter.laws(trees, front, self.sampling)
            for (row, node), law in zip(front, laws, strict=True):
                if law is None:
                    continue
                tokens = draft_without_replacement(law, self.width, self.generator)
                drafts[row].laws[node] = law
                for token in tokens:
                    drafts[row].tree.add(node, token, self.right[level] / len(tokens))
                    drafts[row].keys.append([])
                rows += len(tokens)
                if level + 1 < depth[row]:
                    below.append((row, trees[row].children[node][tokens[0]]))
            reach *= self.right[level]
            front = below
        return drafts

    def _pays(self, reach: float, level: int, nodes: int, rows: int, rate: float) -> bool:
        """Whether this level, or it with those after it, gains more tokens than it costs."""
        gained, step = 0.0, 0.0
        for ahead in range(level, self.longest):
            reach *= self.right[ahead]
            gained += nodes * reach
            step += self.drafters[0].seconds(nodes)
            more = rows + self.width * nodes * (ahead - level + 1)
            if gained > rate * (step + self.curve(more) - self.curve(rows)):
                return True
        return False

    def select(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """All of them, in the order drawn."""
        return [list(range(len(d.tree))) for d in drafts]

    def learn(self, drafts: Sequence[Draft], texts: Sequence[Sequence[int]], taken: float) -> None:
        """Count the levels reached and accepted, and the rate."""
        for draft, text in zip(drafts, texts, strict=True):
            node = 0
            for token in text:
                if node not in draft.laws:
                    break
                child = draft.tree.children[node].get(token)
                level = draft.tree.depths[node]
                self.right[level] += 0.02 * ((child is not None) - self.right[level])
                if child is None:
                    break
                node = child
        self.rate.observe(sum(map(len, texts)), taken)
