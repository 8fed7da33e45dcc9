"""Which drafters a decoder has: ``ngram``, ``head:PATH``, ``sparse``, .., joined by commas."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...ir.block import DynkFFN
from ...ir.errors import CompileError, SkimpError, TargetError
from .assistant import Assistant
from .engine import Prices
from .fused import FusedTarget, target_of
from .head import HeadDrafter
from .hf import HFTarget
from .ngram import NGram
from .node import Drafter
from .sparse import SparseSelf, halves
from .target import Target

KINDS = {"ngram": False, "model": True, "head": True, "sparse": False}
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

    def target(self, model: Any, dtype: torch.dtype | None) -> tuple[Target, Any]:
        """What verifies, and the model it is of: generated code on the CPU, else the model's own.

        Args:
            model: Where the sparse form drafts, a converted one; its dense form verifies.
            dtype: Of the generated step.

        Raises:
            TargetError: The model cannot verify trees, or is not converted though it should be.
        """
        found: dict[str, DynkFFN] = {}
        if ("sparse", "") in self.wanted:
            model, found = halves(model)
        if getattr(model, "device", torch.device("cpu")).type != "cpu":
            if dtype is not None and dtype != model.dtype:
                raise TargetError(f"the model is {model.dtype}: load it in {dtype}")
            return HFTarget(model, found), model
        if not found:
            return target_of(model, dtype=dtype), model
        layers = {int(n): b for name, b in found.items() for n in name.split(".") if n.isdigit()}
        try:
            return FusedTarget(model, dtype=dtype, blocks=layers), model
        except (TargetError, CompileError) as error:
            warnings.warn(f"decoding runs the model's own code: {error}", stacklevel=2)
            return HFTarget(model, found), model

    def make(self, target: Target, prices: Prices, model: Any, tokenizer: Any) -> list[Drafter]:
        """The drafters.

        Args:
            target: What they draft for.
            prices: What it costs.
            model: It is of.
            tokenizer: Of it, if known.

        Raises:
            SkimpError: One cannot be loaded, or does not fit the target.
        """
        made: list[Drafter] = []
        for kind, path in self.wanted:
            if kind == "ngram":
                made.append(NGram())
            elif kind == "model":
                made.append(Assistant.load(path, target, tokenizer, model))
            elif kind == "head":
                made.append(HeadDrafter.load(path, target))
            elif kind == "sparse":
                made.append(SparseSelf(target, _plain(target, prices)))
        return [*made, *(other(target) for other in self.others)]


def _plain(target: Target, prices: Prices) -> Callable[[int], float]:
    """Seconds of a pass at the present batch and context."""

    def curve(rows: int) -> float:
        lengths = target.lengths()
        return prices.at(max(len(lengths), 1), max(lengths, default=1))(rows)

    return curve
