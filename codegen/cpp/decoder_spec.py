"""What a decoder's generated step is constant in, and the weights that it is given."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from ...ir.errors import BadWeightsError
from .kernels import DTYPES
from .spec import LANES, _Compiled


@dataclass(frozen=True, slots=True)
class DecoderSpec(_Compiled):
    """Everything that is constant in the text of a decoder's step.

    Attributes:
        d: Width of the residual stream.
        d_ff: Neurons of a gated feed-forward network.
        heads, kv_heads, head_dim: Of attention; queries share keys in groups.
        rope: Leading elements of a head that are rotated.
        act: A key of :data:`skimp.ir.op.ACTIVATIONS`.
        dtype: ``float32`` or ``bfloat16``, of weights and cache; accumulation is float32.
        isa: ``avx512_bf16``, ``avx512``, ``avx2`` or ``portable``.
    """

    d: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: int
    act: str
    dtype: str
    isa: str

    @property
    def name(self) -> str:
        """Readable and unique."""
        return "decoder_" + "_".join(str(v) for v in astuple(self))

    @property
    def lanes(self) -> int:
        """Floats of a vector."""
        return LANES[self.isa]

    @property
    def value(self) -> int:
        """Width of a cached value, padded to whole vectors."""
        return -(-self.head_dim // self.lanes) * self.lanes


@dataclass(frozen=True, slots=True)
class RouterWeights:
    """A router and the experts it chooses from; see :class:`skimp.ir.block.Router`."""

    down: Tensor
    up: Tensor
    expert_size: int
    predicts: str = "norms"
    top: int = 0


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A layer's weights as PyTorch keeps them, ``[out, in]``; biases, norms of heads are optional.

    Attributes:
        q, k, v, out: Of attention.
        gate, up: ``[d_ff, d]``; ``down`` is ``[d, d_ff]``.
        router: Chooses experts in steps that ask for it.
        tau: Float32, 0-d, read by every step: neurons whose gate, activated, is smaller in
            magnitude are left out (:class:`skimp.ir.block.GateRouter`).
    """

    norm_in: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    norm_mid: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    biases: tuple[Tensor, Tensor, Tensor] | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    router: RouterWeights | None = None
    tau: Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """A decoder's weights.

    Attributes:
        embedding: ``[vocabulary, d]``.
        head: ``[words, d]``; may be the embedding.
        mix: ``[d, 2 d]``: the first layer's input is this times a token's embedding and a feature
            of width ``d``, as in EAGLE; ``None`` for an ordinary decoder.
        scale: Of attention scores.
    """

    layers: Sequence[LayerWeights]
    embedding: Tensor
    norm: Tensor
    head: Tensor
    eps: float
    scale: float
    mix: Tensor | None = None


def check(spec: DecoderSpec, weights: DecoderWeights) -> None:
    """Kernels trust their arguments, so shapes are checked here."""
    d, kv = spec.d, spec.kv_heads * spec.head_dim
    if spec.heads % spec.kv_heads or spec.rope % 2 or spec.rope > spec.head_dim:
        raise BadWeightsError(f"{spec.name}: heads or rotary widths do not divide")
    if spec.dtype not in DTYPES.values():
        raise BadWeightsError(f"{spec.dtype} is no dtype of decoders; use float32 or bfloat16")
    mixed = spec.heads * spec.head_dim
    for index, layer in enumerate(weights.layers):
        wanted = dict(
            norm_in=(d,), q=(mixed, d), k=(kv, d), v=(kv, d), out=(d, mixed), norm_mid=(d,),
            gate=(spec.d_ff, d), up=(spec.d_ff, d), down=(d, spec.d_ff),
        )  # fmt: skip
        for name, shape in wanted.items():
            if tuple(getattr(layer, name).shape) != shape:
                raise BadWeightsError(
                    f"{name} of layer {index} has shape {tuple(getattr(layer, name).shape)}, "
                    f"expected {shape}"
                )
        r = layer.router
        if r is not None and (
            len(r.up) * r.expert_size != spec.d_ff or r.down.shape != (r.up.shape[1], d)
        ):
            raise BadWeightsError(f"the router of layer {index} does not fit its experts")
        tau = layer.tau
        if tau is not None and (r is not None or tau.dtype != torch.float32 or tau.numel() != 1):
            raise BadWeightsError(
                f"tau of layer {index} is not one float32 number, or stands beside a router"
            )
    for name, matrix in (("embedding", weights.embedding), ("head", weights.head)):
        if matrix.dim() != 2 or matrix.shape[1] != d:
            raise BadWeightsError(f"{name} has shape {tuple(matrix.shape)}, expected [.., {d}]")
