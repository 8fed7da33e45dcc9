"""A decoder's whole step in generated C++: weights packed once, a cache of keys and values, trees.

One call takes rows, each a token with its parent, through all layers: norms, attention over the
cache and the row's ancestors, rotary embedding, feed-forward networks (dense, or what routers or
gates choose of them), and logits. At few rows what is left is reading the weights. A row's result
is the same, to the bit, whatever rows are beside it, and whether its ancestors were committed
before or are rows of the same step; ``decoder_tile.h`` and ``decoder_attention.h`` say how.
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...ir.errors import BadWeightsError, SkimpError
from . import pages
from .build import build
from .decoder_spec import DecoderSpec, DecoderWeights, LayerWeights, check
from .emit import ACTS

CHUNK = 64
"""Positions that attention takes at once; capacities are multiples of it."""


class _Router(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_void_p) for n in ("down", "up")],
        *[(n, ctypes.c_int64) for n in ("width", "experts", "expert_size", "sigmoid", "top")],
        ("tau", ctypes.c_void_p),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *[
            (n, ctypes.c_void_p)
            for n in (
                "norm_in", "qkv", "qkv_bias", "q_norm", "k_norm", "out", "norm_mid", "gate_up",
                "down",
            )
        ],
        ("router", _Router),
        ("tau", ctypes.c_void_p),
    ]  # fmt: skip


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", ctypes.POINTER(_Layer)),
        ("count", ctypes.c_int64),
        *[(n, ctypes.c_void_p) for n in ("embedding", "mix", "norm", "head")],
        ("words", ctypes.c_int64),
        *[(n, ctypes.c_float) for n in ("eps", "scale")],
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *[(n, ctypes.c_int64) for n in ("rows", "sequences")],
        *[
            (n, ctypes.c_void_p)
            for n in (
                "tokens", "bounds", "parents", "nodes", "slots", "committed", "cosine", "sine",
                "features", "keys", "values",
            )
        ],
        *[(n, ctypes.c_int64) for n in ("all_slots", "capacity")],
        ("wanted", ctypes.c_void_p),
        ("wanted_rows", ctypes.c_int64),
        *[(n, ctypes.c_void_p) for n in ("logits", "hidden")],
        *[(n, ctypes.c_int64) for n in ("sparse", "threads")],
    ]  # fmt: skip


def emit(spec: DecoderSpec) -> str:
    """The complete source of a step, which needs no header but the compiler's own."""
    constants = {
        "D": spec.d, "D_OUT": spec.d, "LANES": spec.lanes, "D_FF": spec.d_ff, "HEADS": spec.heads,
        "KV_HEADS": spec.kv_heads, "HEAD_DIM": spec.head_dim, "ROPE": spec.rope,
        "ACT": ACTS.index(spec.act),
    }  # fmt: skip
    lines = [f"// {spec.name}", *(f"constexpr long {k} = {v};" for k, v in constants.items())]
    lines.append(f"#define STORAGE_{'BF16' if spec.dtype == 'bfloat16' else 'F32'}")
    here = Path(__file__).parent
    parts = (
        "vectors.h",
        "decoder_tile.h",
        "decoder_chosen.h",
        "decoder_attention.h",
        "decoder_model.h",
        "decoder.h",
    )
    return "\n".join(lines) + "\n" + "".join("\n" + (here / n).read_text() for n in parts)


@functools.cache
def library(spec: DecoderSpec) -> ctypes.CDLL:
    """The compiled step.

    Raises:
        CompileError: See :func:`skimp.codegen.cpp.build.build`.
    """
    found = build(emit(spec), spec.name, spec.flags)
    found.decoder_step.argtypes = [ctypes.POINTER(_Model), ctypes.POINTER(_Step)]
    found.decoder_step.restype = ctypes.c_int
    found.decoder_keep.argtypes = [
        *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 5, ctypes.c_void_p, ctypes.c_int64
    ]  # fmt: skip
    found.decoder_keep.restype = None
    return found


