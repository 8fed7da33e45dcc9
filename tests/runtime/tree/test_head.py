"""Heads: what they compute, that training teaches them, and that text stays what it is."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

pytest.importorskip("transformers")

from skimp.cli import app
from skimp.ir.errors import ArtefactError, CalibrationError, TargetError
from skimp.passes.base import silent
from skimp.runtime.tree.fused import FusedTarget
from skimp.runtime.tree.generate import TreeDecoder
from skimp.runtime.tree.head import Head, HeadDrafter, HeadSizes
from skimp.runtime.tree.hf import HFTarget
from skimp.runtime.tree.node import Tree
from skimp.runtime.tree.train import Recipe, Written, train, write
from transformers import PreTrainedTokenizerFast

from .models import llama

PROMPTS = [[5, 9, 33], [7] * 80, [1, 2], [60, 3, 8, 8]]
QUICK = Recipe(
    minutes=10, words=61, rows=16, new=24, temperature=1.0, window=16, batch=8, lr=1e-2, steps=150
)


@pytest.fixture(scope="module")
def target():
    return FusedTarget(llama(seed=3))


def made(target, words=None, **sizes):
    words = torch.arange(target.vocabulary) if words is None else words
    return Head(HeadSizes.of(target, **sizes), words)


def states(head, target, tokens, features):
    """The head's own states of a text, by its plain form."""
    n = len(tokens)
    embedded = target.weights.embedding[torch.tensor(tokens)][None]
    return head(embedded, features[None], *target.tables(n))[0]


def text(target, tokens):
    """The target's hidden states of a text."""
    target.prefill([tokens])
    return target.prompts[0].clone()


@torch.no_grad()
def test_drafts_are_those_of_the_plain_form(target):
    head = made(target, words=torch.tensor([3, 7, 8, 20, 33, 59]), d_ff=24)
    drafter = HeadDrafter(head, target, width=6, dtype=torch.float32)
    prompt, root, child, grandchild, other = PROMPTS[1] + [4, 2], 11, 20, 7, 33
    features = text(target, prompt)
    target.prefill([prompt])
    drafter.begin([prompt], features[-1:])
    tree = Tree.of(root)
    for token, parent in ((child, 0), (other, 0), (grandchild, 1)):
        tree.add(parent, token, 0.5)

    def check(found, tokens, read):
        got = states(head, target, tokens, read)[-1]
        law = (got @ target.weights.head[head.words].T).softmax(-1)
        want = law.sort(descending=True)
        assert found.tokens == head.words[want.indices][: len(found.tokens)].tolist()
        assert found.chances == pytest.approx(want.values.tolist()[: len(found.chances)], rel=1e-3)
        return got

    (found,) = drafter.expand([tree], [(0, 0)])
    own = check(found, [*prompt[1:], root], features)
    a, b = drafter.expand([tree], [(0, 2), (0, 1)])
    below = torch.cat([features, own[None]])
    check(a, [*prompt[1:], root, other], below)
    own = check(b, [*prompt[1:], root, child], below)
    (found,) = drafter.expand([tree], [(0, 3)])
    check(found, [*prompt[1:], root, child, grandchild], torch.cat([below, own[None]]))

    # what was accepted is read again with the target's states
    more = text(target, [*prompt, root, child])
    drafter.commit([tree], [[0, 1]], [more[-2:]])
    tree = Tree.of(59)
    (found,) = drafter.expand([tree], [(0, 0)])
    check(found, [*prompt[1:], root, child, 59], more)


@torch.no_grad()
def test_rows_that_wait_and_rows_that_end(target):
    """Steps in which nothing is drafted, and a batch that shrinks, leave the same drafts."""
    head = made(target)
    alone = HeadDrafter(head, target, dtype=torch.float32)
    drafter = HeadDrafter(head, target, dtype=torch.float32)
    texts = [[5, 9, 33], [8] * 70, [1]]
    features = [text(target, t) for t in texts]
    target.prefill(texts)
    drafter.begin(texts, torch.stack([f[-1] for f in features]))
    trees = [Tree.of(2), Tree.of(3), Tree.of(4)]
    drafter.expand(trees, [(2, 0)])
    trees[2].add(0, 50, 0.5)
    late = drafter.expand(trees, [(1, 0), (2, 1)])  # one row catches up, another goes on
    target.prefill(texts[2:])
    alone.begin(texts[2:], features[2][-1:])
    alone.expand(trees[2:], [(0, 0)])
    assert alone.expand(trees[2:], [(0, 1)]) == late[1:]
    for t, tree in zip(texts, trees, strict=True):
        t.append(tree.tokens[0])
    features = [text(target, t) for t in texts]
    drafter.commit(trees, [[0], [0], [0]], [f[-1:] for f in features])
    drafter.drop([0])
    trees = [Tree.of(6), Tree.of(7)]
    got = drafter.expand(trees, [(0, 0), (1, 0)])
    for t, tree, found in zip(texts[1:], trees, got, strict=True):
        f = text(target, t)
        alone.begin([t], f[-1:])
        (want,) = alone.expand([tree], [(0, 0)])
        assert found == want


