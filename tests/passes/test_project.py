"""Attention projections: found on unmodified architectures, rewritten, trained, counted, stored."""

import copy
import os
import re
from pathlib import Path

import pytest
import skimp
import torch
from skimp.cli import app
from skimp.ir import DynkFFN, Projection
from skimp.ir.cost import dense_flops, ffn_share
from skimp.ir.cost import evaluate as cost
from skimp.ir.errors import NothingToConvertError
from skimp.ir.text import BlockLine, parse
from skimp.passes.attention import find_projections
from skimp.passes.base import Context, capture
from skimp.passes.budget import Budget
from skimp.passes.choose import Choose
from skimp.passes.convert import explain, prepare
from skimp.passes.find import find
from skimp.passes.lift import blocks, lift, lifted_layers
from skimp.passes.project import Project, as_network, hidden_neurons, router_width
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify
from skimp.passes.trace import trace
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

os.environ["HF_HUB_OFFLINE"] = "1"
hf = pytest.importorskip("transformers")


def ids(**more):
    return dict(
        input_ids=torch.randint(2, 60, (3, 6)), attention_mask=torch.ones(3, 6).long(), **more
    )


SMALL = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64
)
GROUPED = dict(SMALL, num_key_value_heads=2, head_dim=16)
T5 = dict(vocab_size=64, d_model=64, d_ff=48, d_kv=16, num_layers=2, num_heads=4)
NARROW = dict(vocab_size=64, n_embd=64, n_layer=2, n_head=4)


class Torch(nn.Module):
    """PyTorch's own attention: fused, and with weights asked for spelled out around a softmax."""

    def __init__(self, need_weights):
        super().__init__()
        self.attention, self.need = nn.MultiheadAttention(64, 4, batch_first=True), need_weights
        self.up, self.down = nn.Linear(64, 32), nn.Linear(32, 64)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=self.need)[0]
        return x + self.down(torch.relu(self.up(x)))


# name: (model, inputs, projections by hand, of which fused, widths of one layer's q, k, v, o)
ZOO = {
    "bert": lambda: (hf.BertModel(hf.BertConfig(**SMALL)), ids(), 8, 0),
    "bert-eager": lambda: (
        hf.BertModel(hf.BertConfig(attn_implementation="eager", **SMALL)), ids(), 8, 0),
    "gpt2": lambda: (hf.GPT2LMHeadModel(hf.GPT2Config(**NARROW)), ids(), 8, 6),
    "llama": lambda: (hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED)), ids(), 8, 0),
    "gemma": lambda: (hf.GemmaForCausalLM(hf.GemmaConfig(**GROUPED)), ids(), 8, 0),
    "qwen3": lambda: (hf.Qwen3Model(hf.Qwen3Config(**GROUPED)), ids(), 8, 0),
    "phi": lambda: (hf.PhiForCausalLM(hf.PhiConfig(**SMALL)), ids(), 8, 0),
    "phi3": lambda: (
        hf.Phi3ForCausalLM(hf.Phi3Config(pad_token_id=0, num_key_value_heads=2, **SMALL)),
        ids(), 8, 6),
    "neox": lambda: (hf.GPTNeoXModel(hf.GPTNeoXConfig(**SMALL)), ids(), 8, 6),
    "t5": lambda: (
        hf.T5ForConditionalGeneration(hf.T5Config(**T5)),
        ids(decoder_input_ids=torch.randint(2, 60, (3, 5))), 24, 0),
    "vit": lambda: (
        hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=4, **SMALL)),
        dict(pixel_values=torch.randn(2, 3, 16, 16)), 8, 0),
    "whisper": lambda: (
        hf.WhisperForConditionalGeneration(hf.WhisperConfig(
            vocab_size=64, d_model=64, encoder_layers=1, decoder_layers=2, num_mel_bins=8,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_source_positions=16, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1)),
        dict(input_features=torch.randn(2, 8, 32),
             decoder_input_ids=torch.randint(2, 60, (2, 5))), 20, 0),
    "torch-fused": lambda: (Torch(False), dict(x=torch.randn(12, 7, 64)), 4, 3),
    "torch-softmax": lambda: (Torch(True), dict(x=torch.randn(12, 7, 64)), 4, 3),
}  # fmt: skip


