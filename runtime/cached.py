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
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    g = torch.Generator().manual_seed(0)
    example: dict[str, Any] = {
        "input_ids": torch.arange(batch * tokens).view(batch, tokens) % config.vocab_size,
        "attention_mask": torch.ones(batch, past + tokens, dtype=torch.long),
    }
    shapes: dict[str, dict[int, Any]] = {n: {0: Dim.AUTO, 1: Dim.AUTO} for n in example}
    if past:
        example["past"] = [
            [torch.randn(batch, heads, past, width, generator=g) for _ in range(2)]
            for _ in range(config.num_hidden_layers)
        ]
        for i in range(config.num_hidden_layers):
            shapes |= {f"past_{i}_{j}": {0: Dim.AUTO, 2: Dim.AUTO} for j in range(2)}
    return example, shapes
