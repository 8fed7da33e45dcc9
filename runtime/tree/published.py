"""Rules that others published, to compare with: EAGLE-2's fixed tree, and CAST's thresholds."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from .calibrate import Draft
from .policy import MOST, Base, ordered, pooled


@dataclass(slots=True)
class FixedPolicy(Base):
    """The tree of EAGLE-2 (arXiv 2406.16858): fixed depth, width and size, whatever they cost.

    Attributes:
        size: Tokens verified per row, the root included.
        depth: Layers drafted.
        width: Nodes expanded per layer and row.
    """

    size: int = 60
    depth: int = 7
    width: int = 10

    def draft(self, roots: Sequence[int], depth: Sequence[int]) -> list[Draft]:
        """Layer by layer, by every drafter."""
        drafts = self.start(roots)
        if self.size <= 1:
            return drafts
        for d in range(len(self.drafters)):
            layer = [(row, 0) for row in range(len(roots)) if depth[row] > 0]
            for level in range(self.depth):
                if not layer:
                    break
                below: list[list[tuple[float, int]]] = [[] for _ in roots]
                for (row, _), children in zip(layer, self.expand(drafts, d, layer), strict=True):
                    tree = drafts[row].tree
                    if level + 1 < depth[row]:
                        below[row] += [(-tree.values[c], c) for c in children]
                layer = [
                    (row, c)
                    for row, found in enumerate(below)
                    for _, c in sorted(set(found))[: self.width]
                    if (row, c) not in self.expanded[d]
                ]
        return drafts

    def select(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """The likeliest of each row."""
        chosen = []
        for row, draft in enumerate(drafts):
            chosen += [(v, row, n) for v, _, n in pooled([draft], self.size - 1)]
        return ordered(drafts, chosen)


def keep_while(
    gains: Sequence[float], costs: Sequence[float], threshold: float, paid: float = 0.0
) -> int:
    """Algorithm 1 of CAST: how many of the first items pay.

    Args:
        gains: u by number of items, from 1.
        costs: c by number of items, from 1.
        threshold: Least ratio of what is gained to what it costs, since the last item kept.
        paid: c of no item.

    Returns:
        The last number kept, or 0; scanning goes on after one that is not.
    """
    kept, u0, c0 = 0, 0.0, paid
    for k, (u, c) in enumerate(zip(gains, costs, strict=True), 1):
        if (c > c0 and (u - u0) / (c - c0) > threshold) or (c <= c0 and u > u0):
            kept, u0, c0 = k, u, c
    return kept


@dataclass(slots=True)
class CastPolicy(Base):
    """CAST (arXiv 2510.26577): breadth, depth and size by three hand-set thresholds.

    Costs are in target forwards of one token, confidences as the drafter has them, and one breadth
    holds for the whole batch. The paper gives the thresholds 4, 3 and 2.5 without saying which is
    which; the length of the window is unpublished.

    Attributes:
        c1: Of breadth.
        c2: Of depth.
        c3: Of the size verified.
        width: Most nodes per layer and row.
        depth: Most layers.
        window: Ratios of neighbouring layers' gains that the next is predicted from.
    """

    calibrated: bool = False
    c1: float = 4.0
    c2: float = 3.0
    c3: float = 2.5
    width: int = 10
    depth: int = 10
    window: int = 32
    ratios: deque[float] = field(default_factory=deque)

    def draft(self, roots: Sequence[int], depth: Sequence[int]) -> list[Draft]:
        """Stage 1: layer by layer with the first drafter."""
        drafts, rows = self.start(roots), len(roots)
        plain = self.curve(rows)
        layer, last = [(row, 0) for row in range(rows) if depth[row] > 0], 0.0
        for level in range(self.depth):
            if not layer:
                break
            made = self.expand(drafts, 0, layer)
            best: list[list[tuple[float, int]]] = [[] for _ in roots]
            for (row, _), children in zip(layer, made, strict=True):
                if level + 1 < depth[row]:
                    best[row] += [(drafts[row].tree.values[c], c) for c in children]
            for found in best:
                found.sort(reverse=True)
            most = min(self.width, max(map(len, best)))
            sums = [sum(v for f in best for v, _ in f[:k]) / rows for k in range(1, most + 1)]
            costs = [self.drafters[0].seconds(rows * k) / plain for k in range(1, most + 1)]
            kept = keep_while(sums, costs, self.c1)
            if not kept:
                break
            gain, cost = sums[kept - 1], costs[kept - 1]
            if last:
                self.ratios.append(gain / last)
                if len(self.ratios) > self.window:
                    self.ratios.popleft()
            last = gain
            ahead = sum(self.ratios) / len(self.ratios) if self.ratios else 1.0
            if ahead * gain / cost < self.c2:
                break
            layer = [(row, c) for row, f in enumerate(best) for _, c in f[:kept]]
        return drafts

    def select(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """Stage 2: the likeliest nodes of the batch while they pay."""
        rows = len(drafts)
        nodes = pooled(drafts, MOST)
        sums, total = [], 0.0
        for v, _, _ in nodes:
            total += v
            sums.append(total)
        plain = self.curve(rows)
        costs = [self.curve(rows + k) / plain for k in range(1, len(nodes) + 1)]
        return ordered(drafts, nodes[: keep_while(sums, costs, self.c3, 1.0)])
