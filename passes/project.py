"""Replace attention projections by networks that can skip: D2DMoE, section 3.4.

Projection: x w^T + b  -->  DynkFFN: relu(x w_in^T + b_in) w_out + b_out, of as many FLOPs

    min |y - y_dense|^2 / var(y_dense) + alpha * Hoyer(h)    on the dense model's inputs

A ReLU network of as many FLOPs has half as many neurons as a square layer has columns. It starts as
the best linear map that it can express: each of the leading principal components of the outputs
takes two neurons, one for either sign, of which one is always silent. Training goes on from there.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..ir.block import DynkFFN, Projection
from ..ir.errors import NothingToConvertError
from ..ir.site import Miss, ProjectionSite
from .base import Context, PassResult, capture
from .lift import lifted_layers
from .sparsify import Sparsify


def hidden_neurons(d: int, d_out: int, expert_size: int, factor: float = 1.0) -> int:
    """Neurons of the network that costs what a linear layer ``d -> d_out`` does.

    A layer has ``d * d_out + d_out`` weights, each neuron ``d + d_out + 1``. For square layers
    that is the paper's ``(d^2 + d) / (2d + 1)``; narrow ones, as of grouped keys and values, get
    more neurons than half their width, so they lose less of their rank. The result is
    the nearest multiple of ``expert_size``, of which there is at least one.
    """
    exact = round(factor * (d * d_out + d_out) / (d + d_out + 1))
    return max(1, round(exact / expert_size)) * expert_size


def router_width(d: int, d_out: int, experts: int, overhead: float = 0.06) -> int:
    """Hidden width at which a router costs at most a share of a linear layer; 0: there is none."""
    return int(overhead * d * d_out / (d + experts))


def too_narrow(site: ProjectionSite, expert_size: int = 8) -> Miss | None:
    """Why a projection stays linear although it was found."""
    experts = hidden_neurons(site.d, site.d_out, expert_size) // expert_size
    if router_width(site.d, site.d_out, experts):
        return None
    reason = f"{site.d} -> {site.d_out} is too small: a router would cost over 6 % of it"
    return Miss(reason, (site.output_node,))


@dataclass(frozen=True)
class Project(Sparsify):
    """Make blocks of the attention projections and distil them, each alone, as Sparsify does.

    Attributes:
        factor: FLOPs of the network with all its experts, as a share of the linear layer's.
        overhead: FLOPs of the router, at most, as a share of the linear layer's.
        rows: Rows of the teacher's inputs that the first weights are computed from.
    """

    name: ClassVar[str] = "project"
    tokens: int = 90_000
    alpha: float = 0.02
    lr: float = 1e-3
    factor: float = 1.0
    overhead: float = 0.06
    rows: int = 8192

    def run(self, gm: GraphModule, context: Context) -> PassResult:
        """Put blocks into ``gm`` and train them.

        Raises:
            NothingToConvertError: ``gm`` holds no lifted projection.
        """
        found = {n: p for n, p in lifted_layers(gm).items() if isinstance(p, Projection)}
        if not found:
            raise NothingToConvertError(
                "project found no attention projection; convert with projections=True, which "
                "lifts them, or leave the pass out"
            )
        inputs = capture(context.teacher, context.train, self.rows, list(found), context.offload)
        made: dict[str, DynkFFN] = {}
        stays: list[str] = []
        with torch.random.fork_rng():
            torch.manual_seed(context.seed)  # the routers' first weights
            for name, linear in found.items():
                block = self._block(linear, inputs[name][: self.rows])
                if block is None:
                    stays.append(name)
                    continue
                gm.set_submodule(name, context.offload.move(block))
                made[name] = block
        del inputs
        stats: dict[str, Any] = {"blocks": {}}
        if made and self.tokens:
            stats = self.distil(gm, context, made).stats
        return PassResult(gm, bool(made), stats | {"too small": stays})

    def _block(self, linear: Projection, x: Tensor) -> DynkFFN | None:
        neurons = hidden_neurons(linear.d, linear.d_out, linear.expert_size, self.factor)
        width = router_width(linear.d, linear.d_out, neurons // linear.expert_size, self.overhead)
        if not width:
            return None
        w_in, b_in, w_out, b_out = as_network(linear, x, neurons)
        block = DynkFFN(
            w_in, b_in, None, None, w_out, b_out,
            expert_size=linear.expert_size, act="relu", router_width=width, linear=True,
        )  # fmt: skip
        return block.to(linear.weight).train(linear.training).requires_grad_(False)


def as_network(
    linear: Projection, x: Tensor, neurons: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The ReLU network closest to a linear layer among those that are linear themselves.

    With ``u`` a unit vector of outputs, ``relu(u^T y) u - relu(-u^T y) u`` is the part of ``y``
    along ``u``, so two neurons carry one principal component; with twice as many neurons as the
    layer has rank, the network is the layer.

    Args:
        linear: The layer, ``d -> d_out``.
        x: Rows that reach it, ``[rows, d]``.
        neurons: Hidden neurons, h.

    Returns:
        ``w_in [h, d]``, ``b_in [h]``, ``w_out [h, d_out]`` and ``b_out [d_out]``, float32.
    """
    with torch.no_grad():
        weight, x = linear.weight.float(), x.float()
        centre = x.mean(0)
        y = (x - centre) @ weight.T
        covariance = y.T @ y / len(y)
        # a little of what unit noise would give: few rows leave directions of the layer unseen
        noise = weight @ weight.T
        covariance += 1e-4 * covariance.trace() / noise.trace().clamp_min(1e-12) * noise
        _, vectors = torch.linalg.eigh(covariance)
        parts = min(neurons // 2, linear.d_out)
        u = vectors.flip(1).T[:parts]
        reads = u @ weight
        # the same length on both sides of a neuron, for one learning rate
        scale = reads.norm(dim=1, keepdim=True).clamp_min(1e-6).sqrt()
        w_in, w_out = reads / scale, u * scale
        b_in = -w_in @ centre
        rest = neurons - 2 * parts  # an odd one, or more than there is rank
        idle = torch.randn(rest, linear.d).to(weight.device) / linear.d**0.5
        return (
            torch.cat([w_in, -w_in, idle]),
            torch.cat([b_in, -b_in, b_in.new_zeros(rest)]),
            torch.cat([w_out, -w_out, w_out.new_zeros(rest, linear.d_out)]),
            weight @ centre + (0 if linear.bias is None else linear.bias.float()),
        )
