"""Tiny random decoders, cheap enough to compare every token with transformers' own generation."""

import torch
from skimp.ir.block import DynkFFN
from transformers import LlamaConfig, LlamaForCausalLM


def llama(vocabulary=61, layers=2, seed=0, scale=8.0, **sizes):
    """Random, with logits scaled so that the next token is not a near tie."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": None,
            "pad_token_id": 0, "attn_implementation": "sdpa", **sizes,
        }
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
        model.lm_head.weight.mul_(scale / 4)
    return model


def by_gate(model, tau):
    """Let the gates of a model's networks be their routers; order of neurons changes nothing."""
    for layer in model.model.layers:
        f, order = layer.mlp, torch.randperm(48)
        layer.mlp = DynkFFN(
            f.up_proj.weight[order], None, f.gate_proj.weight[order], None,
            f.down_proj.weight.T[order], None, expert_size=1, act="silu", router_width=0, tau=tau,
        ).eval()  # fmt: skip
    return model


def random_tree(n, generator, chain=0.3):
    """Parents of a random tree; a share of its nodes goes deeper."""
    parents = [-1]
    for i in range(1, n):
        if torch.rand((), generator=generator) < chain:
            parents.append(i - 1)
        else:
            parents.append(int(torch.randint(i, (), generator=generator)))
    return torch.tensor(parents)
