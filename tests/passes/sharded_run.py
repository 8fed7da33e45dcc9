"""A conversion, alone or as one of several processes, that tells what it did; not a test itself.

python [-m torch.distributed.run --nproc-per-node N] sharded_run.py FOLDER [WHAT]
"""

import json
import os
import sys
from pathlib import Path

import skimp
import torch
from skimp.passes.budget import Budget
from skimp.passes.finetune import Finetune
from skimp.passes.gate_route import GateRoute
from skimp.passes.project import Project
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook

RANK = int(os.environ.get("RANK", "0"))
SHAPE = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


def bert():
    import transformers

    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**SHAPE, intermediate_size=64)
    ).eval()


def llama():
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **SHAPE, intermediate_size=96, num_key_value_heads=2, tie_word_embeddings=True
        )
    ).eval()


class Small(torch.nn.Module):
    """Two networks between norms, so small that what takes time is to start processes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = torch.nn.Embedding(64, 32)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(32) for _ in range(2))
        self.networks = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
            for _ in range(2)
        )
        self.head = torch.nn.Linear(32, 2)

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids)
        for norm, network in zip(self.norms, self.networks, strict=True):
            x = x + network(norm(x))
        x = x * attention_mask[..., None]
        return {"logits": self.head(x.sum(1) / attention_mask.sum(1)[:, None])}


def data():
    """Batches of an odd number of rows, padded, and one with fewer rows than processes."""
    g = torch.Generator().manual_seed(0)
    made = []
    for rows in (7, 8, 1, 5, 6):
        ids = torch.randint(2, 60, (rows, 9), generator=g)
        mask = (torch.arange(9) < torch.randint(3, 10, (rows, 1), generator=g)).long()
        made.append(dict(input_ids=ids, attention_mask=mask, labels=ids[:, 0] % 2))
    return made


PASSES = [
    Project(tokens=100, chunk=64, batch=32, overhead=1.0),
    Relufy(),
    Sparsify(tokens=100, chunk=64, batch=32),
    Finetune(steps=6, lr=1e-3),
    Split(),
    Route(tokens=64, steps=5),
    Recover(steps=6, lr=1e-3, share=0.6, alpha=0.1, even=False),
    Budget("flops <= 0.9"),
]


def main(folder, what="bert"):
    told = {"losses": [], "bytes": [], "stages": []}

    def loss(outputs, batch):
        if what == "failing" and RANK == 1:
            raise SystemExit("no memory for the task's loss")
        value = F.cross_entropy(outputs["logits"], batch["labels"], label_smoothing=0.1)
        told["losses"].append(value.item())
        return value

    def look(optimizer, *_):
        if isinstance(optimizer, torch.optim.AdamW):
            held = [p for g in optimizer.param_groups for p in g["params"]]
            held += [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
            own = [t.to_local() if hasattr(t, "to_local") else t for t in held]
            told["bytes"].append(sum(t.nbytes for t in own))

    hook = register_optimizer_step_post_hook(look)
    options = dict(expert_size=4, router_width=4, projections=True, loss=loss, passes=PASSES)
    batches = data()
    if what in ("small", "failing", "other"):
        model = Small().eval()
        options |= dict(passes=[Finetune(steps=6, lr=1e-3), Recover(steps=6)], projections=False)
    else:
        model = bert()
    if what == "llama":  # of a loss so small, AdamW makes of rounding what it will: one step
        model, batches = (
            llama(),
            [{k: b[k] for k in ("input_ids", "attention_mask")} for b in data()],
        )
        options = dict(
            passes=[
                GateRoute(),
                Recover(steps=1, lr=1e-3, share=0.6),
            ]
        )
    if what == "half":
        options["passes"] = PASSES[:4]
    if what == "other" and RANK == 1:
        batches[0]["input_ids"][0, 0] += 1
    done = skimp.convert(
        model,
        batches,
        **options,
        folder=Path(folder, "stages"),
        progress=lambda stage, *_: told["stages"].append(stage),
    )
    hook.remove()
    told["history"] = done.history
    told["plain"] = all(type(p) is torch.nn.Parameter for p in done.model.parameters())
    told["flags"] = [
        n for n, m in done.model.named_modules() if hasattr(m, "_is_fsdp_managed_module")
    ]
    Path(folder, f"told{RANK}.json").write_text(json.dumps(told))
    torch.save(done.model.state_dict(), Path(folder, f"state{RANK}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
