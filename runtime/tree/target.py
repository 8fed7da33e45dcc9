"""What a decoder must offer so that trees can be verified on it.

A *node* is a token that may follow; its *parent* is the node before it. Decoding is a loop::

    logits, hidden = target.prefill(prompts)          # the prompts are committed
    roots = sample(logits)
    while rows:
        logits, hidden = target.verify(tokens, parents)   # node 0 of each row: its root
        target.keep(accepted)                             # node 0 and what was accepted after it
        roots = sample(logits at the last accepted node of each row)

A row's root is the token sampled last. Its keys and values are not in the cache before it is
verified, so plain decoding is verifying trees of one node, and nothing more is needed for it.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Target(Protocol):
    """A decoder with a key-value cache of some rows.

    Attributes:
        name: Names what a measured time is of: architecture, sizes, dtype, device and kernels.
        vocabulary: Tokens that logits are of, V.
        width: Of hidden states, d.
        limit: Most positions per row, verified nodes included.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def vocabulary(self) -> int: ...  # noqa: D102

    @property
    def width(self) -> int: ...  # noqa: D102

    @property
    def limit(self) -> int: ...  # noqa: D102

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Forget all rows, and commit the prompts as new ones.

        Args:
            prompts: At least one token each.

        Returns:
            Logits ``[B, V]`` and last hidden states ``[B, d]`` (what the output layer is given) at
            the last token of each.
        """
        ...

    def verify(self, tokens: Sequence[Tensor], parents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Run one tree per row in one pass. Commits nothing; another call starts over.

        A node sees the committed tokens, its ancestors and itself. Its position is
        ``lengths()[row]`` for the root, and one more per level below.

        Args:
            tokens: By row, ``[n]`` int64; rows may differ in n. On the CPU.
            parents: By row, ``[n]`` int64: the index of each node's parent in its own row, less
                than the node's own; -1 for node 0, the root. On the CPU.

        Returns:
            Logits ``[sum n, V]`` and hidden states ``[sum n, d]``, row after row. They are valid
            until the next call: copy what is to live longer.
        """
        ...

    def keep(self, accepted: Sequence[Tensor]) -> None:
        """Commit nodes of the trees verified last; the others vanish.

        Args:
            accepted: By row, ``[a]`` int64: a path from the root, in order. Empty: the row stays
                as it was. Where the path is 0, 1, .., a-1, nothing is copied.
        """
        ...

    def drop(self, rows: Sequence[int]) -> None:
        """Remove finished rows; those after them move up. They cost nothing from here on."""
        ...

    def lengths(self) -> list[int]:
        """Tokens committed, by row; its length is the number of rows, B."""
        ...
