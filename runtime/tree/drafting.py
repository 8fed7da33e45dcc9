"""Which drafters a decoder has: ``ngram``, ``model:PATH``, joined by commas."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...ir.errors import SkimpError
from .assistant import Assistant
from .ngram import NGram
from .node import Drafter
from .target import Target

KINDS = {"ngram": False, "model": True}
"""Names, and whether a path follows."""


@dataclass(frozen=True, slots=True)
class Drafting:
    """Drafters to make.

    Attributes:
        wanted: By drafter: kind and path, which is empty where there is none.
        others: Makers of more, given the target.
    """

    wanted: tuple[tuple[str, str], ...]
    others: tuple[Callable[[Target], Drafter], ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Drafting":
        """Read ``ngram,model:PATH``.

        Raises:
            SkimpError: It says something else.
        """
        found = []
        for part in filter(None, (p.strip() for p in text.split(","))):
            kind, colon, path = part.partition(":")
            if kind not in KINDS:
                raise SkimpError(f"drafter {kind!r} is none of {', '.join(KINDS)}")
            if KINDS[kind] and not path:
                raise SkimpError(f"drafter {kind} needs a path: {kind}:PATH")
            if colon and not KINDS[kind]:
                raise SkimpError(f"drafter {kind} takes no path")
            found.append((kind, path))
        if len(set(found)) < len(found):
            raise SkimpError(f"the same drafter twice: {text}")
        return cls(tuple(found))

    def make(self, target: Target, model: Any, tokenizer: Any) -> list[Drafter]:
        """The drafters.

        Raises:
            SkimpError: One cannot be loaded, or does not fit the target.
        """
        made: list[Drafter] = []
        for kind, path in self.wanted:
            if kind == "ngram":
                made.append(NGram())
            elif kind == "model":
                made.append(Assistant.load(path, target, tokenizer, model))
        return [*made, *(other(target) for other in self.others)]
