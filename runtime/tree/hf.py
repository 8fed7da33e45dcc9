"""Any Hugging Face decoder with an ordinary key-value cache as a target.

All rows' nodes run as one packed sequence, so that linear layers see exactly the nodes there are:
nothing is padded, and a row that is gone costs nothing. The model's own code runs; only its
attention function is replaced, during a pass, by one that keeps each row's keys and values and
calls ``scaled_dot_product_attention`` with an additive mask per row. Query heads that share a key
are folded into the query's length, so that keys are not repeated.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache

from ...ir.errors import TargetError

_ATTENTION = "skimp_tree"
_ROOM = 256
"""Positions by which a row's cache grows at least."""


@dataclass(slots=True)
class _Row:
    """A row's cache: keys and values by layer, ``[heads, room, head size]``.

    ``seen`` says of the nodes not yet committed which of them each sees, ``[n, n]``; ``None`` where
    they are a chain.
    """

    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    length: int = 0
    depths: list[int] = field(default_factory=list)
    seen: NDArray[np.bool_] | None = None

    def matrix(self) -> NDArray[np.bool_]:
        """``seen``, written out."""
        return np.tri(len(self.depths), dtype=bool) if self.seen is None else self.seen

    def forget(self) -> None:
        """Let go of the nodes not committed."""
        self.depths, self.seen = [], None


@dataclass(slots=True)
class _Part:
    """One row's share of a pass: where its nodes lie in the packed sequence and in the cache.

    ``plain``: the nodes are a chain, of which each sees all before it.
    """

    row: _Row
    first: int
    count: int
    start: int
    plain: bool
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, like: Tensor, groups: int) -> Tensor | None:
        """What is added to scores, ``[groups * count, end]``; ``None`` if all is seen."""
        if self.count == 1 and self.plain and window is None:
            return None
        if window not in self.masks:
            row, end = self.row, self.start + self.count
            new, last = self.start - row.length, end - row.length
            seen = np.ones((self.count, end), bool)
            seen[:, row.length :] = row.matrix()[new:last, :last]
            if window is not None:
                nodes = np.asarray(row.depths[:last]) + row.length
                at = np.concatenate([np.arange(row.length), nodes])
                seen &= at[None, :] > (nodes[new:, None] - window)
            added = torch.zeros(seen.shape, dtype=like.dtype)
            added.masked_fill_(torch.from_numpy(~seen), float("-inf"))
            self.masks[window] = added.to(like.device).repeat(groups, 1)
        return self.masks[window]


