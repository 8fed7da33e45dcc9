"""Sequences in the cache of a generated step: positions committed, and nodes below them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from ...codegen.cpp.decoder import Decoder, Rows
from ...ir.errors import TargetError

Tables = Callable[[int], tuple[Tensor, Tensor]]
"""From a number of positions to cosines and sines of rotary embedding, ``[positions, rope]``."""
_TABLE = 1024


@dataclass(slots=True)
class _Row:
    """A sequence: its slot of the cache, positions committed, and parents of nodes that are not."""

    slot: int
    length: int = 0
    parents: list[int] = field(default_factory=list)


class Sequences:
    """Rows of a decoder; a row that is dropped costs nothing from there on.

    Args:
        decoder: Whose cache it is.
        tables: Of rotary embedding; asked again when texts grow.
        limit: Most positions.
    """

    def __init__(self, decoder: Decoder, tables: Tables, limit: int) -> None:
        self.decoder, self.limit = decoder, limit
        self._tables, self._cache = tables, decoder.cache()
        self._rows: list[_Row] = []

    def begin(self, count: int, capacity: int) -> None:
        """Forget all rows, and make new ones with room for so many positions."""
        self._rows = [_Row(slot) for slot in range(count)]
        self._cache.reserve(count, capacity)

    def lengths(self) -> list[int]:
        """Positions committed, by row."""
        return [r.length for r in self._rows]

    def drop(self, rows: Sequence[int]) -> None:
        """Remove rows; those after them move up."""
        gone = set(rows)
        self._rows = [r for i, r in enumerate(self._rows) if i not in gone]

    def forget(self) -> None:
        """Let go of the nodes that are not committed."""
        for row in self._rows:
            row.parents = []

    def run(
        self,
        tokens: Sequence[Tensor],
        parents: Sequence[Tensor],
        *,
        wanted: Tensor | None = None,
        features: Tensor | None = None,
        sparse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run nodes below those there are.

        Args:
            tokens: By row, int64.
            parents: By row: counted from the row's first node that is not committed; -1: none.
            wanted: Of all nodes, those whose logits are wanted, ascending; by default all.
            features: ``[all nodes, d]``, float32, of a decoder that mixes them in.
            sparse: Converted networks run only the experts their routers choose.

        Returns:
            Logits ``[len(wanted), words]`` and hidden states ``[all nodes, d]``.

        Raises:
            TargetError: A node is deeper than the limit.
        """
        for row, above in zip(self._rows, parents, strict=True):
            row.parents += above.tolist()
        end = max((r.length + len(r.parents) for r in self._rows), default=0)
        if end > self.limit and (end := self._deepest()) > self.limit:
            raise TargetError(f"position {end - 1}: the model has only {self.limit}")
        if end > self.decoder.positions:
            self.decoder.rotate_by(*self._tables(max(_TABLE, min(2 * end, self.limit))))
        flat = torch.cat(list(tokens)).to(torch.int64)
        count = len(self._rows)
        # one tensor, as making each takes longer than it should when a step has emptied the caches
        bounds, nodes, slots, committed = torch.tensor(
            [
                *accumulate(map(len, tokens), initial=0),
                *accumulate((len(r.parents) for r in self._rows), initial=0),
                *(r.slot for r in self._rows),
                *(r.length for r in self._rows),
            ]
        ).split([count + 1, count + 1, count, count])
        rows = Rows(
            tokens=flat,
            bounds=bounds,
            parents=torch.tensor([p for r in self._rows for p in r.parents], dtype=torch.int32),
            nodes=nodes,
            slots=slots,
            committed=committed,
            wanted=torch.arange(len(flat)) if wanted is None else wanted,
            features=features,
        )
        return self.decoder.step(rows, self._cache, sparse=sparse)

    def keep(self, accepted: Sequence[Tensor | None]) -> None:
        """Commit a path per row, ascending; where it is 0, 1, .. nothing is copied.

        Other nodes of the row are let go of. ``None`` leaves a row alone.
        """
        for row, path in zip(self._rows, accepted, strict=True):
            if path is None:
                continue
            if len(path) and int(path[-1]) != len(path) - 1:
                self.decoder.keep(
                    self._cache, row.slot, row.length, path.to(torch.int64).contiguous()
                )
            row.length += len(path)
            row.parents = []

    def _deepest(self) -> int:
        """Positions that the nodes at hand take."""
        most = 0
        for row in self._rows:
            depths: list[int] = []
            for p in row.parents:
                depths.append(depths[p] + 1 if p >= 0 else 0)
            most = max(most, row.length + max(depths, default=-1) + 1)
        return most
