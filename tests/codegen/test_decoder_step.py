"""The generated step of a decoder against plain PyTorch: trees, ragged batches, odd shapes."""

from dataclasses import replace

import pytest
import torch
from skimp.codegen.cpp.decoder import Decoder, Rows, emit
from skimp.codegen.cpp.decoder_spec import DecoderSpec, DecoderWeights, LayerWeights, RouterWeights
from skimp.codegen.cpp.spec import detect_isa
from skimp.ir.errors import BadWeightsError, SkimpError
from skimp.ir.op import ACTIVATIONS, SCORED, reference

ISA = detect_isa()
# few, since each one is a compile
ODD = DecoderSpec(21, 50, 6, 2, 10, 6, "gelu_tanh", "float32", ISA)
EVEN = DecoderSpec(32, 48, 4, 4, 16, 16, "silu", "bfloat16", ISA)
OTHERS = [
    replace(ODD, isa="portable"),
    *([replace(ODD, isa="avx2"), replace(EVEN, isa="avx2")] if ISA.startswith("avx") else []),
]
WORDS = 37


def weights(spec, seed=0, layers=2, biases=True, experts=0, mix=False, tau=None):
    g = torch.Generator().manual_seed(seed)
    d, mixed, kv = spec.d, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

    def m(n, k, scale=1.0):
        return (torch.randn(n, k, generator=g) * scale / k**0.5).to(getattr(torch, spec.dtype))

    def v(n):
        return 1 + 0.3 * torch.randn(n, generator=g)

    made = [
        LayerWeights(
            norm_in=v(d), q=m(mixed, d, 2), k=m(kv, d, 2), v=m(kv, d), out=m(d, mixed),
            norm_mid=v(d), gate=m(spec.d_ff, d), up=m(spec.d_ff, d), down=m(d, spec.d_ff),
            biases=(v(mixed), v(kv), v(kv)) if biases else None,
            q_norm=v(spec.head_dim) if biases else None,
            k_norm=v(spec.head_dim) if biases else None,
            router=RouterWeights(m(8, d), m(experts, 8), spec.d_ff // experts) if experts else None,
            tau=None if tau is None else torch.tensor(tau),
        )
        for _ in range(layers)
    ]  # fmt: skip
    return DecoderWeights(
        made, m(WORDS, d), v(d), m(WORDS, d, 4), 1e-5, spec.head_dim**-0.5,
        mix=m(d, 2 * d) if mix else None,
    )  # fmt: skip


def tables(spec, positions=400):
    angle = torch.arange(positions)[:, None] / 50 ** (torch.arange(spec.rope // 2) / spec.rope)
    angle = torch.cat([angle, angle], 1)
    return angle.cos(), angle.sin()


def decoder(spec, **options):
    made = Decoder(spec, weights(spec, **options))
    made.rotate_by(*tables(spec))
    return made


def plain(spec, w, tokens, tau=None, features=None):
    """Logits ``[n, words]`` and hidden rows of a text, in float64."""

    def norm(x, weight):
        return x * (x.square().mean(-1, keepdim=True) + w.eps).rsqrt() * weight.double()

    def turn(x, heads, weight):
        x = x.view(n, heads, spec.head_dim).transpose(0, 1)
        x = x if weight is None else norm(x, weight)
        y, half = x[..., : spec.rope], spec.rope // 2
        turned = torch.cat([-y[..., half:], y[..., :half]], -1)
        return torch.cat([y * cosine[:n] + turned * sine[:n], x[..., spec.rope :]], -1)

    n = len(tokens)
    cosine, sine = (t.double() for t in tables(spec))
    x = w.embedding[tokens].double()
    if w.mix is not None:
        x = torch.cat([x, features.double()], 1) @ w.mix.double().T
    for layer in w.layers:
        h = norm(x, layer.norm_in)
        b = layer.biases or (0.0, 0.0, 0.0)
        q, k, v = (
            h @ m.double().T + c for m, c in zip((layer.q, layer.k, layer.v), b, strict=True)
        )
        q, k = turn(q, spec.heads, layer.q_norm), turn(k, spec.kv_heads, layer.k_norm)
        v = v.view(n, spec.kv_heads, spec.head_dim).transpose(0, 1)
        k, v = (t.repeat_interleave(spec.heads // spec.kv_heads, 0) for t in (k, v))
        scores = q @ k.transpose(1, 2) * w.scale
        scores = scores.masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf)
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ layer.out.double().T
        h = norm(x, layer.norm_mid)
        gate, up, down = layer.gate.double(), layer.up.double(), layer.down.double()
        if layer.tau is not None:
            scores = ACTIVATIONS[spec.act](h @ gate.T)
            args = (h, scores, layer.tau.double(), up, None, None, None, down.T, None)
            x = x + reference(*args, 1, SCORED)
        elif tau is None or layer.router is None:
            x = x + (ACTIVATIONS[spec.act](h @ gate.T) * (h @ up.T)) @ down.T
        else:
            r = layer.router
            found = ((h @ r.down.double().T).relu() @ r.up.double().T).abs()
            args = (h, found, torch.tensor(tau).double(), up, None, gate, None, down.T, None)
            x = x + reference(*args, r.expert_size, spec.act)
    hidden = norm(x, w.norm)
    return hidden @ w.head.double().T, hidden


class Sequences:
    """Sequences in a cache, each with tokens committed, and nodes that are not."""

    def __init__(self, made, count, capacity=64):
        self.made, self.cache = made, made.cache(count, capacity)
        self.committed = [0] * count
        self.above = [[] for _ in range(count)]

    def run(self, tokens, parents, **options):
        for have, more in zip(self.above, parents, strict=True):
            have += list(more)
        sizes = [len(t) for t in tokens]
        rows = Rows(
            tokens=torch.tensor([t for one in tokens for t in one]),
            bounds=torch.tensor([0, *sizes]).cumsum(0),
            parents=torch.tensor([p for one in self.above for p in one], dtype=torch.int32),
            nodes=torch.tensor([0, *map(len, self.above)]).cumsum(0),
            slots=torch.arange(len(sizes)),
            committed=torch.tensor(self.committed),
            wanted=torch.arange(sum(sizes)),
            features=options.pop("features", None),
        )
        logits, hidden = self.made.step(rows, self.cache, **options)
        return logits.split(sizes), hidden.split(sizes)

    def keep(self, accepted):
        for slot, path in enumerate(accepted):
            self.made.keep(self.cache, slot, self.committed[slot], torch.tensor(path).long())
            self.committed[slot] += len(path)
            self.above[slot] = []

    def text(self, slot, tokens):
        """Commit a text to one sequence."""
        empty = [[]] * len(self.committed)
        chain = list(range(-1, len(tokens) - 1))
        got, _ = self.run(*([*empty[:slot], v, *empty[slot + 1 :]] for v in (tokens, chain)))
        self.keep([*empty[:slot], list(range(len(tokens))), *empty[slot + 1 :]])
        return got[slot]


def random_tree(n, generator):
    return [-1] + [
        i - 1 if torch.rand((), generator=generator) < 0.4
        else int(torch.randint(i, (), generator=generator))
        for i in range(1, n)
    ]  # fmt: skip


def path(parents, node):
    found = []
    while node >= 0:
        found.append(node)
        node = parents[node]
    return found[::-1]


def random(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(WORDS, (n,), generator=g).tolist()


def close(got, want, tolerance):
    assert float((got.double() - want).norm() / want.norm()) <= tolerance


@pytest.mark.parametrize("spec", [ODD, EVEN, *OTHERS], ids=lambda s: f"{s.dtype}-{s.isa}")
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 150])
def test_a_text_against_plain_pytorch(spec, length):
    made, text = decoder(spec), random(length, length)
    want, states = plain(spec, weights(spec), text)
    seqs = Sequences(made, 1)
    got, hidden = seqs.run([text], [range(-1, length - 1)])
    tolerance = 1e-5 if spec.dtype == "float32" else 3e-2
    close(got[0], want, tolerance)
    close(hidden[0], states, tolerance)


@pytest.mark.parametrize("spec", [ODD, EVEN], ids=lambda s: s.dtype)
@pytest.mark.parametrize("prefix", [0, 5, 63, 64, 130])
@pytest.mark.parametrize("nodes", [1, 2, 9, 33, 70])
def test_nodes_equal_their_paths_one_by_one_to_the_bit(spec, prefix, nodes):
    g = torch.Generator().manual_seed(prefix + nodes)
    made, text, tree = decoder(spec), random(prefix, 3), random(nodes, nodes)
    parents = random_tree(nodes, g)
    seqs = Sequences(made, 1)
    if prefix:
        seqs.text(0, text)
    logits, _ = seqs.run([tree], [parents])
    for node in (0, nodes // 2, nodes - 1):
        single = Sequences(made, 1)
        for token in [*text, *(tree[i] for i in path(parents, node))]:
            last = single.text(0, [token])
        assert torch.equal(last[0], logits[0][node])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_neighbours_and_threads_change_no_bit(threads):
    made, g = decoder(ODD), torch.Generator().manual_seed(5)
    texts = [random(n, n) for n in (3, 80, 0, 64)]
    trees = [random(n, n + 1) for n in (5, 0, 1, 17)]
    parents = [random_tree(len(t), g) if t else [] for t in trees]
    seqs = Sequences(made, 4)
    for slot, text in enumerate(texts):
        if text:
            seqs.text(slot, text)
    logits, hidden = seqs.run(trees, parents, threads=threads)
    for slot in (0, 2, 3):
        alone = Sequences(made, 1)
        if texts[slot]:
            alone.text(0, texts[slot])
        got, states = alone.run([trees[slot]], [parents[slot]], threads=1)
        assert torch.equal(got[0], logits[slot])
        assert torch.equal(states[0], hidden[slot])


@pytest.mark.parametrize("spec", [ODD, EVEN], ids=lambda s: s.dtype)
def test_a_tree_grows_and_its_accepted_path_is_kept(spec):
    made, text = decoder(spec), random(61, 9)
    seqs = Sequences(made, 2, capacity=64)
    seqs.text(1, text)
    parents = [-1, 0, 0, 2, 1, 3, 3]
    tree = random(7, 1)
    first, _ = seqs.run([[], tree[:3]], [[], parents[:3]])
    second, _ = seqs.run([[], tree[3:]], [[], parents[3:]])  # and the cache grows
    whole = Sequences(made, 1)
    whole.text(0, text)
    want, _ = whole.run([tree], [parents])
    assert torch.equal(torch.cat([first[1], second[1]]), want[0])
    seqs.keep([[], [0, 2, 3, 6]])
    again = Sequences(made, 1)
    again.text(0, [*text, *(tree[i] for i in (0, 2, 3, 6))])
    more = random(5, 4)
    assert torch.equal(seqs.text(1, more), again.text(0, more))


@pytest.mark.parametrize("tau", [0.0, 0.4, 1.0])
def test_experts_that_routers_choose(tau):
    for experts in (5, 25, 50):
        made, w = decoder(ODD, experts=experts), weights(ODD, experts=experts)
        made.tau.fill_(tau)
        text = random(9, 1)
        seqs = Sequences(made, 1)
        dense, _ = seqs.run([text], [range(-1, 8)])
        close(dense[0], plain(ODD, w, text)[0], 1e-5)
        seqs.above = [[]]
        got, _ = seqs.run([text], [range(-1, 8)], sparse=True)
        close(got[0], plain(ODD, w, text, tau)[0], 1e-5)
        assert torch.equal(got[0], dense[0]) == (tau == 0.0)
        one = Sequences(made, 1)  # whatever experts its neighbours need
        for i, token in enumerate(text):
            last, _ = one.run([[token]], [[-1]], sparse=True)
            one.keep([[0]])
            assert torch.equal(last[0][0], got[0][i])


@pytest.mark.parametrize("spec", [ODD, EVEN, *OTHERS], ids=lambda s: f"{s.dtype}-{s.isa}")
def test_neurons_that_gates_choose(spec):
    """At 0 all neurons run; at 9 none does. Neighbours need others, and change no bit."""
    exact, text = spec.dtype == "float32", random(37, 1)
    found = []
    for tau in (0.0, 0.05, 0.3, 9.0):
        made, w = decoder(spec, tau=tau), weights(spec, tau=tau)
        seqs = Sequences(made, 1)
        got, _ = seqs.run([text], [range(-1, 36)], threads=2)
        if exact or tau in (0.0, 9.0):  # rounding decides which gates are as small as tau
            close(got[0], plain(spec, w, text)[0], 1e-5 if exact else 3e-2)
        one = Sequences(made, 1)
        for i, token in enumerate(text):
            last, _ = one.run([[token]], [[-1]], threads=1 + i % 3)
            one.keep([[0]])
            assert torch.equal(last[0][0], got[0][i])
        found.append(got[0])
    dense, _ = Sequences(decoder(spec), 1).run([text], [range(-1, 36)])
    close(found[0], dense[0], 1e-5 if exact else 3e-2)
    assert not torch.equal(found[1], found[2])


def test_a_threshold_is_read_by_the_next_step():
    w = weights(ODD, tau=0.0)
    made = Decoder(ODD, w)
    made.rotate_by(*tables(ODD))
    for tau in (0.0, 0.2):
        for layer in w.layers:
            layer.tau.fill_(tau)
        got, _ = Sequences(made, 1).run([[3, 5]], [[-1, 0]])
        close(got[0], plain(ODD, w, [3, 5])[0], 1e-5)
    for wrong in (torch.tensor(0.1).double(), torch.zeros(2)):
        layers = [replace(layer, tau=wrong) for layer in w.layers]
        with pytest.raises(BadWeightsError, match="tau of layer 0"):
            Decoder(ODD, replace(w, layers=layers))


@pytest.mark.parametrize("spec", [ODD, EVEN], ids=lambda s: s.dtype)
def test_features_are_mixed_in(spec):
    text, g = random(20, 2), torch.Generator().manual_seed(1)
    features = torch.randn(20, spec.d, generator=g)
    made, w = decoder(spec, layers=1, mix=True), weights(spec, layers=1, mix=True)
    got, _ = Sequences(made, 1).run([text], [range(-1, 19)], features=features)
    tolerance = 1e-5 if spec.dtype == "float32" else 3e-2
    close(got[0], plain(spec, w, text, features=features)[0], tolerance)


def test_refusals():
    with pytest.raises(BadWeightsError, match="expected"):
        Decoder(replace(ODD, d_ff=51), weights(ODD))
    seqs = Sequences(decoder(ODD), 1)
    with pytest.raises(SkimpError, match="beyond the 400 positions"):
        seqs.run([random(401, 0)], [range(-1, 400)])
    assert "constexpr long KV_HEADS = 2;" in emit(ODD)


def test_nothing_to_run():
    logits, hidden = Sequences(decoder(ODD), 1).run([[]], [[]])
    assert logits[0].shape == (0, WORDS)
    assert hidden[0].shape == (0, ODD.d)
