"""Convert a language model, then let it write with token trees: the same text, sooner.

With `--quick` a small random model in place of SmolLM2, and seconds in place of ten minutes:

    python examples/decoder.py --quick
"""

import sys

import skimp
import small
import torch
from skimp.passes.budget import Budget
from skimp.passes.gate_route import GateRoute
from skimp.runtime.language import perplexity, windows
from skimp.runtime.models import load_decoder
from transformers import AutoModelForCausalLM

BUDGET = "flops <= 0.85"


def main(quick=False, tokens=24, folder="out/decoder"):
    if quick:
        model, data = small.decoder(), small.text()
        passes = [GateRoute(), Budget(BUDGET)]  # nothing is trained
        prompt = data[0]["input_ids"][3:4]
    else:
        loaded, passes = load_decoder(), skimp.recipe(BUDGET, gates=True)
        model, data = loaded.model, windows(loaded.tokenizer, skimp.embedded_text()[:4000])
        prompt = loaded.tokenizer("A token tree is", return_tensors="pt")["input_ids"]
    # every neuron whose gate stays nearly shut is left out; how nearly, the budget decides
    converted = skimp.convert(model, data, passes=passes)
    skimp.save_pretrained(converted, model, folder, data[0])
    sparse = AutoModelForCausalLM.from_pretrained(folder)  # its blocks in the model's own modules
    print(f"perplexity {perplexity(model, data[-1:]):.2f}, sparse "
          f"{perplexity(sparse, data[-1:]):.2f}")  # fmt: skip

    # any decoder writes with trees; drafts change how soon a token comes, never which
    want = model.generate(prompt, max_new_tokens=tokens, do_sample=False)
    got = skimp.generate(model, prompt, max_new_tokens=tokens)
    assert torch.equal(got, want)
    print(got[0].tolist() if quick else loaded.tokenizer.decode(got[0]))
    return got


if __name__ == "__main__":
    main("--quick" in sys.argv)
