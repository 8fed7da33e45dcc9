"""Smaller models, other vocabularies, the sparse self, and several at once: text stays the same."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from skimp.ir.block import DynkFFN  # noqa: E402
from skimp.ir.errors import SkimpError, TargetError  # noqa: E402
from skimp.runtime.tree.assistant import Assistant  # noqa: E402
from skimp.runtime.tree.engine import Engine  # noqa: E402
from skimp.runtime.tree.fused import FusedTarget  # noqa: E402
from skimp.runtime.tree.generate import TreeDecoder  # noqa: E402
from skimp.runtime.tree.hf import HFTarget  # noqa: E402
from skimp.runtime.tree.ngram import NGram  # noqa: E402
from skimp.runtime.tree.policy import CostPolicy  # noqa: E402
from skimp.runtime.tree.published import CastPolicy, FixedPolicy  # noqa: E402
from skimp.runtime.tree.sparse import SparseSelf  # noqa: E402
from skimp.runtime.tree.words import Words  # noqa: E402

from .drafters import Given, Scripted  # noqa: E402
from .models import llama  # noqa: E402
from .test_engine import flat, prompts_of, reference  # noqa: E402

NEW = 48


class Costly(Given):
    """Given prices for drafters that measure."""

    def prepare(self, target, lengths):
        target.verify([torch.tensor([1])] * len(lengths), [torch.tensor([-1])] * len(lengths))


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def texts(model):
    prompts = prompts_of(8)
    return prompts, reference(model, prompts, NEW)


def assistant(model, words=None, seconds=1e-3, **options):
    target = HFTarget(model)
    words = words or Words.same(61, target.vocabulary)
    return Assistant(target, words, costs=Costly(lambda n: seconds), **options)


def run(model, drafters, prompts, policy=CostPolicy, new=NEW, target=None, **options):
    prices = Given(flat)
    engine = Engine(
        target or HFTarget(model), drafters, policy(drafters, prices, **options), prices
    )
    return engine.run(prompts, limits=[new] * len(prompts)), engine.report


POLICIES = {
    "lambda": (CostPolicy, {}),
    "cast": (CastPolicy, {}),
    "fixed": (FixedPolicy, dict(size=12, depth=4, width=3)),
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_smaller_model_changes_speed_alone(policy, model, texts):
    prompts, want = texts
    kind, options = POLICIES[policy]
    small = llama(layers=1, seed=9)
    for rows in (slice(0, 1), slice(1, 2), slice(2, 6)):
        got, report = run(model, [assistant(small)], prompts[rows], kind, **options)
        assert got == want[rows]
        assert report.steps < NEW


def test_a_model_that_drafts_for_itself_is_right_all_the_way(model, texts):
    prompts, want = texts
    drafter = assistant(model, width=1)
    got, report = run(model, [drafter], prompts[:3], FixedPolicy, size=6, depth=5, width=1)
    assert got == want[:3]
    assert report.steps == 8  # 47 tokens, 6 at a time


def test_what_others_drafted_is_caught_up_with(model, texts):
    """After every commit the small model's next proposals are those of its own fresh run."""
    prompts, want = texts
    small = llama(layers=1, seed=9)
    drafter = assistant(small)
    seen = []
    commit = drafter.commit

    def checked(trees, accepted, hidden):
        commit(trees, accepted, hidden)
        for row in range(len(trees)):
            length = drafter.target.lengths()[row] + len(drafter._rows[row].behind)
            seen.append(length)
            assert not drafter._rows[row].last

    drafter.commit = checked
    expand = drafter.expand

    def compared(trees, nodes):
        found = expand(trees, nodes)
        if {n for _, n in nodes} == {0} and len(trees) == 2:
            for (row, _), children in zip(nodes, found, strict=True):
                ids = torch.tensor([prompts[row] + told[row]])
                with torch.no_grad():
                    best = small(ids).logits[0, -1].topk(4).indices.tolist()
                assert children.tokens == best
        return found

    drafter.expand = compared
    told = [[], []]
    drafters = [NGram(), drafter, Scripted(want[:2], "random", width=2)]
    prices = Given(flat)
    engine = Engine(HFTarget(model), drafters, CostPolicy(drafters, prices), prices)
    got = engine.run(prompts[:2], limits=[NEW] * 2, stream=lambda row, new: told[row].extend(new))
    assert got == want[:2]
    assert seen
    assert max(seen) > NEW


@pytest.mark.parametrize("size", [48, 61, 96])
def test_padded_and_smaller_vocabularies(size, model, texts):
    prompts, want = texts
    got, report = run(model, [assistant(llama(vocabulary=size, layers=1, seed=2))], prompts[:4])
    assert got == want[:4]
    assert report.accepted >= 0


