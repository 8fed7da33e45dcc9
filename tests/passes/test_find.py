"""Discovery on unmodified architectures, against a hand count; and why near misses are refused."""

import os
import re

import pytest
import torch
from skimp.ir.errors import NothingToConvertError, TraceError
from skimp.passes.find import find
from skimp.passes.lift import blocks, lift
from skimp.passes.trace import trace
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"
hf = pytest.importorskip("transformers")


def ids(**more):
    return dict(
        input_ids=torch.randint(2, 60, (2, 6)), attention_mask=torch.ones(2, 6).long(), **more
    )


SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
LLAMA = dict(SMALL, num_key_value_heads=2, vocab_size=64, head_dim=8)
# name: (model, inputs, sites by hand, activation, gated)
ZOO = {
    "bert": lambda: (
        hf.BertModel(hf.BertConfig(vocab_size=64, **SMALL)), ids(), 2, "gelu", False),
    "gpt2": lambda: (
        hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4)),
        ids(use_cache=False), 3, "gelu_tanh", False),
    "llama": lambda: (
        hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), ids(use_cache=False), 2, "silu", True),
    "gemma": lambda: (
        hf.GemmaForCausalLM(hf.GemmaConfig(**LLAMA)), ids(use_cache=False), 2, "gelu_tanh", True),
    "t5": lambda: (
        hf.T5ForConditionalGeneration(hf.T5Config(
            vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4)),
        ids(decoder_input_ids=torch.randint(2, 60, (2, 5)), use_cache=False), 4, "relu", False),
    "t5-gated": lambda: (
        hf.T5ForConditionalGeneration(hf.T5Config(
            vocab_size=64, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4,
            feed_forward_proj="gated-gelu")),
        ids(decoder_input_ids=torch.randint(2, 60, (2, 5)), use_cache=False), 2, "gelu_tanh", True),
    "vit": lambda: (
        hf.ViTForImageClassification(hf.ViTConfig(image_size=16, patch_size=4, **SMALL)),
        dict(pixel_values=torch.randn(2, 3, 16, 16)), 2, "gelu", False),
    "whisper": lambda: (
        hf.WhisperForConditionalGeneration(hf.WhisperConfig(
            vocab_size=64, d_model=32, encoder_layers=2, decoder_layers=3, num_mel_bins=8,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_source_positions=16, pad_token_id=0, bos_token_id=1,
            eos_token_id=2, decoder_start_token_id=1)),
        dict(input_features=torch.randn(2, 8, 32), use_cache=False,
             decoder_input_ids=torch.randint(2, 60, (2, 5))), 5, "gelu", False),
    "phi": lambda: (
        hf.PhiForCausalLM(hf.PhiConfig(vocab_size=64, **SMALL)),
        ids(use_cache=False), 2, "gelu_tanh", False),
    "clip-text": lambda: (  # x * sigmoid(1.702 x)
        hf.CLIPTextModel(hf.CLIPTextConfig(vocab_size=64, eos_token_id=1, **SMALL)),
        ids(), 2, "gelu_quick", False),
    "persimmon": lambda: (  # the square of ReLU
        hf.PersimmonForCausalLM(hf.PersimmonConfig(vocab_size=64, **SMALL)),
        ids(use_cache=False), 2, "relu2", False),
    "falcon": lambda: (  # products with turned parameters, without a linear
        hf.FalconForCausalLM(hf.FalconConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
        ids(use_cache=False), 2, "gelu", False),
    "phi3-fused": lambda: (
        hf.Phi3ForCausalLM(hf.Phi3Config(
            pad_token_id=0, bos_token_id=1, eos_token_id=2, num_key_value_heads=2, vocab_size=64,
            **SMALL)),
        ids(use_cache=False), 2, "silu", True),
}  # fmt: skip


def first_tensor(output):
    return output[0] if not isinstance(output, torch.Tensor) else output


@pytest.mark.parametrize("name", ZOO)
def test_every_ffn_is_found_and_none_invented(name):
    torch.manual_seed(0)
    model, inputs, count, act, gated = ZOO[name]()
    model.eval()
    gm = trace(model, inputs)
    found = find(gm)
    assert len(found.sites) == count, (found.sites, found.misses)
    assert not found.misses
    assert {s.act for s in found.sites} == {act}
    assert {s.gated for s in found.sites} == {gated}
    assert len({s.name for s in found.sites}) == count
    lift(gm, expert_size=4, router_width=4)
    assert len(blocks(gm)) == count
    with torch.no_grad():
        want, got = first_tensor(model(**inputs)), first_tensor(gm(**inputs))
    assert (got - want).norm() <= 1e-5 * want.norm()


class MLP(nn.Module):
    def __init__(self, act=nn.functional.relu, d=8, f=16, out=8):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(d, f), nn.Linear(f, out), act

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class Leaky(MLP):
    def forward(self, x):
        h = self.act(self.up(x))
        return self.down(h), h.sum()


class Normed(MLP):
    def forward(self, x):
        return self.down(nn.functional.layer_norm(self.act(self.up(x)), (16,)))


class Deeper(MLP):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        return self.last(torch.relu(super().forward(x)))


