"""Sampling: the law of what is emitted is the target's, and a planted bug is found."""

import pytest
import torch
from skimp.ir.errors import SkimpError
from skimp.runtime.tree.verify import (
    Sampling,
    descend,
    draft_without_replacement,
    draw,
    multi_round,
)

scipy_stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.7),
        dict(temperature=1.3, top_k=5),
        dict(temperature=1.0, top_p=0.6),
        dict(temperature=0.9, top_k=20, top_p=0.8, repetition_penalty=1.4),
        dict(temperature=1.0, repetition_penalty=0.8),
    ],
)
def test_laws_are_those_of_transformers(options):
    processors = pytest.importorskip("transformers.generation.logits_process")
    g = torch.Generator().manual_seed(0)
    for size in (50, 3000):
        logits = torch.randn(size, generator=g) * 2
        seen = torch.randint(size, (12,), generator=g).tolist()
        scores = logits[None]
        if (penalty := options.get("repetition_penalty")) is not None:
            scores = processors.RepetitionPenaltyLogitsProcessor(penalty)(
                torch.tensor([seen]), scores
            )
        scores = processors.TemperatureLogitsWarper(options["temperature"])(None, scores)
        if "top_k" in options:
            scores = processors.TopKLogitsWarper(options["top_k"])(None, scores)
        if "top_p" in options:
            scores = processors.TopPLogitsWarper(options["top_p"])(None, scores)
        torch.testing.assert_close(
            Sampling(**options).law(logits, set(seen)), scores.softmax(-1)[0]
        )


def test_a_flat_law_needs_more_than_the_likeliest_thousand():
    law = Sampling(temperature=1, top_p=0.9).law(torch.zeros(5000) + torch.arange(5000) * 1e-5)
    assert int((law > 0).sum()) == pytest.approx(4500, abs=60)


def test_options_that_make_no_law():
    with pytest.raises(SkimpError, match=r"temperature < 0, top_p outside"):
        Sampling(temperature=-1, top_p=0)


V, DEPTH = 5, 3


