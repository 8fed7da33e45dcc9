"""A trained head of one layer as drafter, in the family of EAGLE (arXiv 2401.15077).

The head reads, at each position, the target's last hidden state there and the embedding of the
token after it, and gives the next hidden state, which the target's own output layer (of the tokens
that are drafted at all) turns into the next token's law. Where the target has not been yet, the
head's own hidden state stands in for the target's. A step of it is generated C++, like the
target's; it is a decoder of one layer with a cache of its own.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from ...codegen.cpp.decoder import Decoder
from ...codegen.cpp.decoder_spec import DecoderSpec, DecoderWeights, LayerWeights
from ...ir.cost import Curves, StepCurve, write_atomically
from ...ir.errors import ArtefactError, TargetError
from .fused import FusedTarget
from .node import Children, Tree
from .sequences import Sequences
from .target import Target

VERSION = 1
FILE = "head.safetensors"
_AT_ONCE = 64
"""Tokens per step when the head catches up with a text."""
_GRID = (1, 2, 3, 4, 6, 8, 12, 16, 32)
"""Rows that its step is timed at."""


@dataclass(frozen=True, slots=True)
class HeadSizes:
    """Sizes of a head; those of attention are the target's."""

    d: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: int
    eps: float
    scale: float

    @classmethod
    def of(cls, target: FusedTarget, d_ff: int = 0) -> "HeadSizes":
        """For a target, with as many neurons as its networks have or ``d_ff``."""
        s, w = target.decoder.spec, target.weights
        return cls(s.d, d_ff or s.d_ff, s.heads, s.kv_heads, s.head_dim, s.rope, w.eps, w.scale)