def words_of(tokens):
    """A tokenizer of whole words."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {w: i for i, w in enumerate(tokens)}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]")


def test_another_tokenizer_drafts_the_tokens_that_both_have(model, texts):
    ours = words_of([f"w{i}" for i in range(60)] + ["[UNK]"])
    theirs = words_of(["[UNK]"] + [f"w{i}" for i in range(59, 19, -1)] + ["other"] * 1)
    words = Words.between(ours, theirs, (61, 42))
    assert words.back[1] == 59
    assert words.back[40] == 20
    assert words.back[41] == -1  # 'other' is no word of ours
    assert words.there[59] == (1,)
    assert words.there[3] == (0,)  # unknown there
    prompts, want = texts
    small = llama(vocabulary=42, layers=1, seed=4)
    for policy, options in (POLICIES["lambda"], POLICIES["fixed"]):
        got, _ = run(model, [assistant(small, words)], prompts[:2], policy, **options)
        assert got == want[:2]
    assert all(
        t < 0 or ours.convert_ids_to_tokens(t) == theirs.convert_ids_to_tokens(i)
        for i, t in enumerate(words.back.tolist())
    )
    with pytest.raises(TargetError, match=r"shares 1 of 61 tokens"):
        Words.between(ours, words_of(["[UNK]", "a", "b"]), (61, 3))


def test_a_drafter_that_is_shorter_than_the_text(model, texts):
    prompts, want = texts
    small = llama(layers=1, seed=9, max_position_embeddings=24)
    got, _ = run(model, [assistant(small)], prompts[:4])
    assert got == want[:4]


def test_a_drafter_is_loaded_from_a_folder_or_refused(model, texts, tmp_path):
    prompts, want = texts
    llama(layers=1, seed=9).save_pretrained(tmp_path / "small")
    words_of([f"w{i}" for i in range(60)] + ["[UNK]"]).save_pretrained(tmp_path / "small")
    options = dict(prices=Given(flat), target=HFTarget(model))
    decoder = TreeDecoder(model, draft=f"ngram,model:{tmp_path / 'small'}", **options)
    assert decoder.run(prompts[:2], limits=[NEW] * 2) == want[:2]
    assert decoder.engine.drafters[1].name == f"model {tmp_path / 'small'}"
    with pytest.raises(SkimpError, match="cannot be loaded"):
        TreeDecoder(model, draft="model:/nowhere", **options)
    with pytest.raises(SkimpError, match="the same drafter twice"):
        TreeDecoder(model, draft="ngram,ngram", **options)


def parted(model):
    """The model's networks as experts of 8, routers at random."""
    found = {}
    for i, layer in enumerate(model.model.layers):
        f, order = layer.mlp, torch.randperm(48, generator=torch.Generator().manual_seed(i))
        found[i] = DynkFFN(
            f.up_proj.weight[order], None, f.gate_proj.weight[order], None,
            f.down_proj.weight.T[order], None, expert_size=8, act="silu", router_width=4,
        )  # fmt: skip
    return found


def sparse(target, taus, seconds=lambda tau: 1e-3):
    costs = [Costly(lambda n, t=t: seconds(t)) for t in taus]
    return SparseSelf(target, lambda rows: 0.01, taus=taus, costs=costs)


@pytest.mark.parametrize("kind", ["fused", "transformers"])
def test_the_sparse_self_shares_the_cache_and_changes_speed_alone(kind, model, texts):
    prompts, want = texts
    blocks = parted(model)
    if kind == "fused":
        target = FusedTarget(model, blocks=blocks)
    else:
        target = HFTarget(model, {f"model.layers.{i}.mlp": b for i, b in blocks.items()})
    for batch, taus in ((1, [0.0]), (1, [0.1, 0.9]), (3, [0.5])):
        drafter = sparse(target, taus)
        got, report = run(model, [drafter], prompts[:batch], target=target)
        assert got == want[:batch]
        if taus == [0.0]:  # nothing is left out: always right
            kind, options = POLICIES["fixed"]
            got, report = run(model, [drafter], prompts[:batch], kind, target=target, **options)
            assert got == want[:batch]
            assert report.tokens_per_step > 3.8  # of 4, but for the last step
    got, _ = run(model, [sparse(target, [0.5]), NGram()], prompts[:2], target=target)
    assert got == want[:2]
    assert isinstance(model.model.layers[0].mlp, type(llama().model.layers[0].mlp))


def test_the_threshold_follows_what_it_is_worth(model, texts):
    """Exact and dear against wrong and cheap, with prices either way."""
    prompts, _ = texts
    target = HFTarget(model, {f"model.layers.{i}.mlp": b for i, b in parted(model).items()})
    for seconds, want in ((lambda tau: 1e-3, 0.0), (lambda tau: 1e-5 if tau else 0.5, 0.9)):
        drafter = sparse(target, [0.0, 0.9], seconds)
        for prompt in prompts[:2]:
            run(model, [drafter], [prompt], target=target)
        if drafter._steps % 24 == 0:  # the run ended in the step in which the other one is tried
            drafter._choose()
        assert drafter.tau == want


def test_a_model_without_experts_has_no_sparse_self(model):
    with pytest.raises(TargetError, match="has no experts to leave out: convert it"):
        TreeDecoder(model, draft="sparse")


def test_each_of_several_is_asked_for_what_it_is_worth(model, texts):
    """A good drafter and a bad one; then the good one at a price that nothing earns."""
    prompts, want = texts
    found = {}
    for price in (1e-6, 1.0):
        good, bad = Scripted(want, seconds=price), Scripted(want, "wrong", seconds=1e-6)
        bad.name = "bad"
        got, report = run(model, [good, bad], prompts)
        assert got == want
        found[price] = good.calls, report.tokens_per_step
    assert found[1e-6][1] > 4
    assert found[1.0][0] < found[1e-6][0]
    assert found[1.0][1] < 1.5
