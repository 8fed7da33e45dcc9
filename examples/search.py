"""Semantic search with a converted encoder: convert once, then trade quality for speed live.

Run after `make demo`, which leaves the converted model in out/model:

    .venv/bin/python examples/search.py "how do I open a file"
"""

import sys
from pathlib import Path

import skimp
import torch
from skimp.passes.base import pooled
from skimp.runtime.models import load_pretrained
from torch.nn import functional as F


@torch.no_grad()
def embed(model, tokenizer, passages):
    """Unit vectors of passages, ``[n, 384]``."""
    data = skimp.batches(tokenizer, passages, seed=None, batch_tokens=4096)
    return torch.cat([F.normalize(pooled(model(**b), b), dim=-1) for b in data])


def main():
    query = " ".join(sys.argv[1:]) or "how do I open a file"
    loaded = load_pretrained()
    model = skimp.load(Path("out/model"), loaded.model)
    passages = list(skimp.embedded_text()[:2000])
    index = embed(model, loaded.tokenizer, passages)
    scores = index @ embed(model, loaded.tokenizer, [query])[0]
    for score, i in zip(*scores.topk(5), strict=True):
        print(f"{score:.3f}  {passages[i][:100]}")


if __name__ == "__main__":
    main()
