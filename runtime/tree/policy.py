"""Which nodes are drafted, and how many are verified: as many as pay.

With rate lambda (tokens per second achieved), a node is worth its chance of being accepted, and a
second costs lambda tokens. :class:`CostPolicy` expands nodes while the expected gain is more than
the price of drafting and verifying, then verifies the n best nodes for the n that maximises
``sum of chances - lambda * T(rows)`` over *every* n, because curves have steps and inversions; n =
0, plain decoding, is one of them. :class:`CastPolicy` is the published rule, with its three
thresholds, and :class:`FixedPolicy` the fixed tree of EAGLE-2, both to compare with.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .calibrate import Calibration, Draft, Hindsight, Rate
from .node import Drafter, Tree

Curve = Callable[[int], float]
"""Seconds of verifying so many rows, all trees and their roots together."""

LEAST = 0.01
"""Chance below which a node is not worth the handling."""
MOST = 63
"""Nodes verified beyond the roots, in all."""


class Policy(Protocol):
    """Grows trees and says what of them to verify."""

    def draft(self, roots: Sequence[int], depth: Sequence[int]) -> list[Draft]:
        """Grow a tree per row, none deeper than ``depth`` says for its row."""
        ...

    def select(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """Nodes to verify by row, the root first, each after its parent."""
        ...

    def learn(self, drafts: Sequence[Draft], texts: Sequence[Sequence[int]], taken: float) -> None:
        """Learn from a step: the tokens it gave each row, and its seconds in all."""
        ...


@dataclass(slots=True)
class Base:
    """What all policies share: drafters whose proposals are entered, with calibrated chances.

    Attributes:
        drafters: Any number.
        curve: Of the target at the present batch and context.
        calibrated: Whether chances are corrected by what was observed.
    """

    drafters: Sequence[Drafter]
    curve: Curve
    calibrated: bool = True
    calibration: Calibration = field(default_factory=Calibration)
    rate: Rate = field(default_factory=Rate)
    hindsight: Hindsight = field(init=False)
    expanded: list[set[tuple[int, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.hindsight = Hindsight(self.calibration)

    def begin(self, rows: int) -> None:
        """New rows."""
        self.hindsight.begin(rows)

    def drop(self, rows: Sequence[int], before: float, after: float) -> None:
        """Remove rows; plain decoding gave ``before`` tokens per second, and gives ``after``."""
        self.hindsight.drop(rows)
        self.rate.scale(after / before)

    def start(self, roots: Sequence[int]) -> list[Draft]:
        """Trees of roots alone."""
        self.expanded = [set() for _ in self.drafters]
        return [Draft(Tree.of(r)) for r in roots]

    def expand(
        self, drafts: Sequence[Draft], d: int, nodes: Sequence[tuple[int, int]]
    ) -> list[list[int]]:
        """Let a drafter expand nodes; returns the children of each, the likeliest first."""
        trees = [x.tree for x in drafts]
        made = []
        for (row, node), found in zip(nodes, self.drafters[d].expand(trees, nodes), strict=True):
            draft = drafts[row]
            tree, keys, kinds = draft.tree, draft.keys, found.kinds
            depth, children = tree.depths[node], []
            for rank, (token, chance) in enumerate(zip(found.tokens, found.chances, strict=True)):
                key = Calibration.key(d, kinds[rank] if kinds else 0, chance, rank, depth)
                p = self.calibration.chance(key, chance) if self.calibrated else chance
                child = tree.add(node, token, p)
                if child == len(keys):
                    keys.append([])
                keys[child].append(key)
                children.append(child)
            made.append(children)
            self.expanded[d].add((row, node))
        return made

    def learn(self, drafts: Sequence[Draft], texts: Sequence[Sequence[int]], taken: float) -> None:
        """Judge proposals by the text, and the rate by the clock."""
        for row, (draft, text) in enumerate(zip(drafts, texts, strict=True)):
            self.hindsight.observe(row, draft, text)
        self.rate.observe(sum(map(len, texts)), taken)


def pooled(drafts: Sequence[Draft], most: int, least: float = 0.0) -> list[tuple[float, int, int]]:
    """The likeliest nodes of all rows, roots apart: (chance, row, node), falling.

    Chances never rise downwards and a parent comes before its child, so the first n are closed
    under ancestors for every n.
    """
    nodes = [
        (-v, t.depths[node], row, node)
        for row, t in enumerate(d.tree for d in drafts)
        for node, v in enumerate(t.values)
        if node and v >= least
    ]
    nodes.sort()
    return [(-v, row, node) for v, _, row, node in nodes[:most]]


def best_size(chances: Sequence[float], rows: int, rate: float, curve: Curve) -> int:
    """How many of the likeliest nodes to verify: the n of the largest net gain, 0 among them.

    Args:
        chances: Falling.
        rows: Roots, which are verified in any case.
        rate: Tokens per second.
        curve: Seconds by rows.
    """
    best, size, sure = -rate * curve(rows), 0, 0.0
    for n, chance in enumerate(chances, 1):
        sure += chance
        gain = sure - rate * curve(rows + n)
        if gain > best:
            best, size = gain, n
    return size


def ordered(drafts: Sequence[Draft], chosen: Sequence[tuple[float, int, int]]) -> list[list[int]]:
    """Chosen nodes by row, depth first, the likeliest child first: its path stays in place."""
    rows: list[set[int]] = [set() for _ in drafts]
    for _, row, node in chosen:
        rows[row].add(node)
    found = []
    for draft, wanted in zip(drafts, rows, strict=True):
        order, stack, tree = [], [0], draft.tree
        while stack:
            node = stack.pop()
            order.append(node)
            if wanted:
                below = [c for c in tree.children[node].values() if c in wanted]
                stack += sorted(below, key=lambda c: tree.values[c])
        found.append(order)
    return found


@dataclass(slots=True)
class CostPolicy(Base):
    """Drafts and verifies what pays at the rate achieved, by measured costs.

    Attributes:
        width: Nodes that one call of a drafter expands at most.
        ranks: By drafter: mean chance of its first, second, .. child, none counting 0.
        idle: By drafter: steps since it was last used.
        patience: By drafter: idle steps after which it is tried again; doubles when that was
            in vain.
    """

    width: int = 16
    ranks: list[list[float]] = field(default_factory=list)
    idle: list[int] = field(default_factory=list)
    patience: list[int] = field(default_factory=list)

    def draft(self, roots: Sequence[int], depth: Sequence[int]) -> list[Draft]:
        """Expand the likeliest nodes, by whichever drafter gains most, while any gains."""
        drafts = self.start(roots)
        if not self.ranks:
            self.ranks = [[0.5, 0.1, 0.05] for _ in self.drafters]
            self.idle, self.patience = [0] * len(self.drafters), [8] * len(self.drafters)
        rate, used = self.price(len(roots)), set()
        fronts: list[list[tuple[float, int, int]]] = [
            [(1.0, row, 0) for row in range(len(roots)) if depth[row] > 0] for _ in self.drafters
        ]
        while True:
            offers = [(self._offer(d, fronts[d], drafts, rate), d) for d in range(len(fronts))]
            (gain, count), d = max(offers, default=((0.0, 0), 0))
            if gain <= 0:
                break
            fronts[d].sort(key=lambda x: (-x[0], x[1], x[2]))
            nodes = [(row, node) for _, row, node in fronts[d][:count]]
            fronts[d] = fronts[d][count:]
            used.add(d)
            self._open(drafts, d, nodes, fronts, depth)
        for d in range(len(self.drafters)):
            self.idle[d] = 0 if d in used else self.idle[d] + 1
            if d in used:
                self.patience[d] = 8
            elif self.idle[d] >= self.patience[d] and fronts[d]:
                self.idle[d], self.patience[d] = 0, min(2 * self.patience[d], 128)
                _, row, node = max(fronts[d])
                self._open(drafts, d, [(row, node)], fronts, depth)
        return drafts

    def price(self, rows: int) -> float:
        """Lambda: tokens that a second must give."""
        return self.rate.value(rows / self.curve(rows))

    def _open(
        self,
        drafts: Sequence[Draft],
        d: int,
        nodes: Sequence[tuple[int, int]],
        fronts: list[list[tuple[float, int, int]]],
        depth: Sequence[int],
    ) -> None:
        """Expand nodes; their children are what may be expanded next, by any drafter that can."""
        mean = self.ranks[d]
        for (row, node), children in zip(nodes, self.expand(drafts, d, nodes), strict=True):
            tree = drafts[row].tree
            for r in range(len(mean)):
                p = 0.0
                if r < len(children):
                    p = tree.values[children[r]] / tree.values[node]
                mean[r] += 0.02 * (p - mean[r])
            for child in children:
                v = tree.values[child]
                if v < LEAST or tree.depths[child] >= depth[row]:
                    continue
                for e, front in enumerate(fronts):
                    known = e == d or (row, node) in self.expanded[e]
                    if known and (row, child) not in self.expanded[e]:
                        item = (v, row, child)
                        if item not in front:
                            front.append(item)

    def _offer(
        self,
        d: int,
        front: list[tuple[float, int, int]],
        drafts: Sequence[Draft],
        rate: float,
    ) -> tuple[float, int]:
        """The best number of nodes for a drafter to expand now, and what it is expected to gain."""
        if not front:
            return 0.0, 0
        drafter, mean = self.drafters[d], self.ranks[d]
        cost = rate * drafter.seconds(1)
        verify = rate * self._slope(drafts, rate)
        best, count, gain = 0.0, 0, 0.0
        for n, (v, _, _) in enumerate(sorted(front, reverse=True)[: self.width], 1):
            gain += _worth(v, mean, verify, cost)
            net = gain - rate * drafter.seconds(n)
            if net > best:
                best, count = net, n
        return best, count

    def _slope(self, drafts: Sequence[Draft], rate: float) -> float:
        """Seconds that one more node costs, on the cheapest way up from what is worth verifying."""
        rows = len(drafts)
        chances = [v for v, _, _ in pooled(drafts, MOST)]
        at = rows + best_size(chances, rows, rate, self.curve)
        here = self.curve(at)
        return min(
            ((self.curve(m) - here) / (m - at) for m in range(at + 1, rows + MOST + 1)),
            default=here,
        )

    def select(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """Scan every number of the likeliest nodes."""
        rows = len(drafts)
        nodes = pooled(drafts, MOST, LEAST)
        size = best_size([v for v, _, _ in nodes], rows, self.price(rows), self.curve)
        return ordered(drafts, nodes[:size])


def _worth(v: float, mean: Sequence[float], verify: float, draft: float) -> float:
    """Tokens gained by expanding a node of chance v: its children, and the best one's in turn.

    Args:
        v: Of the node.
        mean: Chances of its children.
        verify: Price of verifying one.
        draft: Price of drafting one more time.
    """
    total, paid = 0.0, 0.0
    best = 0.0
    for _ in range(16):
        gain = sum(max(0.0, v * p - verify) for p in mean)
        total += gain
        best = max(best, total - paid)
        v *= mean[0]
        paid += draft
        if gain <= 0:
            break
    return best


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
