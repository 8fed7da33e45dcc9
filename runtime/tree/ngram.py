"""Drafting from the text itself: what followed when the last tokens came before.

Prompt lookup, extended to a tree and to the text generated: each node's last two tokens are looked
up in the row's prompt and output, matches are lengthened backwards, and what followed the longest
and latest is proposed first. It costs microseconds, so it is the default.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .node import Children, Tree

_ONLY = (0.0, 0.43, 0.58, 0.71, 0.76, 0.8, 0.85, 0.85, 0.94)
"""Chance of what alone followed a match, by its length, before anything was observed."""
_FIRST = (1.0, 1.0, 0.65, 0.45, 0.4)
"""How much is left of it where 2, 3, 4 tokens followed."""
_OTHER = (0.0, 0.0, 0.15, 0.1, 0.065)
"""Chance of each of these after the first."""


@dataclass(slots=True)
class _Text:
    """A row's tokens, and where each pair and each token was followed by something."""

    tokens: list[int] = field(default_factory=list)
    pairs: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    singles: dict[int, list[int]] = field(default_factory=dict)

    def append(self, tokens: Sequence[int]) -> None:
        """Enter more text."""
        for token in tokens:
            i, text = len(self.tokens), self.tokens
            if i > 0:
                self.singles.setdefault(text[-1], []).append(i)
            if i > 1:
                self.pairs.setdefault((text[-2], text[-1]), []).append(i)
            text.append(token)


class NGram:
    """Proposes what followed the same tokens before.

    Args:
        longest: Match, in tokens; longer ones count as equal.
        width: Most children per node.
        among: Latest occurrences that are looked at.
        corpus: Other texts to look in where the row's own has no match of two tokens.
    """

    def __init__(
        self,
        longest: int = 8,
        width: int = 4,
        among: int = 16,
        corpus: Sequence[Sequence[int]] = (),
    ) -> None:
        self.name = "n-gram"
        self.longest, self.width, self.among = longest, width, among
        self._corpus = _Text()
        for text in corpus:
            self._corpus.append(text)
        self._rows: list[_Text] = []
        self._seconds = 15e-6

    def begin(self, prompts: Sequence[Sequence[int]], hidden: Tensor) -> None:
        """Index the prompts."""
        self._rows = [_Text() for _ in prompts]
        for row, prompt in zip(self._rows, prompts, strict=True):
            row.append(prompt)

    def expand(self, trees: Sequence[Tree], nodes: Sequence[tuple[int, int]]) -> list[Children]:
        """Look up each node's last tokens."""
        start = time.perf_counter()
        found = []
        for row, node in nodes:
            tree, text = trees[row], self._rows[row]
            tail: list[int] = []
            while node >= 0 and len(tail) < self.longest:
                tail.append(tree.tokens[node])
                node = tree.parents[node]
            if len(tail) < self.longest:
                tail += text.tokens[: -(self.longest - len(tail)) - 1 : -1]
            found.append(self._follow(text, tail))
        if nodes:
            taken = (time.perf_counter() - start) / len(nodes)
            self._seconds += 0.02 * (taken - self._seconds)
        return found

    def _follow(self, text: _Text, tail: list[int]) -> Children:
        """What followed ``tail``, the latest token first."""
        places: list[int] = []
        if len(tail) > 1:
            places = text.pairs.get((tail[1], tail[0]), [])
            if not places and self._corpus.tokens:
                text = self._corpus
                places = text.pairs.get((tail[1], tail[0]), [])
        known = 2
        if not places:
            places, known = text.singles.get(tail[0], [])[-4:], 1
        tokens = text.tokens
        best: dict[int, int] = {}
        votes: dict[int, int] = {}
        for place in places[: -self.among - 1 : -1]:
            length = known
            while (
                length < len(tail) and place > length and tokens[place - 1 - length] == tail[length]
            ):
                length += 1
            token = tokens[place]
            votes[token] = votes.get(token, 0) + 1
            if length > best.get(token, 0):
                best[token] = length
        order = sorted(best, key=lambda t: -best[t])[: self.width]  # stable: the latest first
        count = min(len(order), 4)
        first = _ONLY[min(best[order[0]], 8)] * _FIRST[count] if order else 0.0
        return Children(
            order,
            [_OTHER[count] if i else first for i in range(len(order))],
            [min(best[t], 8) * 4 + min(votes[t], 3) for t in order],
        )

    def commit(
        self, trees: Sequence[Tree], accepted: Sequence[Sequence[int]], hidden: Sequence[Tensor]
    ) -> None:
        """Index what was accepted."""
        for row, tree, path in zip(self._rows, trees, accepted, strict=True):
            row.append([tree.tokens[n] for n in path])

    def drop(self, rows: Sequence[int]) -> None:
        """Remove rows."""
        gone = set(rows)
        self._rows = [r for i, r in enumerate(self._rows) if i not in gone]

    def seconds(self, nodes: int) -> float:
        """As measured per node."""
        return self._seconds * nodes
