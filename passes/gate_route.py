"""Let the gate of a gated network be the router of its neurons (CATS, arXiv 2404.08763).

    s = abs(relu(x down^T) up^T); dynk_ffn<gated silu, E x n>(x, s)
      -->  s = silu(x w_gate^T); dynk_ffn<scored, d_ff x 1>(x, s)

A gated network is a mixture of as many experts as it has neurons, weighted by their gates: what a
gate gives is known before anything else of its neuron is, and where that is small, the rest need
not be computed. So tau is compared with the magnitude of the gate itself, not with its share of the
row's largest.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from .base import Context, Pass, PassResult
from .lift import blocks


@dataclass(frozen=True)
class GateRoute(Pass):
    """Route every gated network by its own gate: nothing is learned, nothing grouped.

    It costs the gates of all neurons, a third of the network, so it pays where a learned router
    errs too much: in decoders that keep SiLU. Networks without a gate stay as they are.
    """

    name: ClassVar[str] = "gate-route"

    def run(self, gm: GraphModule, context: Context) -> PassResult:
        """Rewrite the gated blocks of ``gm``."""
        how = {}
        for name, block in blocks(gm).items():
            if block.gated:
                block.route_by_gate()
            how[name] = "gate" if block.gated else "no gate, so a router must learn"
        return PassResult(gm, "gate" in how.values(), how)
