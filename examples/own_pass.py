"""Write a pass of your own: hot neurons first, and see whether it beats the one that skimp has.

A few neurons fire for most tokens. `HotFirst` puts neurons that fire as often as each other into
one expert, as PowerInfer does, in place of `Split`, which puts together those that fire on the
same tokens. A pass is a frozen dataclass: a name, options, and `run` from graph to graph. The
pipeline copies the graph before it, checks it after, times it and stores what it found.

    python examples/own_pass.py --quick
"""

import sys
from dataclasses import dataclass
from typing import ClassVar

import skimp
import small
from skimp.passes.base import Pass, PassResult, capture
from skimp.passes.budget import Budget
from skimp.passes.lift import blocks
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify
from skimp.passes.split import permute
from skimp.runtime.models import load_pretrained


@dataclass(frozen=True)
class HotFirst(Pass):
    """Order the neurons of every block by how often they fire.

    Attributes:
        rows: Tokens on which firing is counted.
    """

    name: ClassVar[str] = "hot-first"
    rows: int = 4096

    def run(self, gm, context):
        """Permute the neurons; at tau = 0 the model stays the same function."""
        inputs, hottest = capture(gm, context.train, self.rows), {}
        for name, block in blocks(gm).items():
            fires = (block.hidden(inputs[name][: self.rows]) > 0).float().mean(0)
            permute(block, fires.argsort(descending=True))
            hottest[name] = float(fires.max())
        return PassResult(gm, True, {"hottest": hottest})


def main(quick=False):
    if quick:
        model, data, size, steps = small.encoder(), small.text(), 400, 10
    else:
        loaded, size, steps = load_pretrained(), 60_000, 800
        text = skimp.embedded_text()[:6000]
        model, data = loaded.model, skimp.batches(loaded.tokenizer, text)
    before = [Relufy(), Sparsify(tokens=size, chunk=min(size, 16_000))]
    after = [Route(tokens=size, steps=steps), Budget("flops <= 0.85")]
    found = {}
    for split in (Split(), HotFirst()):
        done = skimp.convert(model, data, passes=[*before, split, *after], expert_size=4)
        last = done.history[-1]["stats"]["tried"][-1]
        found[split.name] = last["cosine"]
        print(f"{split}: cosine {last['cosine']:.4f} with {last['flops']:.0%} of the FLOPs")
    return found


if __name__ == "__main__":
    main("--quick" in sys.argv)
