"""The backend: one graph, few compilations, and a knob that needs none."""

import copy

import pytest
import skimp
import torch
from skimp.passes.convert import prepare
from skimp.passes.lift import blocks
from torch._dynamo.backends.registry import list_backends
from torch._dynamo.utils import counters

transformers = pytest.importorskip("transformers")


def converted():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    gm, _ = prepare(transformers.BertModel(config).eval(), inputs(2, 5), expert_size=4)
    for b in blocks(gm).values():
        b.act = "relu"
    return gm


def inputs(batch, length):
    tokens = torch.randint(2, 60, (batch, length), generator=torch.Generator().manual_seed(1))
    return dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))


def test_it_is_listed():
    assert "skimp" in list_backends(exclude_tags=None)


@torch.no_grad()
def test_five_shapes_two_compilations_and_tau_at_run_time():
    torch._dynamo.reset()
    counters.clear()
    gm = converted()
    fast = torch.compile(gm, backend="skimp", fullgraph=True, dynamic=True)
    for shape in [(2, 6), (3, 9), (1, 16), (8, 4), (5, 33)]:
        batch = inputs(*shape)
        want, got = gm(**batch)[0], fast(**batch)[0]
        assert (got - want).norm() <= 1e-4 * want.norm()
    assert 1 <= counters["stats"]["unique_graphs"] <= 2
    assert not counters["graph_break"]
    before = counters["stats"]["unique_graphs"]
    batch = inputs(4, 12)
    outputs = []
    for tau in (0.0, 0.3, 0.9):
        skimp.set_tau(fast, tau)
        want, got = gm(**batch)[0], fast(**batch)[0]
        assert (got - want).norm() <= 1e-4 * want.norm()
        outputs.append(got.clone())
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-3)  # the knob does something
    assert counters["stats"]["unique_graphs"] == before


@torch.no_grad()
def test_bfloat16_at_tau_zero_is_the_dense_model():
    gm = converted().to(torch.bfloat16)
    skimp.set_tau(gm, 0.0)
    dense = copy.deepcopy(gm).float()
    for b in blocks(dense).values():
        b.dense = True
    batch = inputs(4, 12)
    want, got = dense(**batch)[0], gm(**batch)[0].float()
    assert (got - want).norm() <= 2e-2 * want.norm()
