"""Experts where they are missed most: a separable problem, and what a graph makes of it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimp.ir.op import select
from skimp.passes.allot import STEPS, Options, allot, options
from skimp.passes.base import Context, capture
from skimp.passes.budget import taus_at
from skimp.passes.convert import prepare
from skimp.passes.lift import blocks
from skimp.passes.route import Route
from skimp.passes.sparsify import Relufy

hf = pytest.importorskip("transformers")


def falling(curve):
    """Errors that fall to zero as more experts run; a steep curve needs few of them."""
    return tuple((1 - s) ** curve for s in STEPS)


def spent(shares, found):
    return sum(shares[n] * found[n].flops for n in found) / sum(o.flops for o in found.values())


def lost(shares, found):
    """The sum of errors, between steps along straight lines."""
    total = 0.0
    for name, share in shares.items():
        errors = found[name].errors
        i = max(1, next(i for i, s in enumerate(STEPS) if s >= share - 1e-9))
        part = (share - STEPS[i - 1]) / (STEPS[i] - STEPS[i - 1])
        total += errors[i - 1] + part * (errors[i] - errors[i - 1])
    return total


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1, 12), st.floats(1e3, 1e7)), min_size=1, max_size=6),
    st.floats(0.05, 1.0),
)
def test_it_spends_what_it_may_and_loses_no_more_than_even_shares(made, share):
    found = {str(i): Options(falling(c), f) for i, (c, f) in enumerate(made)}
    shares = allot(found, share)
    assert spent(shares, found) == pytest.approx(share, rel=0.02)
    assert all(0 < s <= 1 for s in shares.values())
    assert lost(shares, found) <= lost(dict.fromkeys(found, share), found) + 0.02 * len(found)


def test_who_needs_more_gets_more():
    found = {"sparse": Options(falling(12), 1e6), "dense": Options(falling(1), 1e6)}
    shares = allot(found, 0.5)
    assert shares["dense"] > 0.6 > 0.4 > shares["sparse"]
    assert allot(found, 1.0) == {"sparse": 1.0, "dense": 1.0}
    little = allot(found, 0.01)  # less than the steps hold
    assert spent(little, found) == pytest.approx(0.01)


@torch.no_grad()
def test_thresholds_of_a_graph_run_what_was_allotted():
    torch.manual_seed(0)
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        vocab_size=64, initializer_range=0.3,
    )  # fmt: skip
    g = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 60, (16, 8), generator=g) for _ in range(4)]
    data = [dict(input_ids=t, attention_mask=torch.ones_like(t)) for t in ids]
    gm, _ = prepare(hf.BertModel(config).eval(), data[0], expert_size=4, router_width=8)
    gm = Relufy().run(gm, None).gm
    names = list(blocks(gm))
    gm.get_submodule(names[0]).w_in[8:] = 0  # six sevenths of the first never fire
    gm.get_submodule(names[0]).b_in[8:] = -1
    context = Context(copy.deepcopy(gm), data, data)
    with torch.enable_grad():
        gm = Route(steps=200).run(gm, context).gm
    found = options(gm, context)
    assert all(o.errors[-1] == pytest.approx(0, abs=1e-9) for o in found.values())
    (taus,) = taus_at(gm, context, [0.5], even=False)
    x = capture(gm, data)
    runs = {
        n: float(select(b.router(x[n]), torch.tensor(taus[n])).float().mean())
        for n, b in blocks(gm).items()
    }
    assert sum(runs.values()) / 3 == pytest.approx(0.5, abs=0.05)
    assert runs[names[0]] < 0.3 < min(runs[n] for n in names[1:])
