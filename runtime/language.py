"""Language models: text as full windows, perplexity, and what perfect selection would give."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ir.errors import CalibrationError
from ..passes.base import first_tensor
from ..passes.data import Batch, data_file
from ..passes.lift import blocks


def windows(
    tokenizer: Any, passages: Sequence[str], *, length: int = 256, batch: int = 4
) -> list[Batch]:
    """Passages one after another, cut into windows of equal length without padding.

    Args:
        tokenizer: A Hugging Face tokenizer; its end-of-text token goes between passages.
        passages: Text.
        length: Tokens per window.
        batch: Windows per batch; fewer remain over than make one window.

    Raises:
        CalibrationError: The text does not fill two windows.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = [i for e in tokenizer(list(passages))["input_ids"] for i in (*e, *end)]
    count = len(ids) // length
    if count < 2:
        raise CalibrationError(
            f"{len(ids)} tokens of text do not fill two windows of {length}; give more text"
        )
    rows = torch.tensor(ids[: count * length]).view(count, length)
    return [
        dict(input_ids=part, attention_mask=torch.ones_like(part)) for part in rows.split(batch)
    ]


@torch.no_grad()
def sampled(
    model: nn.Module,
    tokenizer: Any,
    tokens: int,
    *,
    length: int = 256,
    batch: int = 4,
    seed: int = 0,
) -> list[Batch]:
    """Text that a model writes itself, from nothing, at temperature 1: data of its own kind.

    On a GPU a million tokens take half a minute; on two processors hours, so use text there.

    Args:
        model: A causal language model of transformers, with ``generate``.
        tokenizer: Its tokenizer.
        tokens: At least so many in all.
        length: Tokens per window; none is padding, and an end of text is followed by another text.
        batch: Windows per batch.
        seed: Of the draws.
    """
    device = next(model.parameters()).device
    start = tokenizer.bos_token_id
    rows = -(-tokens // length)
    at_once = min(rows, 1024 if device.type != "cpu" else 16)
    parts: list[Tensor] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        while sum(map(len, parts)) < rows:
            first = torch.full((at_once, 1), start, device=device)
            parts.append(
                model.generate(  # type: ignore[operator]
                    input_ids=first,
                    attention_mask=torch.ones_like(first),
                    do_sample=True,
                    top_k=0,
                    top_p=1.0,
                    temperature=1.0,
                    max_new_tokens=length - 1,
                    min_new_tokens=length - 1,
                    eos_token_id=None,
                    pad_token_id=tokenizer.eos_token_id,
                )
            )
    found = torch.cat(parts)[:rows]
    return [
        dict(input_ids=part, attention_mask=torch.ones_like(part)) for part in found.split(batch)
    ]


def wikitext2(limit: int | None = None) -> str:
    """The validation text of WikiText-2, from ``$SKIMP_DATA/wikitext2/valid.txt``.

    Args:
        limit: Only the first so many characters.

    Raises:
        CalibrationError: It is not there.
    """
    return data_file("wikitext2", "valid.txt").read_text(encoding="utf-8")[:limit]


def perplexity(model: nn.Module, data: Sequence[Batch]) -> float:
    """Exponential of the mean negative log-likelihood of each token given those before it.

    Every window stands alone, and its first token is not predicted, so the figure falls as windows
    grow; compare models at one length.

    Args:
        model: A causal language model that gives logits ``[batch, length, vocabulary]``.
        data: Batches with ``input_ids``, as :func:`windows` makes them.
    """
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in data:
            logits = first_tensor(model(**batch))[:, :-1].flatten(0, 1)
            following = batch["input_ids"][:, 1:].flatten()
            for part, want in zip(logits.split(512), following.split(512), strict=True):
                total += float(F.cross_entropy(part.float(), want, reduction="sum"))
            count += len(following)
    return math.exp(total / count)


@contextmanager
def best_neurons(gm: nn.Module, share: float) -> Iterator[None]:
    """Let every block keep, for each row, only the neurons that add most to its output.

    The bound that experts and routers are measured against: neurons are ranked by the norm of what
    they add, ``|h_i| |w_out_i|``, which takes computing all of them.

    Args:
        gm: A model with blocks.
        share: Of the neurons that stay.
    """

    def strongest(block: Any, x: Tensor) -> Tensor:
        h = block.hidden(x)
        size = h.abs() * block.w_out.norm(dim=1)
        keep = max(1, round(share * block.d_ff))
        least = size.kthvalue(block.d_ff - keep + 1, dim=-1, keepdim=True).values
        return block.project(h * (size >= least))  # type: ignore[no-any-return]

    handles = [
        b.register_forward_hook(lambda block, args, _: strongest(block, args[0]))
        for b in blocks(gm).values()
    ]
    before = {b: b.dense for b in blocks(gm).values()}
    for block in before:
        block.dense = True  # its own output is not used; the cheapest
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for block, dense in before.items():
            block.dense = dense
