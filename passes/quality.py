"""How close a converted model stays to its teacher, and what it spends."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from ..ir.block import DynkFFN
from ..ir.cost import dense_flops, ffn_share, spent_flops
from .base import Context, call, cosine_distance, looking, watch
from .data import Batch
from .lift import blocks, lifted_layers


@dataclass(frozen=True, slots=True)
class Quality:
    """How close a model stays to its teacher, and what it spends.

    Attributes:
        cosine: Mean cosine between the two outputs.
        overlap: Mean share of the ten nearest neighbours, by cosine, that they have in common;
            NaN for fewer than 12 rows, and for language models.
        flops: FLOPs of what is converted (the FFNs; attention projections where asked for),
            routers included, as a share of dense.
        experts: Mean experts per row and block.
        distance: The context's distance: one minus cosine, or nats per token.
    """

    cosine: float
    overlap: float
    flops: float
    experts: dict[str, float]
    distance: float


def evaluate(gm: GraphModule, context: Context, data: Sequence[Batch]) -> Quality:
    """Compare a model with its teacher, batch by batch."""
    names = list(blocks(gm))
    total, seen = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)

    def count(name: str, block: DynkFFN, x: Tensor) -> None:
        total[name] += float(block.selected(x).sum())
        seen[name] += len(x)

    cosine = distance = 0.0
    rows = 0
    both: list[tuple[Tensor, Tensor]] = []
    pairs = zip(watch(gm, data, count), reference_outputs(context, data), strict=True)
    for (batch, outputs), want in pairs:
        got = context.output(outputs, batch)
        cosine += float(F.cosine_similarity(got, want, dim=-1).sum())
        distance += float(context.distance(got, want)) * len(got)
        rows += len(got)
        if context.distance is cosine_distance:
            both.append((got, want))
    chosen = {name: total[name] / max(seen[name], 1) for name in names}
    overlap = float("nan")
    if both:
        got, want = (torch.cat(part) for part in zip(*both, strict=True))
        overlap = neighbour_overlap(got, want)
    share = ffn_share(chosen, lifted_layers(gm))
    return Quality(cosine / rows, overlap, share, chosen, distance / rows)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    from torch.utils.flop_counter import sdpa_flop_count  # imports triton

    return int(sdpa_flop_count(query, key, value))


# the counter knows the attention of GPUs alone
_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def whole_model_flops(
    teacher: GraphModule, gm: nn.Module, batch: Batch, experts: Mapping[str, float]
) -> dict[str, float]:
    """FLOPs of a whole model per row of its first block, dense and converted, routers included.

    Matrix products and attention count, as ``torch.utils.flop_counter`` counts them.

    Args:
        teacher: The dense model, its sites lifted.
        gm: The converted one.
        batch: Of which sizes the attention is; padding counts as tokens.
        experts: Mean experts per row by block, as in :class:`Quality`.

    Returns:
        ``dense`` and ``converted``, of which ``ffn_dense`` is what is converted; ``ffn_share`` and
        ``whole_share`` are what is left of them.
    """
    from torch.utils.flop_counter import FlopCounterMode  # imports triton

    places = lifted_layers(gm)
    rows = dict.fromkeys(places, 0)

    def count(name: str, _: nn.Module, x: Tensor) -> None:
        rows[name] += x.numel() // x.shape[-1]

    counter = FlopCounterMode(display=False, custom_mapping=_ATTENTION)
    with looking(teacher, count, list(places)), torch.no_grad(), counter:
        call(teacher, batch)
    unit = rows[next(iter(places))]  # a decoder's blocks may see other lengths than its encoder's
    before = sum(dense_flops(p) * rows[n] for n, p in places.items()) / unit
    after = sum(spent_flops(p, experts.get(n)) * rows[n] for n, p in places.items()) / unit
    dense = counter.get_total_flops() / unit
    return {
        "dense": dense,
        "converted": dense - before + after,
        "ffn_dense": before,
        "ffn_share": after / before,
        "whole_share": 1 - (before - after) / dense,
    }


def reference_outputs(
    context: Context, data: Sequence[Batch], limit: int = 2**28
) -> Iterator[Tensor]:
    """The teacher's outputs for each batch, ``[rows, m]``.

    They are kept for the next time, unless they take more than ``limit`` bytes.
    """
    if context.kept is not None and context.kept[0] is data:
        yield from context.kept[1]
        return
    found: list[Tensor] = []
    size = 0
    for batch in data:
        with torch.no_grad():
            want = context.output(call(context.teacher, batch), batch)
        size += want.numel() * want.element_size()
        if size <= limit:
            found.append(context.offload.move(want))
        yield want
    if size <= limit:
        context.kept = (data, found)


def neighbour_overlap(got: Tensor, want: Tensor, k: int = 10) -> float:
    """Mean share of the ``k`` nearest rows, by cosine, that two sets of vectors agree on."""
    if len(got) < k + 2:
        return float("nan")

    def nearest(x: Tensor) -> Tensor:
        x = F.normalize(x.float(), dim=-1)
        similar = x @ x.T
        similar.fill_diagonal_(-torch.inf)
        return similar.topk(k).indices

    a, b = nearest(got), nearest(want)
    return float((a[:, :, None] == b[:, None, :]).any(-1).float().mean())
