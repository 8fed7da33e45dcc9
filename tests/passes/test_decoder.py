"""Gated decoders: the whole recipe on a small Llama, learnt from the logits of the dense one."""

import copy

import pytest
import skimp
import torch
from skimp.passes.base import Context, kl_divergence, next_tokens
from skimp.passes.budget import Budget
from skimp.passes.convert import prepare
from skimp.passes.lift import blocks
from skimp.passes.project import Project
from skimp.passes.recover import Recover, _Gated, _with_states
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify
from skimp.runtime.language import best_neurons, perplexity
from torch.nn import functional as F

hf = pytest.importorskip("transformers")


def llama(seed=0):
    torch.manual_seed(seed)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, intermediate_size=48, initializer_range=0.3,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config).eval()


def data(count=5):
    g = torch.Generator().manual_seed(0)
    return [
        dict(
            input_ids=(t := torch.randint(2, 60, (6, 7 + i), generator=g)),
            attention_mask=torch.ones_like(t),
        )
        for i in range(count)
    ]


def quick(**clamp):
    return [
        Project(tokens=400, chunk=200, batch=64),
        *([] if clamp else [Relufy()]),
        Sparsify(tokens=400, chunk=200, batch=64, **clamp),
        Split(),
        Route(tokens=200, steps=10),
        Recover(steps=3, segments=3),
        Budget("flops <= 0.85"),
    ]


@pytest.mark.parametrize(("clamp", "act"), [({}, "relu"), ({"clamp": -10.0}, "silu")])
def test_the_whole_recipe_on_a_llama(clamp, act):
    done = skimp.convert(
        llama(), data(), passes=quick(**clamp), expert_size=4, router_width=4, projections=True
    )
    found = blocks(done.model)
    ffns = [b for b in found.values() if not b.linear]
    assert [(b.gated, b.act) for b in ffns] == [(True, act)] * 2
    assert len(found) == 10
    tried = done.history[-1]["stats"]["tried"][-1]
    assert tried["flops"] <= 0.85
    assert tried["distance"] > 0  # nats per token, not one minus cosine
    assert tried["distance"] != pytest.approx(1 - tried["cosine"])


def test_divergence_is_the_definition_and_has_its_gradient():
    torch.manual_seed(0)
    got, want = torch.randn(10, 7, requires_grad=True), torch.randn(10, 7)
    p = want.softmax(-1)
    by_hand = (p * (p.log() - got.softmax(-1).log())).sum(-1).mean()
    found = kl_divergence(got, want, rows=3)
    assert torch.allclose(found, by_hand)
    (a,), (b,) = torch.autograd.grad(found, got), torch.autograd.grad(by_hand, got)
    assert torch.allclose(a, b, atol=1e-6)
    assert float(kl_divergence(want, want)) == pytest.approx(0, abs=1e-6)


def test_checkpointed_gradients_are_the_same():
    gm, _ = prepare(llama(), data()[0], expert_size=4, router_width=4)
    batch = data()[0]

    def gradients(segments):
        model = copy.deepcopy(gm).requires_grad_(True)
        for name, block in blocks(model).items():
            model.set_submodule(name, _Gated(block))
        names = list(blocks(gm))
        out, states = _with_states(model, names, batch, segments)
        loss = next_tokens(out, batch).square().mean() + sum(
            s.square().mean() for s in states.values()
        )
        loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for a, b in zip(gradients(1), gradients(4), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def test_perplexity_is_that_of_the_models_own_loss():
    model, batch = llama(), data()[0]
    loss = model(**batch, labels=batch["input_ids"]).loss
    assert perplexity(model, [batch]) == pytest.approx(float(loss.exp()), rel=1e-4)


@torch.no_grad()
def test_best_neurons_keeps_the_strongest():
    gm, _ = prepare(llama(), data()[0], expert_size=4, router_width=4)
    block, x = next(iter(blocks(gm).values())), torch.randn(5, 64)
    h = block.hidden(x)
    order = (h.abs() * block.w_out.norm(dim=1)).argsort(-1, descending=True)
    mask = F.one_hot(order[:, :24], 48).sum(1)
    with best_neurons(gm, 0.5):
        assert torch.allclose(block(x), (h * mask) @ block.w_out, atol=1e-5)
    assert not block.dense


def test_a_divergence_budget_needs_logits():
    gm, _ = prepare(llama(), data()[0], expert_size=4, router_width=4)
    with pytest.raises(ValueError, match="needs a language model's logits"):
        Budget("kl <= 0.1").run(gm, Context(gm, data(), data()))
