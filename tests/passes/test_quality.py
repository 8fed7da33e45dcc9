"""FLOPs of whole models, against an independent count."""

import copy

import pytest
import torch
from skimp.passes.base import Context
from skimp.passes.convert import prepare
from skimp.passes.lift import blocks, lifted_layers
from skimp.passes.project import Project
from skimp.passes.quality import whole_model_flops

hf = pytest.importorskip("transformers")


def prepared(model, inputs, **options):
    gm, _ = prepare(model.eval(), inputs, **options)
    for block in blocks(gm).values():
        block.dense = True
    return gm


def test_vit_b16_is_17_56_giga_multiply_adds():
    """The figure of fvcore for ViT-B/16 at 224 pixels, of which 11.15 are FFNs and 5.58 QKVO."""
    inputs = dict(pixel_values=torch.randn(2, 3, 224, 224))
    gm = prepared(hf.ViTForImageClassification(hf.ViTConfig(num_labels=1000)), inputs,
                  projections=True)  # fmt: skip
    flops = whole_model_flops(gm, gm, inputs, {})
    tokens = (224 // 16) ** 2 + 1
    assert flops["dense"] * tokens / 2 == pytest.approx(17.56e9, rel=0.01)
    assert flops["ffn_dense"] * tokens / 2 == pytest.approx(11.15e9 + 5.58e9, rel=0.01)
    assert flops["whole_share"] == 1


def test_what_is_removed_is_what_experts_do_not_do():
    """A decoder's blocks see other rows than its encoder's; counted by hand."""
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=64, d_model=64, d_ff=48, d_kv=16, num_layers=1, num_heads=4, use_cache=False
    )
    inputs = dict(
        input_ids=torch.randint(2, 60, (3, 10)),
        attention_mask=torch.ones(3, 10).long(),
        decoder_input_ids=torch.randint(2, 60, (3, 5)),
    )
    teacher = prepared(hf.T5ForConditionalGeneration(config), inputs, expert_size=4,
                       router_width=4, projections=True)  # fmt: skip
    gm = Project(tokens=0).run(copy.deepcopy(teacher), Context(teacher, [inputs], [inputs])).gm
    for block in blocks(gm).values():
        block.dense = False
    rows = {n: 15 if n.startswith("decoder") else 30 for n in lifted_layers(gm)}
    cross = [n for n in rows if "EncDecAttention.k" in n or "EncDecAttention.v" in n]
    assert len(cross) == 2
    rows |= dict.fromkeys(cross, 30)  # keys and values of what the encoder gave
    flops = whole_model_flops(teacher, gm, inputs, dict.fromkeys(rows, 2.0))
    removed = 0.0
    for name, block in blocks(gm).items():
        dense = 2 * 64 * 64 if block.linear else 2 * 2 * 64 * 48
        width = block.router.down.out_features
        spent = 2 * width * (64 + block.experts) + 2 * block.expert_size * 2 * (64 + 64)
        removed += (dense - spent) * rows[name]
    assert (flops["dense"] - flops["converted"]) * 30 == pytest.approx(removed)
    assert flops["whole_share"] == pytest.approx(flops["converted"] / flops["dense"])
