"""Token trees: what drafters propose and the verifier is given."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Children:
    """Tokens that one drafter proposes to follow a node, the likeliest first.

    Attributes:
        tokens: Different ones.
        chances: How likely each is, in (0, 1], as the drafter has it; calibrated by others.
        kinds: What else tells how far to trust each, such as the length of a match: calibration
            counts each kind separately. A small integer; 0 if there is nothing to tell.
    """

    tokens: list[int]
    chances: list[float]
    kinds: list[int] | None = None


@dataclass(slots=True)
class Tree:
    """A row's candidates. Node 0 is the root, the token sampled last, which is certain.

    Attributes:
        tokens: By node.
        parents: By node: an index less than its own; -1 for the root.
        depths: By node; 0 for the root.
        values: By node: the estimated chance that it is accepted, which never rises downwards.
        children: By node: its children by token.
    """

    tokens: list[int]
    parents: list[int] = field(default_factory=lambda: [-1])
    depths: list[int] = field(default_factory=lambda: [0])
    values: list[float] = field(default_factory=lambda: [1.0])
    children: list[dict[int, int]] = field(default_factory=lambda: [{}])

    @classmethod
    def of(cls, root: int) -> "Tree":
        """A tree of the root alone."""
        return cls([root])

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, parent: int, token: int, chance: float) -> int:
        """Add a child, or raise the value of one that is there.

        Args:
            parent: Its node.
            token: Of the child.
            chance: That it is accepted if its parent is.

        Returns:
            The child's node.
        """
        value = self.values[parent] * chance
        there = self.children[parent].get(token)
        if there is not None:
            self.values[there] = max(self.values[there], value)
            return there
        node = len(self.tokens)
        self.children[parent][token] = node
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.values.append(value)
        self.children.append({})
        return node

    def path(self, node: int) -> list[int]:
        """The nodes from the root to this one."""
        found = []
        while node >= 0:
            found.append(node)
            node = self.parents[node]
        return found[::-1]


class Drafter(Protocol):
    """Proposes what may follow. It may be slow or wrong: the output stays what it is.

    Rows are those of the target; the engine calls the methods in the order ``begin``, then, for
    each step, any number of ``expand`` and one ``commit``; ``drop`` after any ``commit``.

    Attributes:
        name: In reports and stored curves; different among the drafters of a run.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    def begin(self, prompts: Sequence[Sequence[int]], hidden: Tensor) -> None:
        """New rows. ``hidden`` ``[B, d]`` is the target's last hidden state of each prompt."""
        ...

    def expand(self, trees: Sequence[Tree], nodes: Sequence[tuple[int, int]]) -> list[Children]:
        """Propose children, in one pass over all nodes.

        Args:
            trees: One per row.
            nodes: (row, node of its tree), each at most once between two calls of ``commit``;
                a node's parent, if any, has been expanded by this drafter before it, unless the
                drafter is one that needs no state (the n-gram one) or catches up by itself.

        Returns:
            Children of each node, possibly none.
        """
        ...

    def commit(
        self, trees: Sequence[Tree], accepted: Sequence[Sequence[int]], hidden: Sequence[Tensor]
    ) -> None:
        """Learn what was accepted of the trees.

        Args:
            trees: As expanded.
            accepted: By row: nodes of the tree that are committed now, from the root down. The
                next tree's root is the token after them.
            hidden: By row: the target's hidden states of them, ``[len(accepted), d]``, valid
                during the call.
        """
        ...

    def drop(self, rows: Sequence[int]) -> None:
        """Remove finished rows; those after them move up."""
        ...

    def seconds(self, nodes: int) -> float:
        """Predicted duration of ``expand`` for so many nodes."""
        ...


@runtime_checkable
class Measured(Protocol):
    """A drafter whose costs must be measured before they are asked for."""

    def prepare(self) -> float:
        """Measure what is not known, with the rows there are; returns seconds spent."""
        ...