class Head(nn.Module):
    """The weights that are trained; embedding and output layer are the target's.

    Args:
        sizes: Of its layer.
        words: Tokens it may draft, ``[W]`` int64.
        seed: Of the first weights.
    """

    words: Tensor

    def __init__(self, sizes: HeadSizes, words: Tensor, seed: int = 0) -> None:
        super().__init__()
        self.sizes = s = sizes
        self.register_buffer("words", words.to(torch.int64))
        g = torch.Generator().manual_seed(seed)

        def matrix(n: int, k: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(n, k, generator=g) * scale / k**0.5)

        mixed, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        self.mix = matrix(s.d, 2 * s.d)
        self.q, self.k, self.v = matrix(mixed, s.d), matrix(kv, s.d), matrix(kv, s.d)
        self.out = matrix(s.d, mixed, 0.5)
        self.gate, self.up = matrix(s.d_ff, s.d), matrix(s.d_ff, s.d)
        self.down = matrix(s.d, s.d_ff, 0.5)
        self.norm_in, self.norm_mid, self.norm = (nn.Parameter(torch.ones(s.d)) for _ in range(3))

    def forward(self, embedded: Tensor, features: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Next hidden states of whole texts.

        Args:
            embedded: Tokens after each position, ``[B, n, d]``.
            features: Hidden states at each position, ``[B, n, d]``.
            cosine: Of rotary embedding, ``[n, rope]``.
            sine: Likewise.

        Returns:
            ``[B, n, d]``, as the output layer takes them.
        """
        s, (b, n, _) = self.sizes, embedded.shape

        def heads(x: Tensor, count: int) -> Tensor:
            return x.view(b, n, count, s.head_dim).transpose(1, 2)

        def turn(x: Tensor) -> Tensor:
            y, half = x[..., : s.rope], s.rope // 2
            turned = torch.cat([-y[..., half:], y[..., :half]], -1)
            return torch.cat([y * cosine + turned * sine, x[..., s.rope :]], -1)

        x = F.linear(torch.cat([embedded, features], -1), self.mix)
        h = F.rms_norm(x, (s.d,), self.norm_in, s.eps)
        q, k = turn(heads(h @ self.q.T, s.heads)), turn(heads(h @ self.k.T, s.kv_heads))
        v = heads(h @ self.v.T, s.kv_heads)
        k, v = (t.repeat_interleave(s.heads // s.kv_heads, 1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=s.scale)
        x = x + F.linear(y.transpose(1, 2).flatten(2), self.out)
        h = F.rms_norm(x, (s.d,), self.norm_mid, s.eps)
        x = x + F.linear(F.silu(h @ self.gate.T) * (h @ self.up.T), self.down)
        return F.rms_norm(x, (s.d,), self.norm, s.eps)

    def decoder(self, target: FusedTarget, dtype: torch.dtype = torch.bfloat16) -> Decoder:
        """Its generated step. What it drafts need not be exact, so bfloat16 serves any target."""
        s, t = self.sizes, target.decoder.spec
        spec = DecoderSpec(
            s.d, s.d_ff, s.heads, s.kv_heads, s.head_dim, s.rope, "silu",
            str(dtype).removeprefix("torch."), t.isa,
        )  # fmt: skip
        layer = LayerWeights(
            norm_in=self.norm_in, q=self.q, k=self.k, v=self.v, out=self.out,
            norm_mid=self.norm_mid, gate=self.gate, up=self.up, down=self.down,
        )  # fmt: skip
        w = target.weights
        head = w.head.detach()[self.words]
        return Decoder(
            spec,
            DecoderWeights([layer], w.embedding, self.norm, head, s.eps, s.scale, mix=self.mix),
        )

    def save(self, folder: Path, target: FusedTarget, note: dict[str, object]) -> Path:
        """Write it, in bfloat16; ``note`` is kept beside the weights."""
        tensors = {n: p.detach().bfloat16().contiguous() for n, p in self.named_parameters()}
        tensors["words"] = self.words.to(torch.int32)
        record = {
            "version": VERSION, "sizes": asdict(self.sizes), "target": _print(target), "note": note
        }  # fmt: skip
        path = folder / FILE
        write_atomically(path, save(tensors, {"skimp-head": json.dumps(record)}))
        return path

    @classmethod
    def load(cls, folder: str | Path, target: FusedTarget) -> "Head":
        """Read one.

        Args:
            folder: Or the file in it.
            target: That it was trained for.

        Raises:
            ArtefactError: It is damaged, or of another model.
        """
        path = Path(folder)
        path = path / FILE if path.is_dir() else path
        try:
            with safe_open(path, "pt") as file:
                record = json.loads((file.metadata() or {})["skimp-head"])
                tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ArtefactError(
                f"{path} is no head that `skimp train-drafter` wrote: {error}"
            ) from error
        if record.get("version") != VERSION:
            raise ArtefactError(f"{path} is of version {record.get('version')}, not {VERSION}")
        if record["target"] != _print(target):
            raise ArtefactError(f"{path} was trained for another model; train one for this")
        head = cls(HeadSizes(**record["sizes"]), tensors.pop("words"))
        try:
            head.load_state_dict({**tensors, "words": head.words})
        except RuntimeError as error:
            raise ArtefactError(f"{path} is damaged: {error}") from error
        return head


def _print(target: FusedTarget) -> str:
    """Tells models apart, in whichever dtype they are loaded."""
    w = target.weights
    seen = torch.cat([w.norm.detach().flatten(), w.head.detach()[:64].flatten()]).float()
    # numbers that bfloat16 holds, so that its rounding cannot tell two copies of a model apart
    data: bytes = seen.bfloat16().view(torch.int16).numpy().tobytes()
    return f"{target.vocabulary}x{target.width}-{hashlib.sha256(data).hexdigest()[:16]}"


def _generated(target: Target) -> FusedTarget:
    """The target, which must be a generated step."""
    if not isinstance(target, FusedTarget):
        raise TargetError(
            "a head drafts for models whose step is generated C++: decoders of the Llama kind on "
            "the CPU"
        )
    return target


@dataclass(slots=True)
class _Row:
    """A row of the drafter.

    Attributes:
        tokens: Committed ones that its cache lacks.
        features: The target's hidden states before each of them, some at a time.
        last: The one of the last committed token.
        place: By node of the tree, where it lies among what was run since the last commit.
        states: By place: the head's hidden states.
    """

    tokens: list[int]
    features: list[Tensor]
    last: Tensor
    place: dict[int, int] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)


class HeadDrafter:
    """Drafts with a head; see :class:`~skimp.runtime.tree.node.Drafter`.

    Args:
        head: Trained for the target.
        target: Whose hidden states it reads; a generated step.
        width: Most children per node.
        dtype: Of its weights and cache.

    Raises:
        TargetError: The target is not a generated step.
    """

    def __init__(
        self,
        head: Head,
        target: Target,
        *,
        width: int = 6,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.name, self.width = "head", min(width, len(head.words))
        self.target, self.words = _generated(target), head.words
        self.decoder = head.decoder(self.target, dtype)
        self._sequences = Sequences(self.decoder, self.target.tables, target.limit)
        self._rows: list[_Row] = []
        self._curve = StepCurve.load(
            Curves.load(), f"head-{self.decoder.spec.name}-{len(self.words)}"
        )

    @classmethod
    def load(cls, path: str | Path, target: Target) -> "HeadDrafter":
        """Read a head, and make a drafter of it."""
        return cls(Head.load(path, _generated(target)), target)

    def prepare(self) -> float:
        """Time its step where it has not been; returns seconds spent."""
        if self._curve.points:
            return 0.0
        scratch = Sequences(self.decoder, self.target.tables, self.target.limit)
        scratch.begin(1, 128)

        def step(rows: int) -> None:
            scratch.forget()
            chain = torch.arange(rows)
            features = torch.zeros(rows, self.target.width)
            logits, _ = scratch.run([chain], [chain - 1], features=features)
            self._likeliest(logits)

        spent = self._curve.profile(step, _GRID, 1.0)
        self._curve.store()
        return spent

    def begin(self, prompts: Sequence[Sequence[int]], hidden: Tensor) -> None:
        """Note what there is to read; nothing runs before it is asked for."""
        self._sequences.begin(len(prompts), max(map(len, prompts)) + 256)
        self._rows = [
            _Row(list(p[1:]), [s[:-1].clone()], s[-1].clone())
            for p, s in zip(prompts, self.target.prompts, strict=True)
        ]

    def expand(self, trees: Sequence[Tree], nodes: Sequence[tuple[int, int]]) -> list[Children]:
        """Run nodes; a row's root with the committed tokens before it that were not run yet."""
        long = [r for r, n in nodes if n == 0 and len(self._rows[r].tokens) > _AT_ONCE]
        for row in long:
            self._catch_up(row)
        start = time.perf_counter()
        tokens: list[list[int]] = [[] for _ in self._rows]
        parents: list[list[int]] = [[] for _ in self._rows]
        features: list[list[Tensor]] = [[] for _ in self._rows]
        asked: list[int] = []
        for row, node in nodes:
            state = self._rows[row]
            above = trees[row].parents[node]
            if node and above not in state.place:
                asked.append(-1)  # its parent was not run, so there is no state to go on from
                continue
            if node == 0:
                tokens[row] += state.tokens
                parents[row] += range(-1, len(state.tokens) - 1)
                features[row] += [*state.features, state.last[None]]
                parent = len(state.tokens) - 1
            else:
                parent = state.place[above]
                features[row].append(state.states[parent][None])
            asked.append(len(tokens[row]))
            state.place[node] = len(state.states) + len(tokens[row])
            tokens[row].append(trees[row].tokens[node])
            parents[row].append(parent)
        bounds = [0]
        for new in tokens:
            bounds.append(bounds[-1] + len(new))
        at = [bounds[row] + a for (row, _), a in zip(nodes, asked, strict=True) if a >= 0]
        if not at:
            return [Children([], []) for _ in nodes]
        order = sorted(at)
        logits, hidden = self._sequences.run(
            [torch.tensor(t, dtype=torch.int64) for t in tokens],
            [torch.tensor(p, dtype=torch.int64) for p in parents],
            wanted=torch.tensor(order),
            features=torch.cat([f for one in features for f in one]),
        )
        for state, first, last in zip(self._rows, bounds, bounds[1:], strict=False):
            state.states += hidden[first:last].unbind()
        made = dict(zip(order, self._likeliest(logits), strict=True))
        found = [
            made[bounds[row] + a] if a >= 0 else Children([], [])
            for (row, _), a in zip(nodes, asked, strict=True)
        ]
        if self._curve.points:
            self._curve.observe(bounds[-1], time.perf_counter() - start)
        return found

    def _likeliest(self, logits: Tensor) -> list[Children]:
        """Children of each row of logits over the words drafted."""
        most = logits.softmax(-1).topk(self.width, -1)
        tokens = self.words[most.indices].tolist()
        found = []
        for words, ps in zip(tokens, most.values.tolist(), strict=True):
            kept = [(w, p) for w, p in zip(words, ps, strict=True) if p > 1e-3]
            found.append(Children([w for w, _ in kept], [p for _, p in kept]))
        return found

    def _catch_up(self, row: int) -> None:
        """Commit most of a long text that a row's cache lacks."""
        state = self._rows[row]
        features, at = torch.cat(state.features), 0
        while len(state.tokens) - at > _AT_ONCE:
            n = _AT_ONCE
            parts: list[Tensor] = [torch.empty(0, dtype=torch.int64)] * len(self._rows)
            above = list(parts)
            parts[row], above[row] = (
                torch.tensor(state.tokens[at : at + n]),
                torch.arange(-1, n - 1),
            )
            none = torch.empty(0, dtype=torch.int64)
            self._sequences.run(parts, above, wanted=none, features=features[at : at + n])
            kept: list[Tensor | None] = [None] * len(self._rows)
            kept[row] = torch.arange(n)
            self._sequences.keep(kept)
            at += n
        state.tokens, state.features = state.tokens[at:], [features[at:]]

    def commit(
        self, trees: Sequence[Tree], accepted: Sequence[Sequence[int]], hidden: Sequence[Tensor]
    ) -> None:
        """Keep what was run on the target's states; the rest is run again on them, when asked for.

        What the cache held of drafted tokens came from the head's own states, and goes.
        """
        kept: list[Tensor | None] = []
        for state, tree, path, states in zip(self._rows, trees, accepted, hidden, strict=True):
            run = state.place[0] + 1 if path and 0 in state.place else 0
            kept.append(torch.arange(run))
            state.place, state.states = {}, []
            if run:
                state.tokens, state.features = [], []
            if not path:
                continue
            before = torch.cat([state.last[None], states[:-1]])
            skip = 1 if run else 0  # the root is in the cache
            state.tokens += [tree.tokens[n] for n in path[skip:]]
            state.features.append(before[skip:])
            state.last = states[-1].clone()
        self._sequences.keep(kept)

    def drop(self, rows: Sequence[int]) -> None:
        """Remove rows."""
        gone = set(rows)
        self._sequences.drop(rows)
        self._rows = [r for i, r in enumerate(self._rows) if i not in gone]

    def seconds(self, nodes: int) -> float:
        """As measured."""
        return self._curve(nodes) if self._curve.points else 1e-3 * nodes
