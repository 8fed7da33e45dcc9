"""Gated decoders: the whole recipe on a small Llama, learnt from the logits of the dense one."""

import copy

import pytest
import skimp
import torch
from skimp.ir.text import BlockLine, parse
from skimp.passes.allot import tau_at
from skimp.passes.base import Context, kl_divergence, next_tokens
from skimp.passes.budget import Budget, set_top
from skimp.passes.convert import prepare
from skimp.passes.gate_route import GateRoute
from skimp.passes.lift import blocks
from skimp.passes.parts import Parts
from skimp.passes.project import Project
from skimp.passes.quality import evaluate
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


def gate_routed():
    return skimp.convert(llama(), data(), passes=[GateRoute(), Budget("flops <= 0.7")])


@torch.no_grad()
def test_the_gate_is_the_router():
    model, batch = llama(), data()[0]
    done = gate_routed()
    assert done.history[0]["stats"] == dict.fromkeys(blocks(done.model), "gate")
    for name, block in blocks(done.model).items():
        assert str(BlockLine.of(name, block)) == (
            f"{name}: dynk_ffn<gated silu, 64 -> 48 -> 64, 48 x 1, router gate, "
            f"tau {float(block.tau)!r}, f32>"
        )
        assert parse(str(BlockLine.of(name, block))) == BlockLine.of(name, block)
        assert not [n for n, _ in block.named_parameters() if "router" in n]
    # two thirds of a network follow the gate: 1/3 + 2/3 k/E
    assert 0.68 < done.history[-1]["stats"]["tried"][-1]["flops"] <= 0.7
    got = evaluate(done.model, Context(done.teacher, data(), data()), data())
    share = sum(got.experts.values()) / 2 / 48
    assert got.flops == pytest.approx((1 + 2 * share) / 3)
    want = done.model(**batch)[0]
    for block in blocks(done.model).values():
        block.register_forward_hook(cats)
    torch.testing.assert_close(done.model(**batch)[0], want)
    skimp.set_tau(done.model, 0.0)
    torch.testing.assert_close(done.model(**batch)[0], model(**batch)[0], atol=1e-4, rtol=1e-4)
    assert evaluate(done.model, Context(done.teacher, data(), data()), data()).flops == 1


def cats(block, args, _):
    """What CATS (arXiv 2404.08763) computes, in its own terms."""
    gate = F.silu(args[0] @ block.w_gate.T)
    gate = torch.where(gate.abs() >= block.tau, gate, 0)
    return (gate * (args[0] @ block.w_in.T)) @ block.w_out


def test_gates_learn_as_parts_of_their_neurons():
    gm, _ = prepare(llama(), data()[0])
    gm = GateRoute().run(gm, None).gm
    block, x = next(iter(blocks(gm).values())), torch.randn(9, 64)
    training = _Gated(block)
    training.share = 0.4
    block.requires_grad_()
    y = training(x)
    block.tau.copy_(tau_at(block.compared(x), 0.4))
    assert block.selected(x).float().mean() == pytest.approx(0.4, abs=0.01)
    torch.testing.assert_close(y, block(x))
    y.sum().backward()
    learnt = block.w_gate.grad.clone()
    block.zero_grad()
    block(x).sum().backward()  # through the op
    torch.testing.assert_close(block.w_gate.grad, learnt)
    assert (learnt[~block.selected(x).any(0)] == 0).all()
    assert training.error == 0
    trained = Recover(share=0.4, steps=2).run(gm, Context(gm, data(), data(), next_tokens)).gm
    assert not torch.equal(next(iter(blocks(trained).values())).w_gate, llama_gate())


def llama_gate():
    return llama().model.layers[0].mlp.gate_proj.weight


@torch.no_grad()
def test_gate_routed_models_are_saved_and_compiled(tmp_path):
    done, batch = gate_routed(), data()[0]
    want = done.model(**batch)[0]
    skimp.save(done.model, tmp_path / "own", batch)
    assert torch.equal(skimp.load(tmp_path / "own", llama())(**batch)[0], want)
    skimp.save_pretrained(done.model, llama(), tmp_path / "hub", batch)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    torch.testing.assert_close(loaded(**batch, use_cache=False).logits, want)
    skimp.unconvert(tmp_path / "hub", tmp_path / "dense")
    dense = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(dense(**batch).logits, llama()(**batch).logits)
    fast = torch.compile(loaded, backend="skimp")
    for rows in (1, 6):
        few = {k: v[:rows] for k, v in batch.items()}
        torch.testing.assert_close(fast(**few, use_cache=False).logits, want[:rows])


def test_a_gate_has_no_static_selection():
    model = gate_routed().model
    with pytest.raises(ValueError, match="has no static selection"):
        set_top(model, 0.5)
    with pytest.raises(ValueError, match=r"outside \[0, inf\]"):
        skimp.set_tau(model, -1.0)
    skimp.set_tau(model, 7.0)


def test_networks_without_a_gate_keep_their_routers():
    torch.manual_seed(0)
    config = dict(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=64,
    )
    done = skimp.convert(hf.BertModel(hf.BertConfig(**config)).eval(), data(), passes=[GateRoute()])
    assert not done.history[0]["modified"]
    assert list(done.history[0]["stats"].values()) == ["no gate, so a router must learn"]


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
        out, states = _with_states(
            model, names, batch, Parts(model, segments) if segments > 1 else None
        )
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