def pack(weight: Tensor, lanes: int, dtype: torch.dtype) -> Tensor:
    """Blocks of ``lanes`` neurons, lanes adjacent: ``[n, k] -> [n / lanes, k, lanes]``, flat.

    bfloat16 keeps pairs of k together, ``[n / lanes, k / 2, lanes, 2]``. What pads is zero.
    """
    n, k = weight.shape
    pair = 2 if dtype == torch.bfloat16 else 1
    blocks, steps = -(-n // lanes), -(-k // pair)
    if blocks * lanes != n or steps * pair != k:
        full = weight.new_zeros(blocks * lanes, steps * pair)
        full[:n, :k] = weight
        weight = full
    turned = weight.detach().view(blocks, lanes, steps, pair).transpose(1, 2)
    return turned.to(dtype).contiguous().flatten()


class Cache:
    """Keys and values of all layers for some sequences, each in a slot; grows by doubling.

    Attributes:
        keys: ``[layers, slots, kv_heads, capacity * head_dim]``, by chunks of 64 positions.
        values: ``[layers, slots, kv_heads, capacity * value]``.
    """

    def __init__(self, spec: DecoderSpec, layers: int, slots: int = 1, capacity: int = 256) -> None:
        self.spec, self.layers, self.slots, self.capacity = spec, layers, 0, 0
        self.keys = self.values = torch.empty(0)
        self.reserve(slots, capacity)

    def reserve(self, slots: int, capacity: int) -> None:
        """Make room for at least so many slots and positions; what is held stays."""
        if slots <= self.slots and capacity <= self.capacity:
            return
        if capacity > self.capacity:
            capacity = max(-(-capacity // CHUNK) * CHUNK, 2 * self.capacity)
        capacity, slots = max(capacity, self.capacity), max(slots, self.slots)
        dtype = getattr(torch, self.spec.dtype)
        for name, width in (("keys", self.spec.head_dim), ("values", self.spec.value)):
            old: Tensor = getattr(self, name)
            new = pages.empty([self.layers, slots, self.spec.kv_heads, capacity * width], dtype)
            if self.slots:
                new[:, : self.slots, :, : old.shape[-1]] = old
            setattr(self, name, new)
        self.slots, self.capacity = slots, capacity


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a step, of one or several sequences, one sequence after another.

    Attributes:
        tokens: ``[rows]``, int64.
        bounds: ``[sequences + 1]``, int64: where each sequence's rows begin.
        parents: ``[nodes]``, int32. A sequence's nodes are those of earlier steps that were not
            committed, then its rows; a parent is counted from its sequence's first node, before its
            child; -1: the last committed token.
        nodes: ``[sequences + 1]``, int64: where each sequence's nodes begin.
        slots: ``[sequences]``, int64: of the cache.
        committed: ``[sequences]``, int64: positions held in the cache.
        wanted: int64, ascending: rows whose logits are wanted.
        features: ``[rows, d]``, float32, for a decoder with ``mix``.
    """

    tokens: Tensor
    bounds: Tensor
    parents: Tensor
    nodes: Tensor
    slots: Tensor
    committed: Tensor
    wanted: Tensor
    features: Tensor | None = None


class Decoder:
    """A decoder on packed weights.

    Args:
        spec: What its step is generated for.
        weights: In float32 or ``spec.dtype``. The embedding is kept as it is if it has that dtype.

    Raises:
        BadWeightsError: Shapes that do not fit the spec.
        CompileError: No compiler, or a failed compile.
    """

    def __init__(self, spec: DecoderSpec, weights: DecoderWeights) -> None:
        self.spec = spec
        self._cosine = self._sine = torch.empty(0)
        self.words = weights.head.shape[0]
        self.layers = len(weights.layers)
        self.tau = torch.zeros(max(1, self.layers))
        """Threshold of each layer's experts; :meth:`step` with ``sparse`` reads it."""
        check(spec, weights)
        self._kept: list[Tensor] = []  # C++ holds pointers to these
        self._pages = pages.Pages()
        self._library = library(spec)
        layers = [self._layer(i, layer) for i, layer in enumerate(weights.layers)]
        self._layers = (_Layer * max(1, len(layers)))(*layers)
        self._model = _Model(
            self._layers,
            len(layers),
            self._keep(weights.embedding.detach().to(self._dtype).contiguous()),
            None if weights.mix is None else self._packed(weights.mix),
            self._float(weights.norm),
            self._packed(weights.head),
            self.words,
            weights.eps,
            weights.scale,
        )

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.spec.dtype)  # type: ignore[no-any-return]

    @property
    def positions(self) -> int:
        """Length of the tables of rotary embedding."""
        return len(self._cosine)

    def rotate_by(self, cosine: Tensor, sine: Tensor) -> None:
        """Set the tables of rotary embedding, ``[positions, rope]``."""
        if cosine.shape != sine.shape or cosine.shape[1:] != (self.spec.rope,):
            raise BadWeightsError(
                f"{tuple(cosine.shape)} does not rotate {self.spec.rope} elements"
            )
        self._cosine, self._sine = cosine.float().contiguous(), sine.float().contiguous()

    def cache(self, slots: int = 1, capacity: int = 256) -> Cache:
        """An empty cache."""
        return Cache(self.spec, self.layers, slots, capacity)

    def step(
        self, rows: Rows, cache: Cache, *, sparse: bool = False, threads: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run rows through the decoder; their keys and values are written behind the committed.

        Args:
            rows: What to run.
            cache: Of this decoder; grows as needed.
            sparse: Layers with a router run only the experts it chooses.
            threads: By default PyTorch's number.

        Returns:
            Logits ``[len(wanted), words]`` and hidden rows ``[rows, d]`` after the last norm, both
            float32.

        Raises:
            SkimpError: More nodes than the tables of rotary embedding have positions, or no memory.
        """
        n = len(rows.tokens)
        if n:
            end = int((rows.committed + rows.nodes.diff()).max())
            if end > self.positions:
                raise SkimpError(
                    f"node {end - 1} is beyond the {self.positions} positions of the decoder's "
                    "tables; give it longer ones with rotate_by"
                )
            cache.reserve(int(rows.slots.max()) + 1, end)
        logits = torch.empty(len(rows.wanted), self.words)
        hidden = torch.empty(n, self.spec.d)
        step = _Step(
            n, len(rows.slots), rows.tokens.data_ptr(), rows.bounds.data_ptr(),
            rows.parents.data_ptr(), rows.nodes.data_ptr(), rows.slots.data_ptr(),
            rows.committed.data_ptr(),
            self._cosine.data_ptr(), self._sine.data_ptr(),
            None if rows.features is None else rows.features.data_ptr(),
            cache.keys.data_ptr(), cache.values.data_ptr(), cache.slots, cache.capacity,
            rows.wanted.data_ptr(), len(rows.wanted), logits.data_ptr(), hidden.data_ptr(),
            int(sparse), threads or torch.get_num_threads(),
        )  # fmt: skip
        if self._library.decoder_step(ctypes.byref(self._model), ctypes.byref(step)):
            raise SkimpError(f"no memory for the scratch of a step of {n} rows; use fewer")
        return logits, hidden

    def keep(self, cache: Cache, slot: int, committed: int, accepted: Tensor) -> None:
        """Move the accepted rows of a step, ascending int64, to where they are committed.

        Nothing is copied for rows that are there already.
        """
        self._library.decoder_keep(
            cache.keys.data_ptr(), cache.values.data_ptr(), self.layers, cache.slots,
            cache.capacity, slot, committed, accepted.data_ptr(), len(accepted),
        )  # fmt: skip

    def _layer(self, index: int, w: LayerWeights) -> _Layer:
        router = _Router()
        if w.router is not None:
            r = w.router
            router = _Router(
                self._packed(r.down), self._packed(r.up), len(r.down), len(r.up), r.expert_size,
                int(r.predicts == "activations"), r.top, self.tau[index:].data_ptr(),
            )  # fmt: skip
        return _Layer(
            self._float(w.norm_in),
            self._packed(torch.cat([w.q.detach(), w.k.detach(), w.v.detach()])),
            None if w.biases is None else self._float(torch.cat([b.detach() for b in w.biases])),
            *(None if t is None else self._float(t) for t in (w.q_norm, w.k_norm)),
            self._packed(w.out), self._float(w.norm_mid), *self._network(w), router,
            None if w.tau is None else self._keep(w.tau),
        )  # fmt: skip

    def _network(self, w: LayerWeights) -> tuple[int, int]:
        """Pointers to a network's weights: in blocks, or of neurons for gates to choose from."""
        if w.tau is not None:
            both = torch.stack([self._padded(w.up), self._padded(w.down.T)], 1)
            return self._packed(w.gate), self._keep(self._pages.hold(both))
        gate, up = (pack(m, self.spec.lanes, self._dtype) for m in (w.gate, w.up))
        blocks = -(-self.spec.d_ff // self.spec.lanes)
        both = torch.stack([gate.view(blocks, -1), up.view(blocks, -1)], 1).flatten()
        return self._keep(self._pages.hold(both)), self._packed(w.down)

    def _padded(self, weight: Tensor) -> Tensor:
        """Rows ``[n, k]``, padded with zeros to whole vectors."""
        multiple = self.spec.lanes * (2 if self.spec.dtype == "bfloat16" else 1)
        n, k = weight.shape
        full = torch.zeros(n, -(-k // multiple) * multiple, dtype=self._dtype)
        full[:, :k] = weight.detach()
        return full

    def _packed(self, weight: Tensor) -> int:
        return self._keep(self._pages.hold(pack(weight, self.spec.lanes, self._dtype)))

    def _float(self, values: Tensor) -> int:
        return self._keep(values.detach().float().contiguous())

    def _keep(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()
