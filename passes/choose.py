"""Keep a block only where it is measured to be faster than the dense network.

The dense form of a block that replaced a linear layer is that layer, as it was in the teacher.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule

from ..ir.block import DynkFFN
from ..ir.cost import Curves
from ..ir.measure import compare
from .base import Context, Pass, PassResult, capture
from .lift import blocks


@dataclass(frozen=True)
class Choose(Pass):
    """Time each block against its dense form on real inputs; the slower of the two goes.

    Attributes:
        rows: Rows per call that matter to the user.
        margin: The block must take less than this share of the dense time at one of them.
        repeats: Interleaved pairs per measurement.
    """

    name: ClassVar[str] = "choose"
    rows: tuple[int, ...] = (16, 256, 2048)
    margin: float = 1.0
    repeats: int = 7

    def run(self, gm: GraphModule, context: Context) -> PassResult:
        """Mark as dense the blocks of ``gm`` that do not pay."""
        inputs = capture(gm, context.held_out, max(self.rows), offload=context.offload)
        curves = Curves.load()
        stats: dict[str, Any] = {}
        for name, block in blocks(gm).items():
            ratios = {}
            for rows in self.rows:
                x = inputs[name]
                x = x.repeat(-(-rows // len(x)), 1)[:rows].contiguous()
                dense_form = (
                    context.teacher.get_submodule(name) if block.linear else block.every_expert
                )
                calls = {
                    "dense": lambda f=dense_form, x=x: f(x),
                    "dynk": lambda b=block, x=x: b(x),
                }
                timed = compare(calls, "dynk", seconds=0, least=self.repeats).timings
                dense, dynk = timed["dense"].median, timed["dynk"].median
                curves.seconds[Curves.key(block, rows, None)] = dense
                curves.seconds[Curves.key(block, rows, _share(block, x))] = dynk
                ratios[rows] = dense / dynk
            block.dense = max(ratios.values()) * self.margin <= 1
            stats[name] = {"speedup": ratios, "kept": not block.dense}
            if block.dense and block.linear:
                gm.set_submodule(name, context.offload.copy(context.teacher.get_submodule(name)))
            context.progress(self.name, len(stats), len(inputs), name)
        curves.store()
        return PassResult(gm, not all(s["kept"] for s in stats.values()), stats)


def _share(block: DynkFFN, x: Tensor) -> float:
    with torch.no_grad():
        return float(block.selected(x).float().mean())
