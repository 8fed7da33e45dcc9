"""The dynamic-k block: a router and the experts it chooses from; and what it may replace."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import op
from .errors import BadWeightsError

PREDICTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "norms": (torch.relu, torch.abs),
    "activations": (torch.tanh, torch.sigmoid),
}
"""What a router predicts: its activation, and how what it computes becomes a score."""


class Router(nn.Module):
    """Score the experts of each row.

    Linear(d, width) -> ReLU -> Linear(width, E) -> abs, without biases, predicts the L2 norm of
    each expert's output (D2DMoE, section 3.2). With tanh in place of ReLU and sigmoid in place of
    abs, it predicts how active each expert is, as a share of the most active (MoEfication, arXiv
    2110.01786, section 3.3).

    Args:
        d: Width of the input row.
        width: Hidden width.
        experts: Number of experts, E.

    Attributes:
        predicts: A key of :data:`PREDICTIONS`.
        top: Static selection: so many experts of each row score 1, the others 0, so that any
            threshold above 0 runs the same number for every row (MoEfication). 0: the scores
            themselves, for dynamic-k.
    """

    def __init__(self, d: int, width: int, experts: int) -> None:
        super().__init__()
        self.width = width
        self.down = nn.Linear(d, width, bias=False)
        self.up = nn.Linear(width, experts, bias=False)
        self.predicts = "norms"
        self.top = 0

    def predict(self, x: Tensor) -> Tensor:
        """What training compares with the labels before it becomes a score, ``[.., E]``."""
        return self.up(PREDICTIONS[self.predicts][0](self.down(x)))  # type: ignore[no-any-return]

    def score(self, x: Tensor) -> Tensor:
        """The scores before any static selection: ``[.., d] -> [.., E]``, non-negative."""
        return PREDICTIONS[self.predicts][1](self.predict(x))

    def forward(self, x: Tensor) -> Tensor:
        """Score the experts: ``[.., d] -> [.., E]``, non-negative."""
        scores = self.score(x)
        if not self.top:
            return scores
        best = scores.topk(self.top, -1).indices
        return torch.zeros_like(scores).scatter(-1, best, 1.0)


class GateRouter(nn.Module):
    """The gate of a network as the router of its neurons: its weights are the block's own.

    How far a gate opens bounds what its neuron can add, and it is known exactly before anything
    else of the neuron is computed (CATS, arXiv 2404.08763, section 3). That costs a third of a
    gated network, where a learned router costs a few hundredths and errs.
    """

    width = 0
    predicts = "gate"
    top = 0


def make_router(d: int, width: int, experts: int) -> Router | GateRouter:
    """The router of a hidden width; of none, the gate."""
    return Router(d, width, experts) if width else GateRouter()


class Projection(nn.Module):
    """A linear layer in the place of a block: an attention projection that is not one, or not yet.

    A network lifts into a block that computes the same. A linear layer does not: the network that
    replaces it has to learn it first. So it is lifted into itself, at the name its block will have.

    Args:
        weight: ``[d_out, d]``.
        bias: ``[d_out]`` or ``None``.
        expert_size: Neurons per expert of the block that may replace it.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, expert_size: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.expert_size = expert_size

    @property
    def d(self) -> int:
        """Width of the input row."""
        return int(self.weight.shape[1])

    @property
    def d_out(self) -> int:
        """Width of the output row."""
        return int(self.weight.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """``[.., d] -> [.., d_out]``."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Its sizes."""
        return f"d={self.d}, d_out={self.d_out}, bias={self.bias is not None}"


class DynkFFN(nn.Module):
    """A feed-forward network split into experts, of which each row runs only some.

    Args:
        w_in: ``[d_ff, d]``, the neurons of an expert adjacent.
        b_in: ``[d_ff]`` or ``None``.
        w_gate: ``[d_ff, d]`` for a gated network, else ``None``.
        b_gate: ``[d_ff]`` or ``None``.
        w_out: ``[d_ff, d_out]``, neuron-major.
        b_out: ``[d_out]`` or ``None``.
        expert_size: Neurons per expert; divides ``d_ff``.
        act: A key of :data:`skimp.ir.ACTIVATIONS`.
        router_width: Hidden width of the router; 0: the gate is the router, of experts of one
            neuron.
        tau: Initial threshold; 0 runs every expert.
        linear: The block stands for one linear layer ``[d_out, d]``, not for a network like itself;
            its FLOPs are compared with those.

    Attributes:
        dense: The block computes the dense network, without its router, because that is faster.

    Raises:
        BadWeightsError: Shapes that do not fit together, or values that are not finite.
    """

    tau: Tensor
    w_in: Tensor
    b_in: Tensor | None
    w_gate: Tensor | None
    b_gate: Tensor | None
    w_out: Tensor
    b_out: Tensor | None

    def __init__(
        self,
        w_in: Tensor,
        b_in: Tensor | None,
        w_gate: Tensor | None,
        b_gate: Tensor | None,
        w_out: Tensor,
        b_out: Tensor | None,
        *,
        expert_size: int,
        act: str,
        router_width: int,
        tau: float = 0.0,
        linear: bool = False,
    ) -> None:
        super().__init__()
        d_ff, d = w_in.shape
        if not router_width and (w_gate is None or expert_size != 1):
            raise BadWeightsError(
                "only a gated network has a gate to be its router, of experts of one neuron; "
                "give router_width"
            )
        if d_ff % expert_size:
            raise BadWeightsError(
                f"expert_size {expert_size} does not divide d_ff {d_ff}; "
                f"choose a divisor, for example {nearest_divisor(d_ff, expert_size)}"
            )
        named = dict(w_in=w_in, b_in=b_in, w_gate=w_gate, b_gate=b_gate, w_out=w_out, b_out=b_out)
        expected = dict(
            w_in=(d_ff, d),
            b_in=(d_ff,),
            w_gate=(d_ff, d),
            b_gate=(d_ff,),
            w_out=(d_ff, w_out.shape[-1]),
            b_out=(w_out.shape[-1],),
        )
        for name, value in named.items():
            if value is None:
                self.register_parameter(name, None)
                continue
            if tuple(value.shape) != expected[name]:
                raise BadWeightsError(
                    f"{name} has shape {tuple(value.shape)}, expected {expected[name]}"
                )
            if not value.is_meta and not bool(torch.isfinite(value).all()):
                raise BadWeightsError(
                    f"{name} holds NaN or infinity; repair the checkpoint before converting it"
                )
            self.register_parameter(name, nn.Parameter(value.detach().clone()))
        self.expert_size = expert_size
        self.act = act
        self.dense = False
        self.linear = linear
        self.router = make_router(d, router_width, d_ff // expert_size)
        self.register_buffer("tau", torch.tensor(float(tau)))

    @property
    def d(self) -> int:
        """Width of the input row."""
        return int(self.w_in.shape[1])

    @property
    def weight(self) -> Tensor:
        """What code that asks a linear layer for its dtype or device may look at."""
        return self.w_in

    @property
    def d_ff(self) -> int:
        """Number of hidden neurons."""
        return int(self.w_in.shape[0])

    @property
    def d_out(self) -> int:
        """Width of the output row."""
        return int(self.w_out.shape[1])

    @property
    def experts(self) -> int:
        """Number of experts, E."""
        return self.d_ff // self.expert_size

    @property
    def gated(self) -> bool:
        """Whether a second projection gates the hidden neurons."""
        return self.w_gate is not None

    @property
    def gate_routed(self) -> bool:
        """Whether the gate is the router."""
        return isinstance(self.router, GateRouter)

    def route_by_gate(self) -> None:
        """Let the gate be the router, of experts of one neuron; tau = 0 computes the same.

        Raises:
            BadWeightsError: The network has no gate.
        """
        if self.w_gate is None:
            raise BadWeightsError("the network has no gate")
        self.expert_size, self.router = 1, GateRouter()
        self.tau.zero_()

    def gate(self, x: Tensor) -> Tensor:
        """What multiplies each neuron of a gated network, ``[.., d] -> [.., d_ff]``."""
        return op.ACTIVATIONS[self.act](self.pre_activation(x))

    def scores(self, x: Tensor) -> Tensor:
        """What the op takes as scores: ``[.., d] -> [.., E]``."""
        return self.router(x) if isinstance(self.router, Router) else self.gate(x)

    def selected(self, x: Tensor) -> Tensor:
        """Which experts run: bool ``[.., E]``."""
        return op.select(self.scores(x), self.tau, self.op_act)

    def tied(self, x: Tensor) -> Tensor:
        """The rows in which rounding decides which experts run: bool ``[..]``."""
        return op.ties(self.scores(x), self.tau, self.op_act)

    def compared(self, x: Tensor) -> Tensor:
        """What tau is compared with, before any static selection: ``[.., d] -> [.., E]``.

        The scores relative to their row's largest; of a gate that is the router, its magnitude.
        """
        if not isinstance(self.router, Router):
            return self.gate(x).abs()
        return relative(self.router.score(x))

    @property
    def op_act(self) -> str:
        """The activation that the op is called with."""
        return op.SCORED if self.gate_routed else self.act

    @property
    def op_weights(self) -> tuple[Tensor | None, ...]:
        """The weights that the op is called with, in its order: no gate that was the router."""
        gate = (None, None) if self.gate_routed else (self.w_gate, self.b_gate)
        return self.w_in, self.b_in, *gate, self.w_out, self.b_out

    def every_expert(self, x: Tensor) -> Tensor:
        """``[.., d] -> [.., d_out]`` through all experts, without the router: tau = 0."""
        return self.project(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """Hidden activations of every expert, ``[.., d_ff]``."""
        return self.fire(self.pre_activation(x), x)

    def pre_activation(self, x: Tensor) -> Tensor:
        """What the activation is applied to, ``[.., d_ff]``: of a gated network, the gate."""
        if self.w_gate is None:
            return F.linear(x, self.w_in, self.b_in)
        return F.linear(x, self.w_gate, self.b_gate)

    def fire(self, pre: Tensor, x: Tensor) -> Tensor:
        """Hidden activations from :meth:`pre_activation`."""
        h = op.ACTIVATIONS[self.act](pre)
        return h if self.w_gate is None else self.times_up(h, x)

    def times_up(self, gate: Tensor, x: Tensor) -> Tensor:
        """Hidden activations of a gated network from its :meth:`gate`."""
        return gate * F.linear(x, self.w_in, self.b_in)

    def project(self, h: Tensor) -> Tensor:
        """The second projection and its bias: ``[.., d_ff] -> [.., d_out]``."""
        y = h @ self.w_out
        return y if self.b_out is None else y + self.b_out

    def forward(self, x: Tensor) -> Tensor:
        """``[.., d] -> [.., d_out]`` through the experts that the router selects."""
        if self.dense:
            return self.every_expert(x)
        return op.dynk_ffn(  # type: ignore[no-any-return]
            x, self.scores(x), self.tau, *self.op_weights, self.expert_size, self.op_act
        )

    def extra_repr(self) -> str:
        """One typed line, the same words as the text form."""
        kind = "gated " if self.gated else ""
        return (
            f"{kind}{self.act}, d={self.d}, d_ff={self.d_ff}, d_out={self.d_out}, "
            f"experts={self.experts}x{self.expert_size}, router={self.router.width or 'gate'}"
        )


def relative(scores: Tensor) -> Tensor:
    """Scores as a share of their row's largest."""
    return scores / scores.amax(-1, keepdim=True).clamp_min(1e-12)


def nearest_divisor(n: int, wanted: int) -> int:
    """The divisor of ``n`` closest to ``wanted``."""
    return min((k for k in range(1, n + 1) if n % k == 0), key=lambda k: abs(k - wanted))
