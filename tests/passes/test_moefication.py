"""MoEfication's routers and fixed k, as options of the same passes."""

import copy

import pytest
import skimp
import torch
from skimp.ir import DynkFFN
from skimp.ir.op import select
from skimp.passes.base import Context, capture
from skimp.passes.budget import Budget, set_top, taus_at
from skimp.passes.convert import prepare
from skimp.passes.lift import blocks
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy
from skimp.runtime.hub.quantizer import describe, empty_block
from torch.nn import functional as F

hf = pytest.importorskip("transformers")


def bert(seed=0):
    torch.manual_seed(seed)
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        vocab_size=64, initializer_range=0.2,
    )  # fmt: skip
    return hf.BertModel(config).eval()


def data(count=5):
    g = torch.Generator().manual_seed(0)
    made = [torch.randint(2, 60, (8, 6 + i), generator=g) for i in range(count)]
    return [dict(input_ids=t, attention_mask=torch.ones_like(t)) for t in made]


STEPS = [Relufy(), Split(), Route(steps=150, predicts="activations")]


@pytest.fixture(scope="module")
def static():
    steps = [*STEPS, Budget("flops <= 0.6", static=True)]
    return skimp.convert(bert(), data(), passes=steps, expert_size=4, router_width=4)


def test_every_row_runs_the_same_number_and_the_budget_holds(static):
    inputs = capture(static.model, data())
    found = blocks(static.model)
    for name, block in found.items():
        k = select(block.router(inputs[name]), block.tau).sum(-1)
        assert 0 < block.router.top < block.experts
        assert set(k.tolist()) == {block.router.top}
    assert static.history[-1]["stats"]["tried"][-1]["flops"] <= 0.6


def test_those_that_run_score_best(static):
    block = next(iter(blocks(static.model).values()))
    x = torch.randn(7, 32)
    run = select(block.router(x), block.tau)
    scores = block.router.score(x)
    least, most = scores.masked_fill(~run, 2).amin(-1), scores.masked_fill(run, -1).amax(-1)
    assert bool((least >= most).all())


def test_a_threshold_takes_its_place_and_zero_is_dense(static):
    model, batch = copy.deepcopy(static.model), data()[1]
    skimp.set_tau(model, 0.0)
    dense = copy.deepcopy(model)
    for b in blocks(dense).values():
        b.dense = True
    assert torch.allclose(model(**batch)[0], dense(**batch)[0], atol=1e-5)
    skimp.set_tau(model, 0.5)
    x = torch.randn(50, 32)
    k = [select(b.router(x), b.tau).sum(-1) for b in blocks(model).values()]
    assert max(len(set(n.tolist())) for n in k) > 1


def test_the_router_learns_what_is_active():
    gm, _ = prepare(bert(), data()[0], expert_size=4, router_width=8)
    gm = Relufy().run(gm, None).gm
    context = Context(copy.deepcopy(gm), data(), data())
    gm = Route(steps=300, predicts="activations").run(gm, context).gm
    x = capture(gm, data())
    for name, block in blocks(gm).items():
        h = block.hidden(x[name]).unflatten(-1, (block.experts, 4))
        labels = h.sum(-1) / h.sum(-1).max()
        got = F.binary_cross_entropy(block.router.score(x[name]), labels)
        mean = labels.mean(0).expand_as(labels)
        assert got < F.binary_cross_entropy(mean, labels)  # better than each expert's average
        assert bool((block.router.score(x[name]) <= 1).all())


def test_no_other_prediction():
    gm, _ = prepare(bert(), data()[0], expert_size=4, router_width=4)
    with pytest.raises(ValueError, match=r"'norm'; it is one of \['activations', 'norms'\]"):
        Route(predicts="norm").run(gm, Context(gm, data(), data()))


def test_saved_and_loaded_it_selects_the_same(static, tmp_path):
    batch = data()[2]
    skimp.save(static.model, tmp_path, batch)
    again = skimp.load(tmp_path, bert(seed=3))
    assert torch.equal(again(**batch)[0], static.model(**batch)[0])
    for a, b in zip(blocks(again).values(), blocks(static.model).values(), strict=True):
        assert (a.router.predicts, a.router.top) == ("activations", b.router.top)


def test_a_folder_of_transformers_describes_it(static):
    node = next(n for n in static.model.graph.nodes if "skimp.site" in n.meta)
    block = static.model.get_submodule(node.target)
    spec = describe(block, node.meta["skimp.site"], node.meta["skimp.place"])
    again = empty_block(spec, torch.float32)
    assert (again.router.predicts, again.router.top) == ("activations", block.router.top)


def test_compiled_it_is_the_same(static):
    batch = data()[3]
    fast = torch.compile(static.model, backend="skimp", dynamic=True)
    want = static.model(**batch)[0]
    assert torch.allclose(fast(**batch)[0], want, atol=1e-4)


def test_recovery_and_thresholds_look_at_the_scores_themselves():
    gm, _ = prepare(bert(), data()[0], expert_size=4, router_width=4)
    context = Context(copy.deepcopy(gm), data(), data())
    gm = Route(steps=20).run(gm, context).gm
    first = next(iter(blocks(gm)))  # what later ones read depends on what it skips
    (want,) = taus_at(gm, context, [0.5])
    set_top(gm, 0.5)
    assert taus_at(gm, context, [0.5])[0][first] == want[first]
    stats = Recover(steps=2).run(gm, context).stats
    assert stats["steps"] == 2
    assert all(isinstance(b, DynkFFN) and b.router.top == 8 for b in blocks(gm).values())
