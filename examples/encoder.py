"""Convert a sentence encoder without labels, see what it costs, and turn the knob.

Some ten minutes on two cores; with `--quick` seconds, for a small model that knows nothing:

    python examples/encoder.py --quick
"""

import sys
from pathlib import Path

import skimp
import small
import torch
from skimp.passes.base import pooled
from skimp.runtime.models import load_pretrained
from torch.nn import functional as F

BUDGET = "flops <= 0.6"


def main(quick=False, folder="out/encoder"):
    if quick:
        model, data = small.encoder(), small.text()
        converted = skimp.convert(model, data, passes=small.PASSES, expert_size=4, router_width=4)
    else:
        loaded = load_pretrained()  # or your own model and tokenizer
        text = skimp.embedded_text()  # or your own passages; there are no labels
        model, data = loaded.model, skimp.batches(loaded.tokenizer, text)
        converted = skimp.convert(model, data, budget=BUDGET)
    for step in converted.history:
        print(f"{step['pass'].partition('{')[0]:10} {step['seconds']:6.1f} s")

    def far():
        """One minus the mean cosine to what the dense model says."""
        with torch.no_grad():
            got, want = (pooled(m(**data[0]), data[0]) for m in (converted.model, model))
        return 1 - float(F.cosine_similarity(got, want, dim=-1).mean())

    found = {"as chosen": far()}
    for tau in (0.0, 0.1, 0.5):  # 0 runs every expert
        skimp.set_tau(converted.model, tau)
        found[f"tau {tau}"] = far()
    for name, distance in found.items():
        print(f"{name:10} {distance:.4f} from the dense model")
    skimp.save(converted.model, Path(folder), data[0])
    again = skimp.load(Path(folder), model)
    with torch.no_grad():
        assert torch.equal(pooled(again(**data[0]), data[0]),
                           pooled(converted.model(**data[0]), data[0]))  # fmt: skip
    print(f"saved to {folder}")
    return found


if __name__ == "__main__":
    main("--quick" in sys.argv)
