"""How likely drafted tokens are to be right, learned from what follows; and the rate achieved."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .node import Tree

Key = tuple[int, int, int, int, int]
"""Drafter, kind, confidence, rank, depth: each in a few steps."""


@dataclass(slots=True)
class Calibration:
    """Shares of proposals that turned out right, by what was known of them.

    Two levels: all ranks and depths of a drafter's kind and confidence, and each apart, which is
    drawn towards the former as long as it has few observations. Old observations fade.

    Attributes:
        memory: Observations of one kind that count.
        trust: Observations that the drafter's own confidence weighs.
        pull: Observations that the coarser level weighs.
    """

    memory: int = 400
    trust: float = 4.0
    pull: float = 8.0
    coarse: dict[tuple[int, int, int], list[float]] = field(default_factory=dict)
    fine: dict[Key, list[float]] = field(default_factory=dict)

    @staticmethod
    def key(drafter: int, kind: int, chance: float, rank: int, depth: int) -> Key:
        """Where a proposal is counted."""
        c = min(max(chance, 1e-4), 1 - 1e-4)
        confidence = round(1.5 * math.log(c / (1 - c)))
        return drafter, kind, confidence, min(rank, 4), min(depth, 3)

    def chance(self, key: Key, chance: float) -> float:
        """The chance that a proposal is right if what is before it is.

        Args:
            key: Of :meth:`key`.
            chance: As the drafter has it.
        """
        n, hits = self.coarse.get(key[:3], (0.0, 0.0))
        p = (hits + self.trust * chance) / (n + self.trust)
        n, hits = self.fine.get(key, (0.0, 0.0))
        return min((hits + self.pull * p) / (n + self.pull), 0.999)

    def observe(self, key: Key, hit: bool) -> None:
        """Count a proposal whose truth is known, verified or not."""
        fade = 1 - 1 / self.memory
        for found in (
            self.coarse.setdefault(key[:3], [0.0, 0.0]),
            self.fine.setdefault(key, [0.0, 0.0]),
        ):
            found[0] = found[0] * fade + 1
            found[1] = found[1] * fade + hit


@dataclass(slots=True)
class Draft:
    """A tree with, by node, what its proposals are counted under.

    ``laws``: by node whose children were drawn: the law that they were drawn from, ``[V]``.
    """

    tree: Tree
    keys: list[list[Key]] = field(default_factory=lambda: [[]])
    laws: dict[int, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Hindsight:
    """Compares each tree with the text that came to follow its root, verified or not.

    So nothing needs to be verified for the sake of learning: a proposal that was cut off is judged
    all the same, if the text reaches it.

    Attributes:
        calibration: What learns.
        most: Trees per row that wait for text.
    """

    calibration: Calibration
    most: int = 4
    waiting: list[list[tuple[Draft, int]]] = field(default_factory=list)

    def begin(self, rows: int) -> None:
        """New rows."""
        self.waiting = [[] for _ in range(rows)]

    def drop(self, rows: Sequence[int]) -> None:
        """Remove rows."""
        gone = set(rows)
        self.waiting = [w for i, w in enumerate(self.waiting) if i not in gone]

    def observe(self, row: int, draft: Draft, text: Sequence[int]) -> None:
        """Judge a row's tree, and those that wait.

        Args:
            row: Its index.
            draft: The tree of this step.
            text: The tokens that follow its root.
        """
        left = []
        for old, node in (*self.waiting[row], (draft, 0)):
            at: int | None = node
            for token in text:
                children = old.tree.children[at]  # type: ignore[index]
                for proposed, child in children.items():
                    for key in old.keys[child]:
                        self.calibration.observe(key, proposed == token)
                at = children.get(token)
                if at is None:
                    break
            if at is not None and old.tree.children[at]:
                left.append((old, at))
        self.waiting[row] = left[-self.most :]


@dataclass(slots=True)
class Rate:
    """Tokens per second, of the last steps: what one more second must be worth.

    The optimum over many steps is the fixed point of choosing, at each step, what maximises tokens
    less the rate times seconds (Dinkelbach, 1967).

    Attributes:
        memory: Steps that count.
    """

    memory: int = 48
    tokens: float = 0.0
    seconds: float = 0.0

    def observe(self, tokens: float, seconds: float) -> None:
        """Count a step."""
        fade = 1 - 1 / self.memory
        self.tokens = self.tokens * fade + tokens
        self.seconds = self.seconds * fade + seconds

    def value(self, plain: float) -> float:
        """The rate, but no less than plain decoding gives, which is always to be had."""
        return max(self.tokens / self.seconds if self.seconds > 0 else 0.0, plain)

    def scale(self, factor: float) -> None:
        """The batch changed, and with it what plain decoding gives."""
        self.tokens *= factor
