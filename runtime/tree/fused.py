"""Decoders of the Llama kind as targets whose whole step is generated C++.

Which models those are is found out from their parts, not their names: layers of four attention
projections and a gated feed-forward network, two norms, rotary embedding, nothing else. Networks
whose gate was made their router run only the neurons it chooses, at the thresholds that the model
has by then. Then a short text runs through both, and only a model that gives the same logits is
taken. Others get a reason, and :func:`target_of` serves them with
:class:`~skimp.runtime.tree.hf.HFTarget`.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...codegen.cpp.decoder import Decoder
from ...codegen.cpp.decoder_spec import DecoderSpec, DecoderWeights, LayerWeights, RouterWeights
from ...codegen.cpp.spec import detect_isa
from ...ir.block import DynkFFN, Router
from ...ir.errors import CompileError, TargetError
from .hf import HFTarget, why_not
from .sequences import Sequences
from .target import Target

_AT_ONCE = 64
"""Prompt tokens per step: enough that products, not weights being read, take the time."""
_ROOM = 256
"""Positions for which a cache has room beside the prompt at first."""
_PROBE = (7, 3, 11, 3, 5, 2, 9, 4)
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
_ACTS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_ACTS |= {"gelu_new": "gelu_tanh", "relu": "relu", "relu2": "relu2"}


class FusedTarget:
    """A causal language model on generated code; see :class:`~skimp.runtime.tree.target.Target`.

    Greedy decoding with trees gives, to the bit, the logits of decoding one token at a time,
    because a node's result does not depend on what is computed beside it.

    Args:
        model: Of transformers, on the CPU.
        dtype: Of weights and cache, float32 or bfloat16; by default the model's.
        blocks: Converted feed-forward networks by layer; their experts run in
            ``verify(.., sparse=True)``, all of their neurons otherwise.

    Attributes:
        weights: Of the decoder, for drafters that share some.
        prompts: By row: hidden states of the prompt's tokens, ``[tokens, d]``, of the last
            ``prefill``; for drafters that read them.

    Raises:
        TargetError: The model is of another kind, and in what.
        CompileError: There is no compiler.
    """

    def __init__(
        self,
        model: Any,
        *,
        dtype: torch.dtype | None = None,
        blocks: Mapping[int, DynkFFN] | None = None,
    ) -> None:
        refusal = why_not(model)
        if refusal:
            raise TargetError(f"{type(model).__name__} cannot verify token trees: {refusal}")
        config = model.config.get_text_config()
        head: nn.Module = model.get_output_embeddings()
        weight: Tensor = head.weight  # type: ignore[assignment]
        self.dtype = dtype or weight.dtype
        if self.dtype not in _TOLERANCE or weight.device.type != "cpu":
            raise TargetError(f"no generated step for {self.dtype} on {weight.device.type}")
        parts = _Parts(model, blocks or {})
        self.vocabulary, self.width = (int(n) for n in weight.shape)
        self.limit = int(getattr(config, "max_position_embeddings", 0) or 1 << 20)
        self._rotary = parts.rotary
        spec = DecoderSpec(
            d=self.width, d_ff=parts.d_ff, heads=parts.heads, kv_heads=parts.kv_heads,
            head_dim=parts.head_dim, rope=self.tables(1)[0].shape[-1], act=parts.act,
            dtype=str(self.dtype).removeprefix("torch."), isa=detect_isa(),
        )  # fmt: skip
        self.weights = parts.weights()
        self.decoder = Decoder(spec, self.weights)
        self._rows = Sequences(self.decoder, self.tables, self.limit)
        self.prompts: list[Tensor] = []
        self._agree(model)

    @property
    def name(self) -> str:
        """Sizes, dtype and instruction set, and whether gates choose neurons: what costs go by."""
        s = self.decoder.spec
        by_gate = "-gates" if any(w.tau is not None for w in self.weights.layers) else ""
        sizes = f"{self.decoder.layers}x{s.d}x{s.d_ff}x{self.vocabulary}"
        return f"fused-{sizes}-h{s.heads}.{s.kv_heads}.{s.head_dim}-{s.dtype}-{s.isa}{by_gate}"

    def lengths(self) -> list[int]:
        """Tokens committed, by row."""
        return self._rows.lengths()

    def drop(self, rows: Sequence[int]) -> None:
        """Remove rows."""
        self._rows.drop(rows)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Commit prompts as new rows, some tokens at a time."""
        if not prompts or not all(prompts):
            raise TargetError("a prompt has no token; give at least the beginning-of-text token")
        self._rows.begin(len(prompts), max(map(len, prompts)) + _ROOM)
        states: list[list[Tensor]] = [[] for _ in prompts]
        logits: list[Tensor] = [torch.empty(0)] * len(prompts)
        left = [list(p) for p in prompts]
        while any(left):
            room, parts = _AT_ONCE, []
            for tokens in left:
                parts.append(tokens[:room])
                room -= len(parts[-1])
            left = [tokens[len(p) :] for tokens, p in zip(left, parts, strict=True)]
            ends = [i for i, p in enumerate(parts) if p and not left[i]]
            last = torch.tensor([len(p) for p in parts]).cumsum(0)[ends] - 1
            got, hidden = self._rows.run(
                [torch.tensor(p, dtype=torch.int64) for p in parts],
                [torch.arange(-1, len(p) - 1) for p in parts],
                wanted=last,
            )
            for i, row in zip(ends, got, strict=True):
                logits[i] = row
            for i, state in enumerate(hidden.split([len(p) for p in parts])):
                states[i].append(state)
            self.keep([torch.arange(len(p)) for p in parts])
        self.prompts = [torch.cat(s) for s in states]
        return torch.stack(logits), torch.stack([s[-1] for s in self.prompts])

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
            self._rows.forget()
        return self._rows.run(tokens, parents, sparse=sparse)

    def keep(self, accepted: Sequence[Tensor]) -> None:
        """Commit a path per row."""
        self._rows.keep(accepted)

    def threshold(self, tau: float) -> None:
        """Set how much experts must matter in ``verify(.., sparse=True)``, in all layers."""
        self.decoder.tau.fill_(tau)

    def tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of rotary embedding, ``[positions, rope]``, as the model has them."""
        with torch.no_grad():
            cosine, sine = self._rotary(torch.zeros(1, 1, 1), torch.arange(positions)[None])
        return cosine[0].float().contiguous(), sine[0].float().contiguous()

    def _agree(self, model: Any) -> None:
        """Compare with the model itself on a short text: a prompt, then a step.

        Raises:
            TargetError: The logits differ.
        """
        ids = [t % self.vocabulary for t in _PROBE]
        with torch.no_grad():
            want = model(torch.tensor([ids])).logits[0, -2:].float()
        first, _ = self.prefill([ids[:-1]])
        second, _ = self.verify([torch.tensor(ids[-1:])], [torch.tensor([-1])])
        self._rows.begin(0, 0)
        error = float((torch.cat([first, second]) - want).norm() / want.norm().clamp_min(1e-30))
        if not error <= _TOLERANCE[self.dtype]:
            raise TargetError(
                f"{type(model).__name__} computes something that a plain Llama step does not "
                f"(logits differ by {error:.1e})"
            )


def target_of(model: Any, *, dtype: torch.dtype | None = None) -> Target:
    """The fastest target for a model: generated code, else the model's own with a warning."""
    try:
        return FusedTarget(model, dtype=dtype)
    except (TargetError, CompileError) as error:
        warnings.warn(f"decoding runs the model's own code: {error}", stacklevel=2)
        return HFTarget(model)


