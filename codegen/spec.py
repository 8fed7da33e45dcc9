"""What every kernel of a block is generated for, whatever the target."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

Weights = tuple[Tensor | None, ...]
"""w_in, b_in, w_gate, b_gate, w_out, b_out, as :func:`skimp.ir.reference` takes them."""


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """What is constant in the text of a kernel; a target adds its own.

    Attributes:
        act: A key of :data:`skimp.ir.ACTIVATIONS`.
        gated: A second projection gates the hidden neurons.
        b_in, b_gate, b_out: Which biases there are.
        expert_size: Neurons per expert.
        d, d_ff, d_out: Widths.
        dtype: Of the storage; accumulation is float32.
    """

    act: str
    gated: bool
    b_in: bool
    b_gate: bool
    b_out: bool
    expert_size: int
    d: int
    d_ff: int
    d_out: int
    dtype: str

    @property
    def name(self) -> str:
        """Readable and unique."""
        kind = "gated_" if self.gated else ""
        digest = hashlib.sha256(repr(asdict(self)).encode()).hexdigest()[:8]
        return f"{kind}{self.act}_{self.d}_{self.d_ff}_{self.dtype}_e{self.expert_size}_{digest}"


def constants_of(weights: Weights, expert_size: int, act: str, dtype: str) -> dict[str, Any]:
    """The fields of the :class:`BlockSpec` that such weights make."""
    w_in, b_in, w_gate, b_gate, w_out, b_out = weights
    assert w_in is not None
    assert w_out is not None
    return dict(
        act=act,
        gated=w_gate is not None,
        b_in=b_in is not None,
        b_gate=b_gate is not None,
        b_out=b_out is not None,
        expert_size=expert_size,
        d=int(w_in.shape[1]),
        d_ff=int(w_in.shape[0]),
        d_out=int(w_out.shape[1]),
        dtype=dtype,
    )


def shapes_fit(x: Tensor, scores: Tensor, weights: Weights, expert_size: int) -> bool:
    """Whether a kernel, which checks nothing itself, may be given such arguments."""
    w_in, b_in, w_gate, b_gate, w_out, b_out = weights
    assert w_in is not None
    assert w_out is not None
    (d_ff, d), d_out = w_in.shape, w_out.shape[1]
    return (
        min(d_ff, d, d_out) > 0
        and scores.shape[-1] * expert_size == d_ff
        and x.shape[-1] == d
        and x.shape[:-1] == scores.shape[:-1]
        and w_out.shape[0] == d_ff
        and all(t is None or t.shape == (d_ff,) for t in (b_in, b_gate))
        and (w_gate is None or w_gate.shape == w_in.shape)
        and (b_gate is None or w_gate is not None)
        and (b_out is None or b_out.shape == (d_out,))
    )
