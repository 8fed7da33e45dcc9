"""Converted models for the export tests, without training."""

import copy

import skimp
import torch
import transformers as hf
from skimp.passes.base import Context
from skimp.passes.convert import prepare
from skimp.passes.project import Project
from skimp.passes.sparsify import Relufy

SMALL = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64
)


def ids(batch=3, length=6, most=60):
    g = torch.Generator().manual_seed(batch * 100 + length)
    tokens = torch.randint(2, most, (batch, length), generator=g)
    return dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))


def converted(model, inputs, tau=0.3, **sizes):
    """What a conversion leaves: networks and projections are blocks, with random routers."""
    torch.manual_seed(0)
    gm, _ = prepare(model.eval(), inputs, projections=True, **sizes)
    gm = Relufy().run(gm, None).gm
    gm = Project(tokens=0).run(gm, Context(copy.deepcopy(gm), [inputs], [inputs])).gm
    skimp.set_tau(gm, tau)
    return gm


def small_bert(tau=0.3):
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(initializer_range=0.2, **SMALL))
    return converted(model, ids(), tau, expert_size=4, router_width=4)


def minilm(tau=0.3):
    """The embedded encoder, networks and projections converted."""
    from skimp.runtime.models import load_pretrained

    return converted(load_pretrained("minilm").model, ids(), tau)