_PASS: ContextVar[list[_Part]] = ContextVar("_PASS")


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of a pass. ``query [1, heads, N, size]`` -> ``[1, N, heads, size]``."""
    for name in ("position_bias", "s_aux"):
        if others.get(name) is not None:
            raise TargetError(f"attention with {name} cannot be verified as a tree")
    layer: int = module.layer_idx  # type: ignore[assignment]
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    out = query.new_empty(query.shape[2], heads, value.shape[-1])
    for part in _PASS.get():
        first, last, end = part.first, part.first + part.count, part.start + part.count
        keys, values = _store(part, layer, key[0, :, first:last], value[0, :, first:last])
        q, k, v = query[:, :, first:last], keys[None, :, :end], values[None, :, :end]
        if part.plain and part.start == 0 and sliding_window is None and softcap is None:
            got = F.scaled_dot_product_attention(
                q, k, v, is_causal=part.count > 1, scale=scaling, enable_gqa=groups > 1
            )
        else:
            mask = part.mask(sliding_window, query, groups)
            folded = q.reshape(1, heads // groups, groups * part.count, -1)
            if softcap is None:
                got = F.scaled_dot_product_attention(folded, k, v, attn_mask=mask, scale=scaling)
            else:
                scale = scaling if scaling is not None else float(q.shape[-1]) ** -0.5
                scores = softcap * torch.tanh(folded @ k.transpose(2, 3) * scale / softcap)
                if mask is not None:
                    scores = scores + mask
                got = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
            got = got.reshape(1, heads, part.count, -1)
        out[first:last] = got[0].transpose(0, 1)
    return out[None], None


def _store(part: _Part, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Write a part's keys and values ``[heads, n, size]`` behind what its row holds."""
    row, end = part.row, part.start + part.count
    for held, new in ((row.keys, key), (row.values, value)):
        there = held.get(layer)
        if there is None or there.shape[1] < end:
            room = end + max(_ROOM, end // 2)
            grown = new.new_empty(new.shape[0], room, new.shape[2])
            if there is not None:
                grown[:, : part.start] = there[:, : part.start]
            held[layer] = there = grown
        there[:, part.start : end] = new
    return row.keys[layer], row.values[layer]


AttentionInterface.register(_ATTENTION, _attend)


def _no_cache() -> Any:
    """What the model takes for its cache: the attention function holds the real one."""
    cache: Any = DynamicCache()
    cache.update = lambda keys, values, *args, **others: (keys, values)
    return cache


class HFTarget:
    """A causal language model of transformers; see :class:`~skimp.runtime.tree.target.Target`."""

    def __init__(self, model: Any, blocks: Mapping[str, nn.Module] | None = None) -> None:
        """Check that trees can be verified on a model.

        Args:
            model: It stays as it is.
            blocks: By name of a module: what runs in its place in ``verify(.., sparse=True)``.

        Raises:
            TargetError: They cannot, and why.
        """
        refusal = why_not(model)
        if refusal:
            raise TargetError(f"{type(model).__name__} cannot verify token trees: {refusal}")
        self.model = model
        self.blocks = dict(blocks or {})
        self.config: Any = self.model.config.get_text_config()
        self.head: nn.Module = self.model.get_output_embeddings()
        weight: Tensor = self.head.weight
        self.vocabulary, self.width = weight.shape
        self.device, self.dtype = weight.device, weight.dtype
        self.limit: int = getattr(self.config, "max_position_embeddings", None) or 1 << 30
        self._selects = "logits_to_keep" in inspect.signature(self.model.forward).parameters
        self._rows: list[_Row] = []

    @property
    def name(self) -> str:
        """Architecture, sizes, dtype and device."""
        c = self.config
        sizes = f"{c.num_hidden_layers}x{self.width}x{getattr(c, 'intermediate_size', 0)}"
        kind = str(self.dtype).removeprefix("torch.")
        return f"{c.model_type}-{sizes}x{self.vocabulary}-{kind}-{self.device.type}-hf"

    def lengths(self) -> list[int]:
        """Tokens committed, by row."""
        return [r.length for r in self._rows]

    def drop(self, rows: Sequence[int]) -> None:
        """Remove rows."""
        gone = set(rows)
        self._rows = [r for i, r in enumerate(self._rows) if i not in gone]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Commit prompts as new rows."""
        self._rows = [_Row() for _ in prompts]
        tokens = [torch.tensor(p, dtype=torch.int64) for p in prompts]
        chains = [torch.arange(-1, len(p) - 1) for p in prompts]
        ends = torch.tensor([len(p) for p in prompts]).cumsum(0) - 1
        found = self._run(tokens, chains, ends)
        self.keep([torch.arange(len(p)) for p in prompts])
        return found

    def verify(
        self,
        tokens: Sequence[Tensor],
        parents: Sequence[Tensor],
        *,
        grow: bool = False,
        sparse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run one tree per row in one pass.

        Args:
            tokens: By row.
            parents: By row.
            grow: These nodes come below those of the calls since the last commit, and parents
                count from the first of them. Rows may get no nodes.
            sparse: Converted networks run only the experts their routers choose.
        """
        if not grow:
            for row in self._rows:
                row.forget()
        with self._routed() if sparse else nullcontext():
            return self._run(tokens, parents, None)

    def threshold(self, tau: float) -> None:
        """Set how much experts must matter in ``verify(.., sparse=True)``, in all layers."""
        for block in self.blocks.values():
            block.tau.fill_(tau)  # type: ignore[operator]

    @contextmanager
    def _routed(self) -> Iterator[None]:
        """For one pass: the sparse networks in their places."""
        dense = {name: self.model.get_submodule(name) for name in self.blocks}
        try:
            for name, block in self.blocks.items():
                self.model.set_submodule(name, block)
            yield
        finally:
            for name, module in dense.items():
                self.model.set_submodule(name, module)

    def keep(self, accepted: Sequence[Tensor]) -> None:
        """Commit a path per row."""
        for row, path in zip(self._rows, accepted, strict=True):
            count = len(path)
            if count and int(path[-1]) != count - 1:  # ascending: so not 0, 1, .., count - 1
                source = path.to(self.device) + row.length
                for held in (row.keys, row.values):
                    for kept in held.values():
                        kept[:, row.length : row.length + count] = kept.index_select(1, source)
            row.length += count
            row.forget()

    def _run(
        self, tokens: Sequence[Tensor], parents: Sequence[Tensor], select: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits and hidden states of all nodes, or of those at ``select`` in packed order."""
        parts, positions, first = [], [], 0
        for row, p in zip(self._rows, parents, strict=True):
            count = len(p)
            if count:
                plain = _grow(row, p)
                start = row.length + len(row.depths) - count
                parts.append(_Part(row, first, count, start, plain))
                positions += [row.length + d for d in row.depths[-count:]]
                first += count
        if max(positions, default=0) >= self.limit:
            raise TargetError(f"position {max(positions)}: the model has only {self.limit}")
        ids = torch.cat(list(tokens))[None].to(self.device)
        given: dict[str, Any] = dict(
            input_ids=ids,
            position_ids=torch.tensor([positions], device=self.device),
            past_key_values=_no_cache(),
            use_cache=True,
        )
        if select is not None and self._selects:
            given["logits_to_keep"] = select.to(self.device)
        hidden: list[Tensor] = []
        with torch.no_grad(), self._attention(parts, hidden):
            logits: Tensor = self.model(**given).logits[0]
        states = hidden[0].flatten(0, -2)
        if select is not None and not self._selects:
            logits, states = logits[select], states[select]
        return logits, states

    @contextmanager
    def _attention(self, parts: list[_Part], hidden: list[Tensor]) -> Iterator[None]:
        """For one pass: this module's attention, and what the output layer is given."""
        before = self.config._attn_implementation
        watch = self.head.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        token = _PASS.set(parts)
        self.config._attn_implementation = _ATTENTION
        try:
            yield
        finally:
            self.config._attn_implementation = before
            _PASS.reset(token)
            watch.remove()


def _grow(row: _Row, parents: Tensor) -> bool:
    """Enter nodes into a row; says whether each sees all before it."""
    old, n = len(row.depths), len(parents)
    above = parents.tolist()
    if row.seen is None and above == list(range(old - 1, old + n - 1)):
        row.depths += range(old, old + n)
        return True
    seen = np.zeros((old + n, old + n), bool)
    seen[:old, :old] = row.matrix()
    for i, p in enumerate(above, old):
        if p >= 0:
            seen[i] = seen[p]
        seen[i, i] = True
        row.depths.append(row.depths[p] + 1 if p >= 0 else 0)
    row.seen = seen
    return False


def why_not(model: Any) -> str | None:
    """The reason why a model cannot verify trees, if there is one."""
    if not hasattr(model, "get_output_embeddings") or not hasattr(model, "config"):
        return "it is not a language model of transformers"
    config = model.config
    text = config.get_text_config()
    if config.is_encoder_decoder:
        return "it is an encoder with a decoder; only decoders are supported"
    if getattr(model, "_is_stateful", False):
        return "it is recurrent: its state after a rejected token cannot be taken back"
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}, whose state cannot be taken back"
    if getattr(text, "num_kv_shared_layers", 0):
        return "its layers share keys and values"
    if not getattr(model, "_supports_attention_backend", False):
        return "its attention function cannot be replaced (_supports_attention_backend)"
    if model.get_output_embeddings() is None:
        return "it has no output layer"
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return "it does not take position_ids"
    return None
