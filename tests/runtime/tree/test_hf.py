"""Trees on transformers' models: each node's logits are those of its path alone."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from skimp.ir.errors import TargetError  # noqa: E402
from skimp.runtime.tree.hf import HFTarget, why_not  # noqa: E402

from .models import llama, random_tree  # noqa: E402


def path(parents, node):
    found = []
    while node >= 0:
        found.append(node)
        node = int(parents[node])
    return found[::-1]


def check(model, target, prompts, trees, logits, tolerance=1e-4):
    """Every node against the plain model run on the prompt and the node's path."""
    first = 0
    for prompt, (tokens, parents) in zip(prompts, trees, strict=True):
        for node in range(len(tokens)):
            ids = torch.tensor([prompt + tokens[path(parents, node)].tolist()])
            with torch.no_grad():
                want = model(input_ids=ids).logits[0, -1]
            got = logits[first + node]
            assert float((got - want).abs().max()) <= tolerance * float(want.abs().max())
        first += len(tokens)


def trees_of(sizes, vocabulary, generator):
    return [
        (torch.randint(vocabulary, (n,), generator=generator), random_tree(n, generator))
        for n in sizes
    ]


FAMILIES = {
    "llama": llama,
    "mistral, window": lambda: small(
        transformers.MistralConfig, sliding_window=5, num_key_value_heads=1
    ),
    "gemma2, window and cap": lambda: small(
        transformers.Gemma2Config, sliding_window=4, num_key_value_heads=2, head_dim=8
    ),
    "qwen3": lambda: small(transformers.Qwen3Config, num_key_value_heads=2, head_dim=8),
    "gpt2": lambda: small(transformers.GPT2Config, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gpt-neox": lambda: small(transformers.GPTNeoXConfig, max_position_embeddings=128),
}


def small(config, **more):
    torch.manual_seed(1)
    sizes = dict(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    if config is transformers.GPT2Config:
        sizes = dict(vocab_size=61, bos_token_id=1, eos_token_id=2)
    return transformers.AutoModelForCausalLM.from_config(config(**sizes, **more)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_nodes_compute_what_their_paths_do_and_commits_what_a_fresh_prefill_does(family):
    model = FAMILIES[family]()
    model.set_attn_implementation("eager" if "cap" in family else "sdpa")
    target, g = HFTarget(model), torch.Generator().manual_seed(3)
    prompts = [torch.randint(61, (n,), generator=g).tolist() for n in (7, 1, 12)]
    logits, hidden = target.prefill(prompts)
    assert (logits.shape, hidden.shape) == ((3, 61), (3, target.width))
    for b, prompt in enumerate(prompts):
        with torch.no_grad():
            torch.testing.assert_close(logits[b], model(torch.tensor([prompt])).logits[0, -1])
    for sizes in ((6, 1, 9), (3, 5, 1)):
        trees = trees_of(sizes, 61, g)
        logits, hidden = target.verify(*map(list, zip(*trees, strict=True)))
        n = sum(sizes)
        assert (logits.shape, hidden.shape) == ((n, 61), (n, target.width))
        check(model, target, prompts, trees, logits)
        deepest = [
            max(range(n), key=lambda i, p=p: len(path(p, i)))
            for n, (_, p) in zip(sizes, trees, strict=True)
        ]
        kept = [path(p, d) for d, (_, p) in zip(deepest, trees, strict=True)]
        target.keep([torch.tensor(k) for k in kept])
        prompts = [p + t[k].tolist() for p, k, (t, _) in zip(prompts, kept, trees, strict=True)]
        assert target.lengths() == [len(p) for p in prompts]
    fresh = HFTarget(model)
    fresh.prefill(prompts)
    for row, want in zip(target._rows, fresh._rows, strict=True):
        for layer in want.keys:
            for a, b in ((row.keys, want.keys), (row.values, want.values)):
                n = want.length
                torch.testing.assert_close(a[layer][:, :n], b[layer][:, :n], atol=1e-4, rtol=1e-4)
    assert model.config._attn_implementation in ("sdpa", "eager")  # as it was


def test_rows_without_nodes_and_dropped_rows():
    model, g = llama(), torch.Generator().manual_seed(0)
    target = HFTarget(model)
    prompts = [[3, 4, 5], [9, 8], [7]]
    target.prefill(prompts)
    none = torch.empty(0, dtype=torch.int64)
    trees = trees_of((4, 2), 61, g)
    (t0, p0), (t2, p2) = trees
    logits, _ = target.verify([t0, none, t2], [p0, none, p2])
    check(model, target, [prompts[0], prompts[2]], trees, logits)
    target.keep([torch.tensor([0]), none, none])
    assert target.lengths() == [4, 2, 1]
    target.drop([1])
    assert target.lengths() == [4, 1]
    logits, _ = target.verify([t0, t2], [p0, p2])
    check(model, target, [[*prompts[0], int(t0[0])], prompts[2]], trees, logits)


def test_a_tree_may_grow_pass_by_pass():
    model, g = llama(), torch.Generator().manual_seed(0)
    target = HFTarget(model)
    prompts = [[3, 4, 5], [9, 8]]
    target.prefill(prompts)
    trees = trees_of((8, 6), 61, g)
    whole = target.verify(*map(list, zip(*trees, strict=True)))[0].split([8, 6])
    cuts = [(0, 1), (1, 5), (5, 8)], [(0, 2), (2, 2), (2, 6)]
    for i in range(3):
        parts = [slice(*c[i]) for c in cuts]
        got, _ = target.verify(
            [t[s] for s, (t, _) in zip(parts, trees, strict=True)],
            [p[s] for s, (_, p) in zip(parts, trees, strict=True)],
            grow=i > 0,
        )
        want = torch.cat([w[s] for s, w in zip(parts, whole, strict=True)])
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_caches_grow_over_many_commits():
    model = llama()
    target, g = HFTarget(model), torch.Generator().manual_seed(0)
    tokens = torch.randint(61, (600,), generator=g).tolist()
    target.prefill([tokens[:2]])
    for t in tokens[2:]:
        logits, _ = target.verify([torch.tensor([t])], [torch.tensor([-1])])
        target.keep([torch.tensor([0])])
    with torch.no_grad():
        want = model(torch.tensor([tokens])).logits[0, -1]
    torch.testing.assert_close(logits[0], want, atol=1e-3, rtol=1e-3)


def test_what_cannot_be_verified_is_refused_with_its_reason():
    mamba = small(transformers.MambaConfig)
    with pytest.raises(TargetError, match="it is recurrent"):
        HFTarget(mamba)
    assert "not a language model" in why_not(torch.nn.Linear(2, 2))
    t5 = transformers.T5Config(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    )
    assert "only decoders" in why_not(transformers.T5ForConditionalGeneration(t5))
    short = HFTarget(llama(max_position_embeddings=8))
    short.prefill([[1] * 7])
    with pytest.raises(TargetError, match="position 8: the model has only 8"):
        short.verify([torch.tensor([1, 2])], [torch.tensor([-1, 0])])