@pytest.mark.parametrize("mode", ["lambda", "eagle2"])
def test_text_stays_what_it_is(target, mode):
    model = llama(seed=3)
    plain = TreeDecoder(model, mode="plain", target=target, profiling=0.1)
    decoder = TreeDecoder(model, mode=mode, target=target, profiling=0.1)
    decoder.engine.drafters = decoder.engine.policy.drafters = [HeadDrafter(made(target), target)]
    limits = [40, 25, 33, 40]
    want = [plain.run([p], limits=[n])[0] for p, n in zip(PROMPTS, limits, strict=True)]
    assert decoder.run(PROMPTS, limits=limits) == want


def test_training_teaches_it_and_goes_on_where_it_was(target, tmp_path):
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(61, (64, 4), generator=g).tolist()
    short = replace(QUICK, steps=2)
    before = train(target, prompts, tmp_path / "short", short)
    after = train(target, prompts, tmp_path / "long", QUICK)
    assert after["loss"] < 0.8 * before["loss"]
    assert after["first"] > before["first"]
    assert after["covered"] == 1.0
    again = train(target, prompts, tmp_path / "long", QUICK)
    assert again["steps"] == after["steps"]
    assert again["loss"] == pytest.approx(after["loss"], rel=1e-6)
    with pytest.raises(CalibrationError, match="minutes"):
        train(target, prompts, tmp_path / "long", replace(QUICK, minutes=9))
    loaded = Head.load(tmp_path / "long", target)
    assert torch.equal(loaded.words, torch.arange(61))
    with pytest.raises(ArtefactError, match="another model"):
        Head.load(tmp_path / "long", FusedTarget(llama(seed=4)))


def test_damaged_files_and_other_targets(target, tmp_path):
    head = made(target)
    path = head.save(tmp_path, target, {})
    assert HeadDrafter.load(tmp_path, target).words.tolist() == list(range(61))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtefactError, match=r"head\.safetensors is no head"):
        Head.load(path, target)
    with pytest.raises(ArtefactError, match="no head"):
        Head.load(tmp_path / "nowhere", target)
    with pytest.raises(TargetError, match="generated C"):
        HeadDrafter(head, HFTarget(llama()))
    with pytest.raises(CalibrationError, match="two prompts"):
        train(target, [[1]], tmp_path, QUICK)


def test_the_command_and_its_head_in_generate(tmp_path, capsys):
    model, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    llama(vocabulary=300, seed=3).save_pretrained(model)
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({str(i): i for i in range(300)}, unk_token="0")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="2").save_pretrained(model)
    prompts.write_text("\n".join(f"{i} {i + 7} 9" for i in range(64)))
    options = [str(model), "--out", str(tmp_path / "head"), "--prompts", str(prompts), "--json"]
    app(["train-drafter", *options, "--minutes", "0.05"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["loss"] < 100
    options = [str(model), "--prompt", "5 6 7", "--max-tokens", "12", "--json"]
    texts = []
    for more in (["--mode", "plain"], ["--draft", f"ngram,head:{tmp_path / 'head'}"]):
        app(["generate", *options, *more], standalone_mode=False)
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1]


def test_a_vocabulary_of_what_the_model_uses(target, tmp_path):
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(61, (64, 4), generator=g).tolist()
    found = train(target, prompts, tmp_path, replace(QUICK, steps=2, words=20))
    head = Head.load(tmp_path, target)
    assert len(head.words.unique()) == 20
    assert found["covered"] > 20 / 61
    assert found["bytes"] == (tmp_path / "head.safetensors").stat().st_size


def test_of_a_long_prompt_the_middle_is_left_out(target, tmp_path):
    prompts = [list(range(40)), [7, 8]]
    recipe = replace(QUICK, longest=7, new=3)
    files = write(target, prompts, tmp_path, recipe, {"writing": 0.0}, frozenset(), silent)
    written = Written.read(files)
    ends = [0, *(written.first.nonzero().flatten().tolist()[1:]), len(written.tokens)]
    given = [written.tokens[a:b][~written.own[a:b]].tolist() for a, b in pairwise(ends)]
    assert sorted(given) == [[0, 1, 2, 36, 37, 38, 39], [7, 8]]
