"""A small classifier, and its conversion by every pass that a recipe may hold."""

import skimp
import torch
import transformers
from skimp.passes.budget import Budget
from skimp.passes.finetune import Finetune
from skimp.passes.project import Project
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify


def bert():
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            intermediate_size=128,
        )
    ).eval()  # fmt: skip


def data(count=4, length=8):
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(2, 60, (8, length), generator=g) for _ in range(count)]
    return [dict(input_ids=r, attention_mask=torch.ones_like(r), labels=r[:, 0] % 2) for r in rows]


def loss(outputs, batch):
    return torch.nn.functional.cross_entropy(outputs.logits, batch["labels"])


PASSES = [
    Project(tokens=128, chunk=64, batch=32, overhead=1.0),
    Relufy(),
    Sparsify(tokens=128, chunk=64, batch=32),
    Finetune(steps=2),
    Split(),
    Route(tokens=64, steps=5),
    Recover(steps=2, even=False),
    Budget("flops <= 0.9"),
]


def converted(**more):
    options = dict(passes=PASSES, expert_size=4, router_width=4, projections=True, loss=loss)
    return skimp.convert(bert(), data(), **options | more)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