class _Parts:
    """The parts of a decoder of the Llama kind.

    Raises:
        TargetError: It has others, or lacks one.
    """

    def __init__(self, model: Any, blocks: Mapping[int, DynkFFN]) -> None:
        config = model.config.get_text_config()
        self.model, self.config, self.blocks = model, config, blocks
        self.heads = int(config.num_attention_heads)
        self.kv_heads = int(getattr(config, "num_key_value_heads", None) or self.heads)
        act = str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", ""))
        if act not in _ACTS:
            raise TargetError(f"its activation is {act or 'unknown'}, which no step computes")
        self.act = _ACTS[act]
        count = int(config.num_hidden_layers)
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        fit = [m for m in lists if hasattr(m[0], "self_attn") and hasattr(m[0], "mlp")]
        if len(fit) != 1:
            raise TargetError("its layers are not attention and a network, self_attn and mlp")
        window = getattr(config, "sliding_window", None)
        if window and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise TargetError(f"its attention sees a sliding window of {window}")
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("dynamic", "longrope"):
            raise TargetError("its rotary embedding changes with the length of the text")
        self.layers: list[Any] = list(fit[0])
        rotary = {id(m): m for m in model.modules() if hasattr(m, "inv_freq")}
        if len(rotary) != 1:
            raise TargetError(f"it has {len(rotary)} rotary embeddings, not one")
        self.rotary: Any = next(iter(rotary.values()))
        first = _weights(self.layers[0], self.heads, self.kv_heads, self.act)
        self.head_dim, self.d_ff = len(first.q) // self.heads, len(first.gate)

    def weights(self) -> DecoderWeights:
        """All weights, none copied."""
        layers = []
        for index, layer in enumerate(self.layers):
            found = _weights(layer, self.heads, self.kv_heads, self.act)
            if index in self.blocks:
                found = _routed(found, self.blocks[index], self.act)
            layers.append(found)
        norms = [
            m for n, m in self.model.named_modules() if n.rpartition(".")[2] in ("norm", "ln_f")
        ]
        if len(norms) != 1:
            raise TargetError("it has no single last norm")
        head = self.model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise TargetError("its output layer has a bias")
        attention = self.layers[0].self_attn
        return DecoderWeights(
            layers,
            self.model.get_input_embeddings().weight,
            norms[0].weight,
            head.weight,
            eps=float(getattr(norms[0], "variance_epsilon", getattr(norms[0], "eps", 1e-6))),
            scale=float(getattr(attention, "scaling", self.head_dim**-0.5)),
        )