class Tiny:
    """The exact law of three tokens in sequence: each context has its own logits."""

    def __init__(self, sampling, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.sampling = sampling
        self.logits = {c: torch.randn(V, generator=g) * 1.2 for c in self.contexts()}
        self.laws = {c: sampling.law(x) for c, x in self.logits.items()}
        self.drafts = {c: (torch.randn(V, generator=g) * 1.2).softmax(-1) for c in self.contexts()}

    @staticmethod
    def contexts():
        found = [()]
        for c in found:
            if len(c) < DEPTH - 1:
                found += [(*c, x) for x in range(V)]
        return found

    def joint(self):
        cells = {}
        for a in range(V):
            for b in range(V):
                for c in range(V):
                    p = self.laws[()][a] * self.laws[(a,)][b] * self.laws[(a, b)][c]
                    cells[a, b, c] = float(p)
        return cells


def pooled_p(counts, joint, draws):
    """p-value of chi-square over cells, those expected less than 5 times pooled."""
    got, want, rest = [], [], [0.0, 0.0]
    for cell, p in joint.items():
        if p * draws >= 5:
            got.append(counts.get(cell, 0))
            want.append(p * draws)
        else:
            rest[0] += counts.get(cell, 0)
            rest[1] += p * draws
    if rest[1] > 0:
        got.append(rest[0])
        want.append(rest[1])
    scale = sum(got) / sum(want)
    return float(scipy_stats.chisquare(got, [w * scale for w in want]).pvalue)


def fixed_tree(tiny):
    """Tokens, parents and logits of a tree of two levels that does not depend on chance."""
    tokens, parents, contexts = [0], [-1], [()]
    for a in tiny.drafts[()].topk(3).indices.tolist():
        first = len(tokens)
        tokens.append(a), parents.append(0), contexts.append((a,))
        for b in tiny.drafts[(a,)].topk(2).indices.tolist():
            tokens.append(b), parents.append(first), contexts.append((a, b))
    return tokens, parents, torch.stack([tiny.logits[c] for c in contexts])


def by_sampling(tiny, g):
    """Three tokens, by verifying a fixed tree and then plain steps."""
    tokens, parents, logits = tiny.tree
    path, following = descend(logits, tokens, parents, tiny.sampling, (), g)
    text = [*(tokens[i] for i in path[1:]), following]
    while len(text) < DEPTH:
        text.append(draw(tiny.laws[tuple(text)], g))
    return tuple(text[:DEPTH])


def by_rounds(tiny, g, rule=multi_round):
    """Three tokens, at each of which two drafted samples are verified."""
    text = ()
    while len(text) < DEPTH:
        q = tiny.drafts[text]
        drafted = draft_without_replacement(q, 2, g)
        text = (*text, rule(tiny.laws[text], q, drafted, g)[1])
    return text


def zero_out(p, q, tokens, g):
    """A known bug: what is struck after a rejection is the token, though it was a sample."""
    p = p.double()
    for i, x in enumerate(tokens):
        if float(torch.rand((), generator=g)) * float(q[x]) < float(p[x]):
            return i, x
        p = p.clone()
        p[x] = 0
        p = p / p.sum()
    return None, draw(p, g)


LAWS = {
    "T=0.7": Sampling(temperature=0.7),
    "T=1, top-p": Sampling(temperature=1.0, top_p=0.85),
}


def p_value(way, tiny, draws, seed):
    g = torch.Generator().manual_seed(seed)
    counts = {}
    for _ in range(draws):
        cell = way(tiny, g)
        counts[cell] = counts.get(cell, 0) + 1
    return pooled_p(counts, tiny.joint(), draws)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("way", [by_sampling, by_rounds])
def test_three_tokens_have_the_targets_joint_law(law, way):
    tiny = Tiny(LAWS[law])
    tiny.tree = fixed_tree(tiny)
    assert p_value(way, tiny, 3_000, seed=1) > 0.001


@pytest.mark.nightly
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("way", [by_sampling, by_rounds])
def test_three_tokens_have_the_targets_joint_law_at_length(way, seed):
    law = list(LAWS)[seed % 2]
    tiny = Tiny(LAWS[law], seed)
    tiny.tree = fixed_tree(tiny)
    assert p_value(way, tiny, 200_000, seed) > 0.001


def test_a_planted_bug_fails():
    tiny = Tiny(LAWS["T=0.7"])

    def planted(tiny, g):
        return by_rounds(tiny, g, zero_out)

    assert p_value(planted, tiny, 4_000, seed=1) < 1e-6


def test_one_round_accepts_as_often_as_can_be():
    g = torch.Generator().manual_seed(0)
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    hits = sum(
        multi_round(p, q, [draw(q, g)], g)[0] is not None for _ in range(4000)
    )  # overlap of the laws: .2 + .2 + .2
    assert hits / 4000 == pytest.approx(0.6, abs=0.03)


def test_a_drafter_that_is_the_target_is_always_right():
    g = torch.Generator().manual_seed(0)
    p = torch.tensor([0.1, 0.2, 0.7])
    for _ in range(200):
        i, token = multi_round(p, p, [drawn := draw(p, g)], g)
        assert (i, token) == (0, drawn)


def test_drawing_without_replacement_draws_as_one_after_another():
    g = torch.Generator().manual_seed(0)
    law = torch.tensor([0.6, 0.3, 0.1, 0.0])
    counts = {}
    for _ in range(6000):
        pair = tuple(draft_without_replacement(law, 2, g))
        counts[pair] = counts.get(pair, 0) + 1
    want = {
        (a, b): float(law[a] * law[b] / (1 - law[a])) for a in range(3) for b in range(3) if a != b
    }
    assert pooled_p(counts, want, 6000) > 0.001
    assert len(draft_without_replacement(law, 9, g)) == 3


def test_greedy_goes_down_with_the_penalty_of_the_path():
    # after 1 the likeliest is 1 again, unless it is penalised for having been seen on the path
    logits = torch.tensor([[0.0, 2.0, 1.5], [0.0, 2.0, 1.5], [3.0, 0.0, 0.0]])
    tokens, parents, g = [0, 1, 2], [-1, 0, 1], torch.Generator()
    assert descend(logits, tokens, parents, Sampling(), (), g) == ([0, 1], 1)
    penal = Sampling(repetition_penalty=2.0)
    assert descend(logits, tokens, parents, penal, {0}, g) == ([0, 1, 2], 0)


def test_drawn_chains_have_the_targets_law_whatever_drafts():
    """The whole engine, drawing from another model, against exact probabilities of three tokens."""
    pytest.importorskip("transformers")
    from skimp.runtime.tree.drawn import DrawnPolicy
    from skimp.runtime.tree.engine import Engine
    from skimp.runtime.tree.hf import HFTarget

    from .drafters import Given
    from .models import llama
    from .test_drafters import assistant

    model, small = llama(vocabulary=4, scale=0.6), llama(vocabulary=4, layers=1, seed=9, scale=0.6)
    prompt, sampling = [3, 1, 2], Sampling(temperature=0.7, top_p=0.95)
    joint = {}
    with torch.no_grad():
        first = sampling.law(model(torch.tensor([prompt])).logits[0, -1])
        for a in range(4):
            second = sampling.law(model(torch.tensor([[*prompt, a]])).logits[0, -1])
            third = {
                b: sampling.law(model(torch.tensor([[*prompt, a, b]])).logits[0, -1])
                for b in range(4)
            }
            for b in range(4):
                for c in range(4):
                    joint[a, b, c] = float(first[a] * second[b] * third[b][c])
    from skimp.runtime.tree.words import Words

    drafter = assistant(small, Words.same(4, 4), seconds=1e-6)
    prices = Given(lambda rows: 1.0)
    run = Engine(HFTarget(model), [drafter], DrawnPolicy([drafter], prices), prices)
    counts, accepted = {}, 0
    for seed in range(24):
        some = Sampling(temperature=0.7, top_p=0.95, seed=seed)
        for text in run.run([prompt] * 15, limits=[3] * 15, sampling=some):
            counts[tuple(text)] = counts.get(tuple(text), 0) + 1
        accepted += run.report.accepted
    assert accepted > 100
    assert pooled_p(counts, joint, 360) > 0.001
