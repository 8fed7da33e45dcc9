"""Converted attention projections in the module tree, and so in Hugging Face folders."""

import copy
import sys
from pathlib import Path

import pytest
import skimp
import torch
from skimp.ir import Projection
from skimp.ir.errors import NothingToConvertError, VerificationError
from skimp.passes.base import Context
from skimp.passes.convert import prepare
from skimp.passes.lift import blocks, lifted_layers
from skimp.passes.project import Project
from skimp.passes.sparsify import Relufy

hf = pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent.parent / "passes"))
from test_project import ZOO, first_tensor, ids  # noqa: E402


def converted(name, stays=()):
    """What a conversion leaves, without its training; some projections stay linear, changed."""
    torch.manual_seed(0)
    model, inputs, *_ = ZOO[name]()
    gm, _ = prepare(model.eval(), inputs, expert_size=4, router_width=4, projections=True)
    gm = Relufy().run(gm, None).gm
    linear = copy.deepcopy(gm)
    gm = Project(tokens=0).run(gm, Context(linear, [inputs], [inputs])).gm
    for part in stays:
        layer = next(n for n in lifted_layers(linear) if part in n)
        gm.set_submodule(layer, copy.deepcopy(linear.get_submodule(layer)))
        with torch.no_grad():
            gm.get_submodule(layer).weight.mul_(1.5)  # as fine-tuning would
    skimp.set_tau(gm, 0.3)
    return model, inputs, gm


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "vit", "whisper"])
@torch.no_grad()
def test_a_folder_gives_what_the_graph_gives(name, tmp_path):
    model, inputs, gm = converted(name)
    skimp.save_pretrained(gm, model, tmp_path, inputs)
    again = type(model).from_pretrained(tmp_path).eval()
    count = ZOO[name]()[2]
    assert sum(b.linear for b in blocks(again).values()) == count
    want, got = first_tensor(gm(**inputs)), first_tensor(again(**inputs))
    assert (got - want).norm() <= 1e-5 * want.norm()


@torch.no_grad()
def test_what_stayed_linear_keeps_what_it_learnt(tmp_path):
    model, inputs, gm = converted("bert", stays=["0.attention.self.key", "1.attention.output"])
    assert sum(isinstance(p, Projection) for p in lifted_layers(gm).values()) == 2
    skimp.save_pretrained(gm, model, tmp_path, inputs)
    again = hf.BertModel.from_pretrained(tmp_path).eval()
    assert isinstance(again.encoder.layer[0].attention.self.key, torch.nn.Linear)
    want, got = first_tensor(gm(**inputs)), first_tensor(again(**inputs))
    assert (got - want).norm() <= 1e-5 * want.norm()


@torch.no_grad()
def test_a_decoder_generates_with_its_cache(tmp_path):
    model, inputs, gm = converted("llama")
    skimp.save_pretrained(gm, model, tmp_path, inputs)
    again = hf.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    batch = ids()
    again.generation_config.eos_token_id = None
    got = again.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
    tokens = batch["input_ids"]
    for _ in range(5):  # by the graph, which has no cache
        step = dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        following = gm(**step).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, following], -1)
    assert torch.equal(got, tokens)


def test_a_part_of_a_fused_layer_has_no_place(tmp_path):
    model, inputs, gm = converted("gpt2")
    with pytest.raises(NothingToConvertError, match=r"is a part of a fused linear layer\. Keep"):
        skimp.save_pretrained(gm, model, tmp_path, inputs)
    skimp.save(gm, tmp_path, inputs)  # the graph form is as good as ever
    again = skimp.load(tmp_path, model)
    with torch.no_grad():
        assert torch.equal(first_tensor(again(**inputs)), first_tensor(gm(**inputs)))


def test_projections_do_not_become_dense_again(tmp_path):
    model, inputs, gm = converted("bert")
    skimp.save_pretrained(gm, model, tmp_path / "a", inputs)
    with pytest.raises(VerificationError, match="projections were replaced by networks"):
        skimp.unconvert(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