def _weights(layer: Any, heads: int, kv_heads: int, act: str) -> LayerWeights:
    """A layer's weights.

    Raises:
        TargetError: A part is missing, or there is one more.
    """
    a, f = layer.self_attn, layer.mlp
    try:
        if hasattr(a, "qkv_proj"):
            size = a.qkv_proj.weight.shape[0] // (heads + 2 * kv_heads)
            widths = [heads * size, kv_heads * size, kv_heads * size]
            q, k, v = a.qkv_proj.weight.split(widths)
        else:
            q, k, v = a.q_proj.weight, a.k_proj.weight, a.v_proj.weight
        tau = None
        if isinstance(f, DynkFFN):
            gate, up, down, tau = _by_gate(f, act)
        elif hasattr(f, "gate_up_proj"):
            (gate, up), down = f.gate_up_proj.weight.chunk(2), f.down_proj.weight
        else:
            gate, up, down = f.gate_proj.weight, f.up_proj.weight, f.down_proj.weight
        biases = None
        if not hasattr(a, "qkv_proj") and a.q_proj.bias is not None:
            biases = (a.q_proj.bias, a.k_proj.bias, a.v_proj.bias)
        norms = [getattr(getattr(a, n, None), "weight", None) for n in ("q_norm", "k_norm")]
        found = LayerWeights(
            norm_in=layer.input_layernorm.weight, q=q, k=k, v=v, out=a.o_proj.weight,
            norm_mid=layer.post_attention_layernorm.weight, gate=gate, up=up,
            down=down, biases=biases, q_norm=norms[0], k_norm=norms[1], tau=tau,
        )  # fmt: skip
    except AttributeError as error:
        raise TargetError(f"a layer lacks a part of Llama's: {error}") from error
    used = [
        found.norm_in, q, k, v, found.out, found.norm_mid, gate, up, found.down, *(biases or ()),
        *(n for n in norms if n is not None),
    ]  # fmt: skip
    if sum(t.numel() for t in used) != sum(p.numel() for p in layer.parameters()):
        named = ", ".join(sorted(n for n, _ in layer.named_parameters()))
        raise TargetError(f"a layer has other weights than Llama's: {named}")
    return found


def _routed(weights: LayerWeights, block: DynkFFN, act: str) -> LayerWeights:
    """The layer with its network in the form of experts.

    Raises:
        TargetError: The network is of another kind.
    """
    gate, up, down = _gated(block, act)
    if not isinstance(block.router, Router):
        raise TargetError(
            "the gate of a converted network is its router, so nothing else can draft"
        )
    router = RouterWeights(
        block.router.down.weight, block.router.up.weight, block.expert_size,
        block.router.predicts, block.router.top,
    )  # fmt: skip
    return replace(weights, gate=gate, up=up, down=down, router=router)


def _by_gate(block: DynkFFN, act: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gate, up and down of a network whose gate is its router, and the threshold that it reads.

    Raises:
        TargetError: The network is of another kind.
    """
    if not block.gate_routed:
        raise TargetError("a converted network has a learned router, which no step computes")
    if block.dense:
        return *_gated(block, act), None
    # the model's own where it can be, so that turning the knob reaches the step
    return *_gated(block, act), block.tau.float()


def _gated(block: DynkFFN, act: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of a converted network.

    Raises:
        TargetError: The network is of another kind.
    """
    if (
        block.w_gate is None
        or block.act != act
        or any(b is not None for b in (block.b_in, block.b_gate, block.b_out))
    ):
        raise TargetError("a converted network is not gated like the others, or has biases")
    return block.w_gate, block.w_in, block.w_out.T
