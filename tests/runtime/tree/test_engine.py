"""The loop: what is emitted is what plain decoding emits, whatever is drafted and verified."""

import pytest
import torch

pytest.importorskip("transformers")

from skimp.ir.errors import SkimpError
from skimp.runtime.tree.calibrate import Rate
from skimp.runtime.tree.engine import Engine
from skimp.runtime.tree.fused import FusedTarget
from skimp.runtime.tree.hf import HFTarget
from skimp.runtime.tree.ngram import NGram
from skimp.runtime.tree.policy import CostPolicy
from skimp.runtime.tree.published import CastPolicy, FixedPolicy
from skimp.runtime.tree.verify import Sampling

from .drafters import Given, Scripted
from .models import llama

NEW = 64
"""Tokens per prompt; 128 at night."""


def flat(rows):
    return 0.01 + 1e-5 * rows


def engine(model, drafters, policy=CostPolicy, curve=flat, **options):
    prices = Given(curve)
    return Engine(HFTarget(model), drafters, policy(drafters, prices, **options), prices)


def prompts_of(count, vocabulary=61, seed=0):
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=g).tolist()
    return [torch.randint(vocabulary, (n,), generator=g).tolist() for n in lengths]


def reference(model, prompts, new, eos=None):
    """What transformers itself generates, prompt by prompt."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
            eos_token_id=eos, pad_token_id=0,
        )  # fmt: skip
        found.append(out[0, len(prompt) :].tolist())
    return found


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def texts(model):
    prompts = prompts_of(20)
    return prompts, reference(model, prompts, NEW)


def ways(texts):
    """Drafters and policies by name."""
    return {
        "plain": ([], CostPolicy, {}),
        "n-gram": ([NGram()], CostPolicy, {}),
        "n-gram, fixed": ([NGram()], FixedPolicy, dict(size=24)),
        "n-gram, cast": ([NGram()], CastPolicy, {}),
        "chain": ([Scripted(texts, "perfect")], FixedPolicy, dict(size=6, depth=5, width=1)),
        "tree": ([Scripted(texts, "random", width=6), NGram()], CostPolicy, {}),
    }


WAYS = list(ways([]))


@pytest.mark.parametrize("way", WAYS)
def test_greedy_output_is_that_of_transformers_one_by_one_and_four_at_a_time(way, model, texts):
    prompts, want = texts
    for i in range(0, 20, 5):
        drafters, policy, options = ways(want[i : i + 1])[way]
        run = engine(model, drafters, policy, **options)
        assert run.run(prompts[i : i + 1], limits=[NEW]) == want[i : i + 1]
    for i in range(0, 20, 4):
        drafters, policy, options = ways(want[i : i + 4])[way]
        run = engine(model, drafters, policy, **options)
        assert run.run(prompts[i : i + 4], limits=[NEW] * 4) == want[i : i + 4]


@pytest.fixture(scope="module")
def many(model):
    prompts = prompts_of(200, seed=7)
    return prompts, reference(model, prompts, 128)


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("way", [*WAYS, "smaller model", "sparse self"])
def test_greedy_output_of_two_hundred_prompts(way, batch, model, many):
    """One by one on the generated step, four at a time on the model's own code."""
    from .test_drafters import assistant, parted, sparse

    prompts, want = many
    blocks = parted(model) if way == "sparse self" else {}
    named = {f"model.layers.{i}.mlp": b for i, b in blocks.items()}
    target = FusedTarget(model, blocks=blocks) if batch == 1 else HFTarget(model, named)
    for i in range(0, 200, batch):
        texts = want[i : i + batch]
        if way == "smaller model":
            drafters, policy, options = [assistant(llama(layers=1, seed=9))], CostPolicy, {}
        elif way == "sparse self":
            drafters, policy, options = [sparse(target, [0.1, 0.5])], CostPolicy, {}
        else:
            drafters, policy, options = ways(texts)[way]
        prices = Given(flat)
        run = Engine(target, drafters, policy(drafters, prices, **options), prices)
        assert run.run(prompts[i : i + batch], limits=[128] * batch) == texts


@pytest.mark.parametrize("kind", ["perfect", "wrong", "random"])
def test_drafters_change_speed_alone(kind, model, texts):
    prompts, want = texts[0][:4], texts[1][:4]
    run = engine(model, [Scripted(want, kind)], FixedPolicy, size=8, depth=7, width=1)
    assert run.run(prompts, limits=[NEW] * 4) == want
    report = run.report
    assert report.tokens == 4 * NEW
    if kind == "perfect":  # 7 and one more per step, after the prompt's own
        assert report.tokens_per_step == pytest.approx(63 / 8)
        assert report.steps == 8
    if kind == "wrong":
        assert report.accepted == 0
        assert report.steps == NEW - 1


