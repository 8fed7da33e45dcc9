"""Generated steps as targets: what transformers computes, for the models they are taken for."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from skimp.ir.block import DynkFFN  # noqa: E402
from skimp.ir.errors import TargetError  # noqa: E402
from skimp.runtime.tree.fused import FusedTarget, target_of  # noqa: E402
from skimp.runtime.tree.hf import HFTarget  # noqa: E402

from .models import by_gate, llama, random_tree  # noqa: E402
from .test_hf import check, small, trees_of  # noqa: E402

FAMILIES = {
    "llama": llama,
    "mistral": lambda: small(
        transformers.MistralConfig, sliding_window=None, num_key_value_heads=2
    ),
    "qwen2": lambda: small(transformers.Qwen2Config, num_key_value_heads=2),
    "qwen3": lambda: small(transformers.Qwen3Config, num_key_value_heads=2, head_dim=8),
    "phi3": lambda: small(transformers.Phi3Config, num_key_value_heads=2),
}
OTHERS = {
    "gpt2": (transformers.GPT2Config, dict(n_embd=32, n_layer=2, n_head=4), "activation"),
    "gemma2": (transformers.Gemma2Config, dict(num_key_value_heads=2, head_dim=8), "window"),
    "granite": (transformers.GraniteConfig, dict(embedding_multiplier=3.0), "logits differ"),
    "olmo2": (transformers.Olmo2Config, {}, "lacks a part"),
    "llama with other biases": (transformers.LlamaConfig, dict(mlp_bias=True), "other weights"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_trees_equal_transformers(family):
    model, g = FAMILIES[family](), torch.Generator().manual_seed(0)
    target = FusedTarget(model)
    prompts = [torch.randint(61, (n,), generator=g).tolist() for n in (1, 9, 70)]
    first, hidden = target.prefill(prompts)
    assert [len(s) for s in target.prompts] == [1, 9, 70]
    assert torch.equal(hidden, torch.stack([s[-1] for s in target.prompts]))
    for prompt, got in zip(prompts, first, strict=True):
        check(model, target, [prompt[:-1]], [(torch.tensor(prompt[-1:]), [-1])], got[None])
    for sizes in ((1, 1, 1), (5, 13, 2)):
        trees = trees_of(sizes, 61, g)
        logits, hidden = target.verify(*zip(*trees, strict=True))
        assert hidden.shape == (sum(sizes), target.width)
        check(model, target, prompts, trees, logits)
        chain = [0, *[i for i in range(1, sizes[1]) if trees[1][1][i] == 0][-1:]]
        target.keep([torch.tensor([0]), torch.tensor(chain), torch.tensor([], dtype=torch.int64)])
        prompts[0] = prompts[0] + trees[0][0][:1].tolist()
        prompts[1] = prompts[1] + trees[1][0][chain].tolist()
        assert target.lengths() == [len(p) for p in prompts]
    target.drop([0, 2])
    trees = trees_of((6,), 61, g)
    logits, _ = target.verify(*zip(*trees, strict=True))
    check(model, target, prompts[1:2], trees, logits)


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_refused_with_a_reason(name):
    config, more, reason = OTHERS[name]
    model = small(config, **more)
    with pytest.raises(TargetError, match=reason):
        FusedTarget(model)
    with pytest.warns(UserWarning, match=reason):
        assert isinstance(target_of(model), HFTarget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trees_decode_to_the_bit_like_one_token_at_a_time(dtype):
    """A drafter that is right half of the time, in a ragged batch, against plain decoding alone."""
    target = FusedTarget(llama(seed=3), dtype=dtype)
    prompts, g = [[5, 9, 33], [7] * 40, [1, 2]], torch.Generator().manual_seed(1)
    plain = []
    for prompt in prompts:
        logits, _ = target.prefill([prompt])
        steps = []
        for _ in range(90):
            steps.append(logits)
            logits, _ = target.verify([logits.argmax(-1)], [torch.tensor([-1])])
            target.keep([torch.tensor([0])])
        plain.append(torch.cat(steps))
    logits, _ = target.prefill(prompts)
    roots, at = [int(row.argmax()) for row in logits], [0, 0, 0]
    while min(at) < 80:
        trees, right = [], []
        for row, root in enumerate(roots):
            want = plain[row][at[row] + 1 : at[row] + 9].argmax(-1).tolist()
            tokens = torch.randint(61, (9,), generator=g)
            parents = random_tree(9, g, chain=0.7)
            tokens[0], node, path = root, 0, [0]
            for token in want:  # the true text along one path, as far as it goes
                children = [i for i in range(node + 1, 9) if parents[i] == node]
                if not children or torch.rand((), generator=g) < 0.2:
                    break
                node = children[-1]
                tokens[[i for i in children if i != node]] = 60 if token != 60 else 0
                tokens[node] = token
                path.append(node)
            trees.append((tokens, parents))
            right.append(path)
        got, _ = target.verify(*zip(*trees, strict=True))
        for row, path in enumerate(right):
            mine = got[9 * row : 9 * row + 9][path]
            if at[row] < 80:
                assert torch.equal(mine, plain[row][at[row] + 1 : at[row] + 1 + len(path)])
            else:
                right[row] = path = path[:0]  # waits for the others
                continue
            at[row] += len(path)
            roots[row] = int(mine[-1].argmax())
        target.keep([torch.tensor(path, dtype=torch.int64) for path in right])


def test_a_tree_that_grows():
    model, g = llama(), torch.Generator().manual_seed(2)
    target = FusedTarget(model)
    target.prefill([[4, 8], [3]])
    (tokens, parents), other = trees_of((8, 3), 61, g)
    whole, _ = target.verify([tokens, other[0]], [parents, other[1]])
    first, _ = target.verify([tokens[:3], other[0]], [parents[:3], other[1]])
    second, _ = target.verify([tokens[3:], other[0][:0]], [parents[3:], other[1][:0]], grow=True)
    assert torch.equal(torch.cat([first[:3], second, first[3:]]), whole)
    target.verify([tokens[:1], other[0][:1]], [parents[:1], other[1][:1]])  # and starts over
    target.keep([torch.tensor([0]), torch.tensor([0])])
    assert target.lengths() == [3, 2]


def test_limits():
    target = FusedTarget(llama(max_position_embeddings=100))
    target.prefill([[1] * 97])
    chain = torch.arange(-1, 3)
    with pytest.raises(TargetError, match="only 100"):
        target.verify([torch.ones(4, dtype=torch.int64)], [chain])
    target.prefill([[1] * 97])
    star = torch.tensor([-1, 0, 0, 0, 1])  # five nodes, three positions
    target.verify([torch.ones(5, dtype=torch.int64)], [star])
    with pytest.raises(TargetError, match="no token"):
        target.prefill([[]])


def test_experts_of_converted_networks():
    model = llama(seed=5)
    blocks = {}
    for i, layer in enumerate(model.model.layers):
        f, order = layer.mlp, torch.randperm(48)
        blocks[i] = DynkFFN(
            f.up_proj.weight[order], None, f.gate_proj.weight[order], None,
            f.down_proj.weight.T[order], None, expert_size=8, act="silu", router_width=4,
        )  # fmt: skip
    target = FusedTarget(model, blocks=blocks)
    tokens, parents = torch.tensor([3, 7, 1]), torch.tensor([-1, 0, 0])
    target.prefill([[4, 8, 2]])
    dense, _ = target.verify([tokens], [parents])
    target.threshold(0.0)
    assert torch.equal(target.verify([tokens], [parents], sparse=True)[0], dense)
    target.threshold(0.6)
    sparse, _ = target.verify([tokens], [parents], sparse=True)
    # the same networks in the model itself, for the drafted tokens only
    for i, layer in enumerate(model.model.layers):
        blocks[i].tau.fill_(0.6)
        dense_mlp = layer.mlp
        layer.mlp = _Late(dense_mlp, blocks[i])
    check(model, target, [[4, 8, 2]], [(tokens[:1], parents[:1])], sparse[:1])
    again, _ = target.verify([tokens], [parents])
    assert torch.equal(again, dense)  # what was drafted left nothing behind


def test_networks_whose_gate_is_their_router():
    model, dense = by_gate(llama(seed=5), 0.05), FusedTarget(llama(seed=5))
    target, g = FusedTarget(model), torch.Generator().manual_seed(0)
    assert target.name == f"{dense.name}-gates"  # it costs something else
    trees, logits = trees_of((6,), 61, g), []
    for tau in (0.05, 0.0, 1e9):
        for layer in model.model.layers:
            layer.mlp.tau.fill_(tau)
        target.prefill([[4, 8, 2]])
        logits.append(target.verify(*zip(*trees, strict=True))[0])
        check(model, target, [[4, 8, 2]], trees, logits[-1])
        target.drop([0])
    dense.prefill([[4, 8, 2]])
    want, _ = dense.verify(*zip(*trees, strict=True))
    assert torch.allclose(logits[1], want, atol=1e-4)
    assert not torch.allclose(logits[0], want, atol=1e-4)
    model.model.layers[1].mlp.dense = True
    FusedTarget(model)  # which compares itself with the model
    with pytest.raises(TargetError, match="nothing else can draft"):
        FusedTarget(llama(seed=5), blocks={0: model.model.layers[0].mlp})


def test_what_is_converted_otherwise_is_the_models_own_code():
    model = llama(seed=5)
    f = model.model.layers[1].mlp
    model.model.layers[1].mlp = DynkFFN(
        f.up_proj.weight, None, f.gate_proj.weight, None, f.down_proj.weight.T, None,
        expert_size=8, act="silu", router_width=4,
    )  # fmt: skip
    with pytest.raises(TargetError, match="learned router"):
        FusedTarget(model)


class _Late(torch.nn.Module):
    """A network of which the last token of the text takes the sparse form."""

    def __init__(self, dense, sparse):
        super().__init__()
        self.dense, self.sparse = dense, sparse

    def forward(self, x):
        return torch.cat([self.dense(x[:, :-1]), self.sparse(x[:, -1:])], 1)
