"""What is kept of a tree: the target's own choice, or a sample of its law, whatever was drafted.

Trees that do not depend on chance are verified by sampling from the target at each node and going
on while the sample is a child ("naive" in SpecInfer, arXiv 2305.09781, and SpecExec, 2406.02532).
That is lossless for any tree, and takes one uniform number per token however the tree looks, so
that a seed gives the text that plain decoding gives. Children *sampled* from a drafter's law need
the multi-round rule (:func:`multi_round`).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...ir.errors import SkimpError

_NUCLEUS = 1024
"""Tokens among which a nucleus is looked for before all are sorted."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen from logits, in the order of transformers.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_k: Only so many likeliest tokens; 0 for all.
        top_p: Only the likeliest tokens that reach this mass.
        repetition_penalty: What logits of tokens seen before are divided by if positive, else
            multiplied by.
        seed: Of the uniform numbers, one stream per row.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        wrong = [
            text
            for bad, text in (
                (not self.temperature >= 0, "temperature < 0"),
                (self.top_k < 0, "top_k < 0"),
                (not 0 < self.top_p <= 1, "top_p outside (0, 1]"),
                (not self.repetition_penalty > 0, "repetition_penalty <= 0"),
            )
            if bad
        ]
        if wrong:
            raise SkimpError(f"sampling: {', '.join(wrong)}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    @property
    def penalises(self) -> bool:
        """Whether tokens seen before matter."""
        return self.repetition_penalty != 1

    def generator(self, row: int) -> torch.Generator:
        """The stream of a row."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + row)

    def penalised(self, logits: Tensor, seen: Collection[int]) -> Tensor:
        """Logits ``[V]`` after the repetition penalty."""
        if not self.penalises or not seen:
            return logits
        where = torch.tensor(sorted(seen), device=logits.device)
        old = logits[where]
        new = torch.where(old < 0, old * self.repetition_penalty, old / self.repetition_penalty)
        return logits.index_copy(0, where, new)

    def law(self, logits: Tensor, seen: Collection[int] = ()) -> Tensor:
        """Probabilities ``[V]``, float32, of logits ``[V]``; not for greedy decoding."""
        x = self.penalised(logits, seen).float() / self.temperature
        if self.top_k and self.top_k < len(x):
            x = x.masked_fill(x < x.topk(self.top_k).values[-1], float("-inf"))
        p = x.softmax(-1)
        if self.top_p < 1:
            most = p.topk(min(_NUCLEUS, len(p))).values
            if float(most.sum()) < self.top_p:
                most = p.sort(descending=True).values
            before = most.cumsum(0) - most
            p = p * (p >= most[before < self.top_p][-1])
            p = p / p.sum()
        return p

    def choose(self, logits: Tensor, seen: Collection[int], generator: torch.Generator) -> int:
        """The next token of logits ``[V]``."""
        if self.greedy:
            return int(self.penalised(logits, seen).argmax())
        return draw(self.law(logits, seen), generator)


def draw(law: Tensor, generator: torch.Generator) -> int:
    """A token of a law ``[V]``, by one uniform number."""
    u = torch.rand((), generator=generator, dtype=torch.float64)
    sums = law.double().cumsum(0).cpu()
    token = int(torch.searchsorted(sums, u * sums[-1], right=True))
    return min(token, len(law) - 1)


def descend(
    logits: Tensor,
    tokens: Sequence[int],
    parents: Sequence[int],
    sampling: Sampling,
    seen: Collection[int],
    generator: torch.Generator,
    laws: Mapping[int, Tensor] | None = None,
) -> tuple[list[int], int]:
    """Follow the target's choices down a tree.

    Args:
        logits: ``[n, V]``, at each node.
        tokens: By node.
        parents: By node; -1 for the root, node 0.
        sampling: How to choose.
        seen: Tokens of the row so far, the root included, if ``sampling`` penalises any.
        generator: The row's stream.
        laws: By node whose children were drawn: the law of the draws, :func:`multi_round`. The
            others' children must not depend on chance.

    Returns:
        The accepted nodes from the root down, and the token chosen after the last of them.
    """
    below: list[dict[int, int]] = [{} for _ in tokens]
    for node, parent in enumerate(parents):
        if parent >= 0:
            below[parent][tokens[node]] = node
    # one transfer where reading a number waits for the device
    chosen = None
    if sampling.greedy and not sampling.penalises and (logits.is_cuda or len(tokens) == 1):
        chosen = logits.argmax(-1).tolist()
    known = set(seen) if sampling.penalises else set()
    path, node = [0], 0
    while True:
        law = laws.get(node) if laws else None
        if law is not None:
            p = sampling.law(logits[node], known).cpu()
            _, token = multi_round(p, law, list(below[node]), generator)
        elif chosen is not None:
            token = int(chosen[node])
        else:
            token = sampling.choose(logits[node], known, generator)
        following = below[node].get(token)
        if following is None:
            return path, token
        node = following
        path.append(node)
        known.add(token)


def multi_round(
    p: Tensor, q: Tensor, tokens: Sequence[int], generator: torch.Generator
) -> tuple[int | None, int]:
    """Accept one of several tokens drawn from a drafter's law one after another, or none.

    The tokens were drawn without replacement: each from ``q`` without those before it. A token is
    accepted with probability ``min(1, p / q)``; else what is left of ``p`` beyond ``q`` is the law
    from there on, and the token is struck from ``q`` (Sequoia, arXiv 2402.12374, algorithm 2).

    Args:
        p: The target's law ``[V]``.
        q: The drafter's law ``[V]``.
        tokens: As drawn, in order.
        generator: The row's stream.

    Returns:
        Which token was accepted (``None``: none of them), and the token that follows.
    """
    p, q = p.double(), q.double()
    for i, x in enumerate(tokens):
        u = float(torch.rand((), generator=generator, dtype=torch.float64))
        if u * float(q[x]) < float(p[x]):
            return i, x
        rest = (p - q).clamp_min(0)
        if float(rest.sum()) > 0:  # else p equals q, and only rounding rejected
            p = rest / rest.sum()
        q = q.clone()
        q[x] = 0
        left = float(q.sum())
        if left <= 0:
            break
        q = q / left
    return None, draw(p, generator)


def draft_without_replacement(law: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """Tokens of a law ``[V]`` drawn one after another, each without those before it."""
    count = min(count, int((law > 0).sum()))
    noise = torch.rand(law.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
    race = law.double().cpu() / -noise.log()  # exponential clocks: the first to ring wins
    return race.topk(count).indices.tolist()