def test_an_end_or_the_last_token_within_an_accepted_path(model, texts):
    prompts, want = texts[0][:4], texts[1][:4]
    for new in (1, 2, 7, 30):
        run = engine(model, [Scripted(want)], FixedPolicy, size=12, depth=11, width=1)
        assert run.run(prompts, limits=[new] * 4) == [w[:new] for w in want]
    run = engine(model, [Scripted(want)], FixedPolicy, size=12, depth=11, width=1)
    assert run.run(prompts, limits=[3, 40, 1, 20]) == [
        w[:n] for w, n in zip(want, [3, 40, 1, 20], strict=True)
    ]
    eos = want[0][9]
    ended = reference(model, prompts, 60, eos)
    assert any(len(e) < 60 for e in ended)
    for drafters in ([Scripted(want)], [NGram()], []):
        run = engine(model, drafters, FixedPolicy, size=12, depth=11, width=1)
        assert run.run(prompts, limits=[60] * 4, stop=frozenset([eos])) == ended


def test_a_ragged_batch_of_eight_is_eight_batches_of_one(model, texts):
    prompts, want = texts[0][:8], texts[1][:8]
    limits = [64, 5, 60, 64, 1, 50, 30, 64]
    run = engine(model, [NGram()])
    assert run.run(prompts, limits=limits) == [w[:n] for w, n in zip(want, limits, strict=True)]
    verified = sum(n * c for n, c in run.report.sizes.items())
    assert sum(run.prices.asked) == verified  # rows that are done cost nothing


def test_tokens_are_streamed_as_they_are_certain(model, texts):
    prompts, want = texts[0][:3], texts[1][:3]
    told = [[] for _ in want]
    run = engine(model, [Scripted(want)])
    run.run(prompts, limits=[40] * 3, stream=lambda row, new: told[row].append(new))
    assert [[x for new in t for x in new] for t in told] == [w[:40] for w in want]
    assert max(len(new) for t in told for new in t) > 1
    assert all(len(t[0]) == 1 for t in told)  # the first token comes with the prompt's pass


def test_a_seed_gives_the_same_text_with_any_tree(model, texts):
    prompts, want = texts[0][:4], texts[1][:4]
    sampling = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=3)
    plain = engine(model, []).run(prompts, limits=[40] * 4, sampling=sampling)
    assert plain != [w[:40] for w in want]
    for drafters in ([NGram()], [Scripted(plain)], [Scripted(plain, "random", width=8)]):
        run = engine(model, drafters)
        assert run.run(prompts, limits=[40] * 4, sampling=sampling) == plain
    other = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=4)
    assert engine(model, []).run(prompts, limits=[40] * 4, sampling=other) != plain


def test_the_penalty_is_that_of_transformers(model):
    prompts = prompts_of(3, seed=5)
    for prompt in prompts:
        ids = torch.tensor([prompt])
        want = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False,
            repetition_penalty=1.3,
        )[0, len(prompt) :].tolist()  # fmt: skip
        got = engine(model, [NGram(), Scripted([want])]).run(
            [prompt], limits=[60], sampling=Sampling(repetition_penalty=1.3)
        )
        assert got == [want]


class Still(Rate):
    """Stays what plain decoding gives by the curve: what this machine takes is not asked."""

    def observe(self, tokens, seconds):
        pass


def test_the_curve_decides_how_much_is_verified(model, texts):
    """Fake curves: flat fills up, linear stays plain, an inversion's cheap side is chosen."""
    prompts, want = texts[0][:1], texts[1][:1]
    curves = {
        "flat": lambda n: 10.0,
        "linear": lambda n: 10.0 * n,
        "inversion": lambda n: 10.0 if n < 2 or n > 8 else 100.0,
    }
    found = {}
    for name, curve in curves.items():
        run = engine(model, [Scripted(want, "random", width=4, chance=0.5)], curve=curve)
        run.policy.calibrated = False
        run.policy.rate = Still()
        run.run(prompts, limits=[20])
        found[name] = [n for n, c in run.report.sizes.items() for _ in range(c)]
    assert sorted(found["flat"])[len(found["flat"]) // 2] >= 16
    assert set(found["linear"]) == {1}
    assert not set(found["inversion"]) & set(range(2, 9))


def test_wrong_prompts_are_refused(model):
    run = engine(model, [NGram()])
    with pytest.raises(SkimpError, match="there is no prompt"):
        run.run([], limits=[])
    with pytest.raises(SkimpError, match="prompt 1 is empty; give at least one token"):
        run.run([[1], []], limits=[5, 5])
    with pytest.raises(SkimpError, match="made with another tokenizer"):
        run.run([[1, 61]], limits=[5])
    with pytest.raises(SkimpError, match="leave nothing to do"):
        run.run([[1]], limits=[0])
    short = engine(llama(max_position_embeddings=16), [NGram()])
    with pytest.raises(SkimpError, match="prompt 0 has 16 tokens; the model takes 16"):
        short.run([[1] * 16], limits=[5])
    assert len(short.run([[1] * 12], limits=[50])[0]) == 4  # up to what the model takes


@pytest.mark.nightly
@pytest.mark.timeout(1200)
def test_two_thousand_steps():
    model = llama(max_position_embeddings=16384)
    prompts = prompts_of(4)
    run = engine(model, [Scripted([[0]] * 4, "random", width=3)], FixedPolicy, size=5)
    out = run.run(prompts, limits=[2400] * 4)
    assert run.report.steps >= 2000
    assert run.report.accepted > 100  # caches were compacted on the way
    plain = engine(model, []).run(prompts, limits=[2400] * 4)
    assert out == plain
