"""Which nodes are drafted, and how many are verified: as many as pay.

With rate lambda (tokens per second achieved), a node is worth its chance of being accepted, and a
second costs lambda tokens. :class:`CostPolicy` expands nodes while the expected gain is more than
the price of drafting and verifying, then verifies the n best nodes for the n that maximises
``sum of chances - lambda * T(rows)`` over *every* n, because curves have steps and inversions; n =
0, plain decoding, is one of them. What others published is in
``published``, to compare with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .calibrate import Calibration, Draft, Hindsight, Rate
from .node import Drafter, Tree
from .verify import Sampling

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

    def follow(self, sampling: Sampling) -> None:
        """A run with this sampling begins; most rules do not ask how tokens are chosen."""

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


Front = dict[tuple[int, int], float]
"""What a drafter may expand next: the chance of each (row, node)."""


def _likeliest(front: Front, count: int) -> list[tuple[int, int]]:
    return sorted(front, key=lambda at: (-front[at], at))[:count]


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
        costs = [self.curve(n) for n in range(len(roots), len(roots) + MOST + 1)]
        fronts: list[Front] = [
            {(row, 0): 1.0 for row in range(len(roots)) if depth[row] > 0} for _ in self.drafters
        ]
        while True:
            verify = rate * _slope(drafts, rate, costs)
            offers = [(self._offer(d, fronts[d], verify, rate), d) for d in range(len(fronts))]
            (gain, count), d = max(offers, default=((0.0, 0), 0))
            if gain <= 0:
                break
            used.add(d)
            self._open(drafts, d, _likeliest(fronts[d], count), fronts, depth)
        for d in range(len(self.drafters)):
            self.idle[d] = 0 if d in used else self.idle[d] + 1
            if d in used:
                self.patience[d] = 8
            elif self.idle[d] >= self.patience[d] and fronts[d]:
                self.idle[d], self.patience[d] = 0, min(2 * self.patience[d], 128)
                self._open(drafts, d, _likeliest(fronts[d], 1), fronts, depth)
        return drafts

    def price(self, rows: int) -> float:
        """Lambda: tokens that a second must give."""
        return self.rate.value(rows / self.curve(rows))

    def _open(
        self,
        drafts: Sequence[Draft],
        d: int,
        nodes: Sequence[tuple[int, int]],
        fronts: list[Front],
        depth: Sequence[int],
    ) -> None:
        """Expand nodes; their children are what may be expanded next, by any drafter that can."""
        mean = self.ranks[d]
        for at in nodes:
            del fronts[d][at]
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
                        front[row, child] = v  # another drafter may have raised it

    def _offer(self, d: int, front: Front, verify: float, rate: float) -> tuple[float, int]:
        """The best number of nodes for a drafter to expand now, and what it is expected to gain.

        Args:
            d: Drafter.
            front: What it may expand.
            verify: Price of verifying one more node, tokens.
            rate: Price of a second, tokens.
        """
        if not front:
            return 0.0, 0
        drafter, mean = self.drafters[d], self.ranks[d]
        cost = rate * drafter.seconds(1)
        best, count, gain = 0.0, 0, 0.0
        for n, v in enumerate(sorted(front.values(), reverse=True)[: self.width], 1):
            gain += _worth(v, mean, verify, cost)
            net = gain - rate * drafter.seconds(n)
            if net > best:
                best, count = net, n
        return best, count

    def select(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """Scan every number of the likeliest nodes."""
        rows = len(drafts)
        nodes = pooled(drafts, MOST, LEAST)
        size = best_size([v for v, _, _ in nodes], rows, self.price(rows), self.curve)
        return ordered(drafts, nodes[:size])


def _slope(drafts: Sequence[Draft], rate: float, costs: Sequence[float]) -> float:
    """Seconds that one more node costs, on the cheapest way up from what is worth verifying.

    Args:
        drafts: With the nodes there are.
        rate: Price of a second, tokens.
        costs: Seconds by nodes beyond the roots.
    """
    chances = [v for v, _, _ in pooled(drafts, MOST)]
    at = best_size(chances, 0, rate, costs.__getitem__)
    here = costs[at]
    return min(((c - here) / n for n, c in enumerate(costs[at + 1 :], 1)), default=here)


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
