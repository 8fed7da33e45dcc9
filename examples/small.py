"""Small random models, and data for them: what the examples take with `--quick`."""

import torch
from diffusers import UNet2DConditionModel
from skimp.passes.budget import Budget
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify
from skimp.runtime.unet import Pictures, hashed_text
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             initializer_range=0.3)  # fmt: skip
PASSES = [  # the usual ones, with hardly any training
    Relufy(),
    Sparsify(tokens=400, chunk=200, batch=64),
    Split(),
    Route(tokens=200, steps=10),
    Budget("flops <= 0.85"),
]


def text():
    """Five batches in which each token follows from the one before."""
    ids = 2 + (torch.arange(12) * torch.arange(1, 31)[:, None]) % 60
    return [dict(input_ids=i, attention_mask=torch.ones_like(i)) for i in ids.split(6)]


def encoder():
    """A BERT of two layers."""
    torch.manual_seed(0)
    return BertModel(BertConfig(intermediate_size=64, **SIZES)).eval()


def decoder():
    """A Llama of two layers, which never ends."""
    torch.manual_seed(0)
    config = LlamaConfig(intermediate_size=48, bos_token_id=1, eos_token_id=None, **SIZES)
    return LlamaForCausalLM(config).eval()


def unet():
    """A U-Net in SDXL's layout: two resolutions, one with attention."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), attention_head_dim=(1, 2), cross_attention_dim=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8,
    ).eval()  # fmt: skip


def pictures(count=16):
    """Noise with captions."""
    captions = [f"picture {i}" for i in range(count)]
    states = hashed_text(captions, 4, 8)
    sizes = torch.tensor([[8.0, 8, 0, 0, 8, 8]]).repeat(count, 1)
    return Pictures(torch.rand(count, 3, 8, 8) * 2 - 1, states, states.mean(1), sizes, captions)