class TwoInputs(MLP):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 16)

    def forward(self, x):
        return self.down(self.act(self.gate(x * 2)) * self.up(x))


class Products(nn.Module):
    """Linear layers spelled as products with parameters, of either orientation."""

    def __init__(self, turned, bias):
        super().__init__()
        self.turned = turned
        up, down = ((16, 8), (8, 16)) if turned else ((8, 16), (16, 8))
        self.up, self.down = nn.Parameter(torch.randn(up)), nn.Parameter(torch.randn(down))
        self.a = nn.Parameter(torch.randn(16)) if bias else None
        self.b = nn.Parameter(torch.randn(8)) if bias else None

    def linear(self, x, w, bias):
        y = x @ (w.T if self.turned else w)
        return y if bias is None else bias + y

    def forward(self, x):
        h = nn.functional.silu(self.linear(x, self.up, self.a))
        return self.linear(h, self.down, self.b)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_products_with_parameters_are_linear_layers(turned, bias):
    torch.manual_seed(0)
    model, x = Products(turned, bias).eval(), torch.randn(2, 3, 8)
    gm = trace(model, dict(x=x))
    (site,) = find(gm).sites
    assert (site.w_in, site.w_out, site.transposed) == ("up", "down", not turned)
    assert (site.b_in, site.b_out) == (("a", "b") if bias else (None, None))
    got, want = lift(gm, expert_size=4, router_width=4).gm(x=x), model(x)
    assert (got - want).norm() <= 1e-5 * want.norm()


class Halves(nn.Module):
    """A gated network whose one linear is cut by a view, the gate first or last."""

    def __init__(self, gate):
        super().__init__()
        self.up, self.down, self.gate = nn.Linear(8, 32), nn.Linear(16, 8), gate

    def forward(self, x):
        h = self.up(x).view(*x.shape[:-1], 2, 16)
        return self.down(nn.functional.silu(h[..., self.gate, :]) * h[..., 1 - self.gate, :])


@pytest.mark.parametrize(("gate", "fused"), [(0, "gate_up"), (1, "up_gate")])
def test_halves_by_a_view(gate, fused):
    torch.manual_seed(0)
    model, x = Halves(gate).eval(), torch.randn(2, 3, 8)
    gm = trace(model, dict(x=x))
    (site,) = find(gm).sites
    assert (site.gated, site.fused, site.d_ff) == (True, fused, 16)
    got, want = lift(gm, expert_size=4, router_width=4).gm(x=x), model(x)
    assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (lambda x: x * torch.sigmoid(1.702 * x), "gelu_quick"),
        (lambda x: torch.relu(x) ** 2, "relu2"),
        (lambda x: torch.relu(x) * torch.relu(x), "relu2"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (lambda x: x.clamp(min=0), "relu"),
        (lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)), "gelu"),
    ],
)
def test_an_activation_however_it_is_spelled(act, name):
    (site,) = find(trace(MLP(act=act).eval(), dict(x=torch.randn(3, 8)))).sites
    assert site.act == name


def test_a_product_that_is_no_layer():
    class Scores(nn.Module):
        """Of two inputs: not of a parameter."""

        def __init__(self):
            super().__init__()
            self.down = nn.Linear(4, 8)

        def forward(self, x, y):
            return self.down(torch.relu(x @ y.T))

    inputs = dict(x=torch.randn(3, 8), y=torch.randn(4, 8))
    assert not find(trace(Scores().eval(), inputs)).sites


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (MLP(act=torch.tanh), r"activation \(tanh\) is none of relu"),
        (MLP(act=nn.functional.elu), r"activation \(elu\) is none of"),
        (Leaky(), r"relu is also read by sum"),
        (TwoInputs(), r"read different inputs"),
        (MLP(out=5), r"width 8 goes in and 5 comes out"),
    ],
)
def test_a_near_miss_says_why(model, reason):
    gm = trace(model.eval(), dict(x=torch.randn(3, 8)))
    found = find(gm)
    assert not found.sites
    assert len(found.misses) == 1
    assert re.search(reason, found.misses[0].reason), found.misses
    with pytest.raises(NothingToConvertError, match="Nearest misses"):
        lift(gm)


def test_a_part_of_a_deeper_network_is_not_a_site():
    found = find(trace(Deeper().eval(), dict(x=torch.randn(3, 8))))
    assert not found.sites
    assert "alone: a part of a deeper network" in found.misses[0].reason


@pytest.mark.parametrize("model", [Normed(), nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))])
def test_what_is_nothing_like_it_is_passed_over(model):
    name = "x" if isinstance(model, Normed) else "input"
    assert not find(trace(model.eval(), {name: torch.randn(3, 8)})).sites


def test_layers_that_share_weights_share_a_block():
    layer = MLP()

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x + self.layer(x))

    model, x = Twice().eval(), torch.randn(3, 8)
    gm = lift(trace(model, dict(x=x))).gm
    assert len(blocks(gm)) == 1
    assert torch.allclose(gm(x=x), model(x), atol=1e-6)


def test_a_model_that_cannot_be_traced_says_so():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(TraceError, match="Branch cannot be captured as one graph"):
        trace(Branch(), dict(x=torch.randn(3, 8)))
