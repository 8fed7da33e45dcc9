"""A decoder as it leaves Python: tokens and a cache to logits and the cache after them."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

Past = list[list[Tensor]]
"""Keys and values of each layer, ``[batch, heads, earlier tokens, width of a head]``."""


class CachedStep(nn.Module):
    """One call of a causal language model of transformers, with its cache as tensors.

    Two programs make a generation: one without ``past`` for the prompt, one with it for the rest.

    Args:
        model: A module tree with blocks, such as :func:`skimp.graft` gives.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Past | None = None
    ) -> dict[str, Any]:
        """Run some tokens.

        Args:
            input_ids: ``[batch, tokens]``.
            attention_mask: ``[batch, earlier tokens + tokens]``, 0 where there is padding.
            past: ``present`` of the call before.

        Returns:
            ``logits``, ``[batch, tokens, vocabulary]``, and ``present``: the cache after them.
        """
        from transformers import DynamicCache

        cache = DynamicCache(None if past is None else [(k, v) for k, v in past])
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        held = [[layer.keys, layer.values] for layer in out.past_key_values.layers]
        return {"logits": out.logits, "present": held}


def cached_example(
    step: CachedStep, past: int = 0, batch: int = 2, tokens: int = 3
) -> tuple[dict[str, Any], dict[str, dict[int, Any]]]:
    """Arguments of a call after ``past`` tokens, and which of their dimensions are free.

    Returns:
        Keyword arguments, and what :func:`skimp.export` takes as ``dynamic_shapes``.
    """
    config: Any = step.model.config
    text = torch.arange(batch * (past + tokens)).view(batch, -1) % config.vocab_size
    mask = torch.ones_like(text)
    example: dict[str, Any] = {"input_ids": text[:, past:].contiguous(), "attention_mask": mask}
    shapes: dict[str, dict[int, Any]] = {n: {0: Dim.AUTO, 1: Dim.AUTO} for n in example}
    if past:
        with torch.no_grad():  # a cache of noise would drive a model where it never goes
            before = step(text[:, :past], mask[:, :past])["present"]
        example["past"] = [[held.contiguous() for held in layer] for layer in before]
        for i in range(len(before)):
            shapes |= {f"past_{i}_{j}": {0: Dim.AUTO, 2: Dim.AUTO} for j in range(2)}
    return example, shapes