def first_tensor(output):
    return output[0] if not isinstance(output, torch.Tensor) else output


def close(got, want):
    return bool((got - want).norm() <= 1e-5 * want.norm())


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO)
def test_every_projection_is_found_and_conversion_at_tau_zero_is_the_identity(name):
    torch.manual_seed(0)
    model, inputs, count, fused = ZOO[name]()
    want = first_tensor(model.eval()(**inputs))
    gm, found = prepare(model, inputs, expert_size=4, router_width=4, projections=True)
    assert len(found.projections) == count, found
    assert not found.projection_misses
    assert sum(s.columns is not None for s in found.projections) == fused
    roles = [s.role for s in found.projections]
    assert {roles.count(r) for r in ("query", "key", "value", "output")} == {count // 4}
    assert close(first_tensor(gm(**inputs)), want)  # lifted: linear layers still
    # With four times the FLOPs the first weights hold the whole layer, before any training.
    context = Context(gm, [inputs], [inputs])
    whole = Project(tokens=0, factor=4).run(copy.deepcopy(gm), context)
    assert sum(b.linear for b in blocks(whole.gm).values()) == count
    assert close(first_tensor(whole.gm(**inputs)), want)
    # With the FLOPs of the layer it is another function; tau = 0 runs all of it.
    gm = Project(tokens=0).run(gm, context).gm
    dense = copy.deepcopy(gm)
    for b in blocks(dense).values():
        b.dense = True
    got = first_tensor(gm(**inputs))
    assert close(got, first_tensor(dense(**inputs)))
    assert not close(got, want)


def test_columns_of_a_fused_layer_are_those_of_its_role():
    """Heads of query, key and value in turn, against the architecture's own layout."""
    model, inputs, *_ = ZOO["neox"]()
    found = explain(model.eval(), inputs).projections
    # GPT-NeoX views its output as [heads, 3 * head]: per head 16 of query, 16 of key, 16 of value
    starts = {s.role: s.columns for s in found if ".0." in s.name and s.columns}
    for i, role in enumerate(("query", "key", "value")):
        assert starts[role] == tuple((48 * h + 16 * i, 48 * h + 16 * i + 16) for h in range(4))


def test_grouped_query_shapes_and_sizes():
    model, inputs, *_ = ZOO["llama"]()
    found = explain(model.eval(), inputs)
    widths = {s.role: (s.d, s.d_out) for s in found.projections}
    assert widths == dict(query=(64, 64), key=(64, 32), value=(64, 32), output=(64, 64))


@pytest.mark.parametrize("d", [64, 384, 576, 768, 1024])
def test_neurons_cost_what_the_layer_did_and_the_router_six_percent(d):
    assert hidden_neurons(d, d, 1) == round((d * d + d) / (2 * d + 1))  # the paper's
    for d_out in (d, d // 3, 2 * d):
        h = hidden_neurons(d, d_out, 8)
        assert h % 8 == 0
        assert h * (d + d_out) == pytest.approx(d * d_out, rel=4 * (d + d_out) / (d * d_out) + 0.02)
        width = router_width(d, d_out, h // 8)
        assert width * (d + h // 8) <= 0.06 * d * d_out < (width + 1) * (d + h // 8)


def test_the_first_weights_are_the_best_linear_map_of_their_rank():
    torch.manual_seed(0)
    linear = Projection(torch.randn(24, 32), torch.randn(24))
    x = torch.randn(500, 32) @ torch.randn(32, 32) + 3
    y = linear(x)
    w_in, b_in, w_out, b_out = as_network(linear, x, 14)
    got = F.relu(x @ w_in.T + b_in) @ w_out + b_out
    u, s, vt = torch.linalg.svd(y - y.mean(0), full_matrices=False)
    best = u[:, :7] * s[:7] @ vt[:7] + y.mean(0)  # Eckart and Young: no rank 7 comes closer
    assert (got - y).norm() <= 1.001 * (best - y).norm()
    assert ((x @ w_in.T + b_in) > 0).float().mean() == pytest.approx(0.5)  # one of each pair fires


def bert(seed=0):
    torch.manual_seed(seed)
    return hf.BertModel(hf.BertConfig(**SMALL)).eval()


def data(count=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    result = []
    for i in range(count):
        tokens = torch.randint(2, 60, (8, 6 + i), generator=g)
        mask = torch.ones_like(tokens)
        mask[0, 3:] = 0
        result.append(dict(input_ids=tokens, attention_mask=mask))
    return result


QUICK = [
    Project(tokens=600, chunk=300, batch=64),
    Relufy(),
    Sparsify(tokens=600, chunk=300, batch=64),
    Split(),
    Route(tokens=300, steps=20),
    Recover(steps=3, share=0.5),
    Budget("flops <= 0.8"),
]


@pytest.fixture(scope="module")
def converted():
    return skimp.convert(
        bert(), data(), passes=QUICK, expert_size=4, router_width=4, projections=True
    )


def test_blocks_of_projections_are_treated_as_any_other(converted):
    found = blocks(converted.model)
    assert len(found) == 10
    assert sum(b.linear for b in found.values()) == 8
    assert sum(0 < float(b.tau) < 1 for b in found.values() if b.linear) >= 4
    stats = {r["pass"].split("{")[0]: r["stats"] for r in converted.history}
    assert len(stats["project"]["blocks"]) == 8
    assert len(stats["sparsify"]["blocks"]) == 2
    assert len(stats["route"]["unexplained variance"]) == 10
    assert stats["budget"]["tried"][-1]["flops"] <= 0.8
    batch = data()[1]
    skimp.set_tau(model := copy.deepcopy(converted.model), 0.0)
    dense = copy.deepcopy(model)
    for b in blocks(dense).values():
        b.dense = True
    assert close(model(**batch)[0], dense(**batch)[0])


def test_training_lowers_the_error_and_hoyer_makes_zeros():
    gm, _ = prepare(bert(), data()[0], expert_size=4, router_width=4, projections=True)
    context = Context(gm, data(), data(2, seed=1))

    def error(trained):
        inputs = capture(gm, context.held_out, names=list(blocks(trained)))
        return sum(
            float((b.every_expert(inputs[n]) - gm.get_submodule(n)(inputs[n])).square().mean())
            for n, b in blocks(trained).items()
            if b.linear
        )

    options = dict(tokens=4000, chunk=400, batch=64, lr=2e-3)
    first = Project(tokens=0).run(copy.deepcopy(gm), context).gm
    after = Project(alpha=0, **options).run(copy.deepcopy(gm), context)
    sparse = Project(alpha=1, **options).run(copy.deepcopy(gm), context)
    assert error(after.gm) < 0.8 * error(first)

    def zeros(result):
        return sum(s["zeros"] for s in result.stats["blocks"].values()) / 8

    assert zeros(sparse) > zeros(after) + 0.1


def test_flops_are_counted_against_the_layer_that_was_there(converted):
    found = blocks(converted.model)
    name, block = next((n, b) for n, b in found.items() if b.linear)
    by_hand = 2 * block.router.down.out_features * (64 + block.experts) + 3 * 4 * 2 * (64 + 64)
    assert dense_flops(block) == 2 * 64 * 64 == dense_flops(converted.teacher.get_submodule(name))
    assert cost("router_flops", block) <= 0.06 * dense_flops(block)
    assert cost("flops", block, k=3) == pytest.approx(by_hand)
    share = ffn_share({name: 3.0}, {name: block})
    assert share == pytest.approx(by_hand / (2 * 64 * 64))
    linear = converted.teacher.get_submodule(name)  # what stays linear counts as dense
    assert ffn_share({name: 3.0}, {name: block, "x": linear}) == pytest.approx((share + 1) / 2)


def test_saved_and_loaded_it_is_the_same(converted, tmp_path):
    model, batch = copy.deepcopy(converted.model), data()[2]
    name = next(n for n, b in blocks(model).items() if b.linear)
    model.set_submodule(name, copy.deepcopy(converted.teacher.get_submodule(name)))
    skimp.save(model, tmp_path, batch)
    again = skimp.load(tmp_path, bert(seed=5))
    assert torch.equal(model(**batch)[0], again(**batch)[0])
    assert {n: type(p) for n, p in lifted_layers(again).items()} == {
        n: type(p) for n, p in lifted_layers(model).items()
    }
    assert all(again.get_submodule(n).linear == b.linear for n, b in blocks(model).items())


def test_a_fused_layer_is_stored_with_its_columns(tmp_path):
    model, inputs, *_ = ZOO["neox"]()
    gm, _ = prepare(model.eval(), inputs, expert_size=4, projections=True)
    gm = Project(tokens=0).run(gm, Context(copy.deepcopy(gm), [inputs], [inputs])).gm
    skimp.save(gm, tmp_path, inputs)
    again = skimp.load(tmp_path, ZOO["neox"]()[0])
    assert torch.equal(gm(**inputs)[0], again(**inputs)[0])


def test_an_interrupted_conversion_goes_on(tmp_path):
    options = dict(expert_size=4, router_width=4, projections=True, folder=tmp_path)
    skimp.convert(bert(), data(), passes=QUICK[:2], **options)
    seen = []
    done = skimp.convert(
        bert(), data(), passes=QUICK[:3], progress=lambda stage, *_: seen.append(stage), **options
    )
    assert set(seen) == {"sparsify"}
    assert len(blocks(done.model)) == 10


def test_a_block_slower_than_its_layer_goes_back_to_it(converted):
    context = Context(converted.teacher, data(), data())
    model = copy.deepcopy(converted.model)
    never = Choose(rows=(16,), margin=1e-9, repeats=2).run(model, context)
    assert never.modified
    assert not any(b.linear for b in blocks(never.gm).values())
    layers = {n: p for n, p in lifted_layers(never.gm).items() if isinstance(p, Projection)}
    assert len(layers) == 8
    for name, layer in layers.items():
        assert torch.equal(layer.weight, converted.teacher.get_submodule(name).weight)
    always = Choose(rows=(16,), margin=1e9, repeats=2).run(copy.deepcopy(converted.model), context)
    assert len(blocks(always.gm)) == 10


def test_text_form(converted):
    lines = [str(BlockLine.of(n, b)) for n, b in blocks(converted.model).items()]
    for line in lines:
        assert str(parse(line)) == line
    got = "\n".join(re.sub(r"tau [-+.\de]+", "tau T", line) for line in lines) + "\n"
    golden = Path(__file__).parent.parent / "golden" / "passes" / "projections.txt"
    if os.environ.get("SKIMP_UPDATE_GOLDEN"):
        golden.write_text(got)
    assert got == golden.read_text()


def test_explain_shows_projections(monkeypatch):
    from skimp.runtime import models

    class Tokenizer:
        def __call__(self, *_, **__):
            return ids()

    loaded = models.Loaded("small", bert(), Tokenizer())
    monkeypatch.setattr(models, "load_pretrained", lambda *_: loaded)
    text = CliRunner().invoke(app, ["explain"], env={"COLUMNS": "160"}).stdout
    assert "encoder.layer.1.attention.output.dense" in text
    assert "query" in text


class Attention(nn.Module):
    """A small attention to be spoiled in one place."""

    def __init__(self, d_out=32, spoil=None):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, d_out) for _ in range(3))
        self.o, self.spoil = nn.Linear(d_out, 32), spoil
        self.extra, self.size = nn.Linear(32, d_out), d_out // 4

    def heads(self, x):
        return x.unflatten(-1, (4, self.size)).transpose(1, 2)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.spoil == "two":
            q = q + self.extra(x)
        if self.spoil == "none":
            v = x
        if self.spoil == "tied":
            k = q
        if self.spoil == "heads":
            k = F.pad(k, (0, 4))[..., 2:-2]
        y = F.scaled_dot_product_attention(self.heads(q), self.heads(k), self.heads(v))
        y = y.transpose(1, 2).flatten(2)
        if self.spoil == "residual":
            y = x + y
        return y if self.spoil == "bare" else self.o(y)


class Fused(nn.Module):
    def __init__(self, spoil):
        super().__init__()
        self.qkv, self.o, self.spoil = nn.Linear(32, 128), nn.Linear(32, 32), spoil

    def forward(self, x):
        q, k, v, rest = self.qkv(x).split(32, -1)
        if self.spoil == "twice":
            k = k + q
        y = F.scaled_dot_product_attention(
            *(t.unflatten(-1, (4, 8)).transpose(1, 2) for t in (q, k, v))
        )
        return self.o(y.transpose(1, 2).flatten(2)) * (rest if self.spoil == "gate" else 1)


@pytest.mark.parametrize(
    ("model", "kept", "reason"),
    [
        (Attention(spoil="two"), 3, "2 linears feed the query; one may"),
        (Attention(spoil="none"), 3, "no linear feeds the value; an input does|x does"),
        (Attention(spoil="tied"), 2, "the same columns feed query and key"),
        (Attention(spoil="heads"), 3, "no linear feeds the key; (constant_)?pad"),
        (Attention(spoil="bare"), 3, "no linears read the attention's output; one must"),
        (Attention(spoil="residual"), 3, "no linears read the attention's output; one must"),
        (Fused("gate"), 1, "32 of 128 columns do not feed the attention"),
        (Fused("twice"), 1, "the same columns feed query and key"),
        (Attention(d_out=8), 1, "32 -> 8 is too small: a router would cost over 6 % of it"),
    ],
)
def test_a_near_miss_says_why(model, kept, reason):
    found = explain(model.eval(), dict(x=torch.randn(3, 5, 32)))
    assert len(found.projections) == kept, found
    assert found.projection_misses
    assert all(re.search(reason, m.reason) for m in found.projection_misses[:1]), found


def test_what_only_looks_like_attention_is_passed_over():
    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.gate = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.down(torch.relu(self.up(x)))
            return (self.gate(x).softmax(-1) * y) @ torch.softmax(x.transpose(1, 2) @ x, -1)

    gm = trace(Router().eval(), dict(x=torch.randn(2, 5, 8)))
    assert find_projections(gm, find(gm).sites)[0] == ()
    with pytest.raises(NothingToConvertError, match="no attention projection was found"):
        lift(gm, projections=True)


def test_the_pass_without_projections_lifted_says_what_to_do():
    with pytest.raises(NothingToConvertError, match="projections=True"):
        skimp.convert(bert(), data(), passes=QUICK[:1])


def test_layers_that_share_weights_share_a_block():
    torch.manual_seed(0)
    model = hf.AlbertModel(hf.AlbertConfig(embedding_size=16, **SMALL)).eval()
    batch = data()[0]
    gm, found = prepare(model, batch, expert_size=4, projections=True)
    assert len(found.projections) == 8
    assert len([p for p in lifted_layers(gm).values() if isinstance(p, Projection)]) == 4
    assert close(gm(**batch)[0], model(**batch)[0])
    gm = Project(tokens=0).run(copy.deepcopy(gm), Context(gm, [batch], [batch])).gm
    assert [isinstance(p, DynkFFN) for p in lifted_layers(gm).values()] == [True] * 5
