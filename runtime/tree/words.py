"""What a token of one vocabulary is called in another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...ir.errors import TargetError


@dataclass(frozen=True, slots=True)
class Words:
    """Two vocabularies: of the target, and of a drafter.

    Attributes:
        there: By the target's token: the drafter's tokens for it; at least one.
        back: By the drafter's token: the target's, or -1. ``[V]`` int64, V of the drafter's logits.
    """

    there: list[tuple[int, ...]]
    back: Tensor

    @classmethod
    def same(cls, target: int, drafter: int) -> "Words":
        """One tokenizer, of which models may pad the vocabulary, each to its own size.

        Args:
            target: Tokens that the target's logits are of.
            drafter: And the drafter's.
        """
        numbers = torch.arange(drafter)
        numbers[target:] = -1
        # what the drafter has never seen stands for its last token: a bad guess is only a bad guess
        return cls([(min(t, drafter - 1),) for t in range(target)], numbers)

    @classmethod
    def between(cls, target: Any, drafter: Any, sizes: tuple[int, int]) -> "Words":
        """Tokenizers that share tokens of the same text (token-level intersection).

        Args:
            target: Tokenizer of the target.
            drafter: Tokenizer of the drafter.
            sizes: Of their models' logits.

        Raises:
            TargetError: They share less than a tenth of the target's tokens.
        """
        ours, theirs = target.get_vocab(), drafter.get_vocab()
        if ours == theirs:
            return cls.same(*sizes)
        back = torch.full((sizes[1],), -1, dtype=torch.int64)
        there: list[tuple[int, ...]] = [() for _ in range(sizes[0])]
        shared = 0
        for text, token in ours.items():
            other = theirs.get(text)
            if other is not None and other < sizes[1] and token < sizes[0]:
                there[token] = (other,)
                back[other] = token
                shared += 1
        if shared < len(ours) / 10:
            raise TargetError(
                f"the drafter's tokenizer shares {shared} of {len(ours)} tokens with the model's: "
                "it would hardly ever propose one; take a drafter of the same family"
            )
        unknown = getattr(drafter, "unk_token_id", None) or 0
        for token, found in enumerate(there):
            if not found:
                text = target.decode([token]) if token < len(ours) else ""
                spelt = drafter.encode(text, add_special_tokens=False) if text else []
                there[token] = tuple(t for t in spelt if t < sizes[1]) or (unknown,)
        return cls(there, back)

    def spell(self, tokens: Sequence[int]) -> list[int]:
        """The drafter's tokens for a text of the target's."""
        return [t for token in tokens for t in self.there[token]]
