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


class TwoInputs(MLP):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 16)

    def forward(self, x):
        return self.down(self.act(self.gate(x * 2)) * self.up(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (MLP(act=torch.tanh), r"activation \(tanh\) is none of relu"),
        (MLP(act=nn.functional.elu), r"activation \(elu\) is none of"),
        (MLP(out=5), r"width 8 goes in and 5 comes out"),
        (Leaky(), r"relu is also read by sum"),
        (TwoInputs(), r"read different inputs"),
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
