"""Converted models for the export tests, without training."""

import copy

import skimp
import torch
import transformers as hf
from skimp.ir.block import DynkFFN
from skimp.passes.base import Context
from skimp.passes.convert import prepare
from skimp.passes.project import Project
from skimp.passes.sparsify import Relufy

SMALL = dict(
    hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=64
)


def ids(batch=3, length=6, most=60):
    g = torch.Generator().manual_seed(batch * 100 + length)
    tokens = torch.randint(2, most, (batch, length), generator=g)
    return dict(input_ids=tokens, attention_mask=torch.ones_like(tokens))


def converted(model, inputs, tau=0.3, **sizes):
    """What a conversion leaves: networks and projections are blocks, with random routers."""
    torch.manual_seed(0)
    gm, _ = prepare(model.eval(), inputs, projections=True, **sizes)
    gm = Relufy().run(gm, None).gm
    gm = Project(tokens=0).run(gm, Context(copy.deepcopy(gm), [inputs], [inputs])).gm
    skimp.set_tau(gm, tau)
    return gm


class Tiny(torch.nn.Module):
    """Embeddings, a block, and a mask: quick through every door."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(64, 16)
        w_in, w_out = torch.randn(24, 16), torch.randn(24, 16)
        sizes = dict(expert_size=4, act="relu", router_width=4)
        self.block = DynkFFN(w_in, torch.randn(24), None, None, w_out, torch.randn(16), **sizes)
        self.out = torch.nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask):
        y = self.out(self.block(self.embed(input_ids))) * attention_mask.unsqueeze(-1)
        return {"last_hidden_state": y, "mean": y.mean(1)}


class TinyGate(torch.nn.Module):
    """The same with a gated block, whose gate is its router."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(64, 16)
        w_in, w_gate, w_out = torch.randn(3, 24, 16) / 4
        sizes = dict(expert_size=1, act="silu", router_width=0, tau=0.3)
        self.block = DynkFFN(w_in, None, w_gate, torch.randn(24), w_out, None, **sizes)

    def forward(self, input_ids, attention_mask):
        y = self.block(self.embed(input_ids)) * attention_mask.unsqueeze(-1)
        return {"last_hidden_state": y}


def small_llama(tau=0.3):
    """A decoder with one layer, as it leaves Python."""
    from skimp.runtime.cached import CachedStep

    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, intermediate_size=48, initializer_range=0.3,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval()
    gm = converted(model, ids(), tau, expert_size=4, router_width=4)
    return CachedStep(skimp.graft(gm, model, ids()))


def smollm2(tau=0.3):
    """The embedded decoder, networks and projections converted, as it leaves Python."""
    from skimp.runtime.cached import CachedStep
    from skimp.runtime.models import load_pretrained

    model = load_pretrained("smollm2").model
    gm = converted(model, ids(), tau)
    return CachedStep(skimp.graft(gm, model, ids()))


def small_bert(tau=0.3):
    torch.manual_seed(0)
    model = hf.BertModel(hf.BertConfig(initializer_range=0.2, **SMALL))
    return converted(model, ids(), tau, expert_size=4, router_width=4)


def minilm(tau=0.3):
    """The embedded encoder, networks and projections converted."""
    from skimp.runtime.models import load_pretrained

    return converted(load_pretrained("minilm").model, ids(), tau)


SHAPES = [(1, 1), (2, 7), (3, 6), (5, 9), (8, 16)]


def one_node(act, gated, rows=(2, 5), seed=0):
    """An ONNX model of one block, its inputs, and what the op makes of them."""
    import onnx
    from skimp.codegen import onnx as door
    from skimp.ir.op import SCORED, reference

    g = torch.Generator().manual_seed(seed)

    def r(*shape):
        return torch.randn(*shape, generator=g)

    d, d_ff, size = 6, 12, 3
    values = dict(
        x=None, scores=None, tau=torch.tensor(0.6), w_in=r(d_ff, d), b_in=r(d_ff),
        w_gate=r(d_ff, d), b_gate=r(d_ff), w_out=r(d_ff, d), b_out=r(d),
    )  # fmt: skip
    values["scores"] = torch.rand(*rows, d_ff // size, generator=g)
    values["scores"][0, 0] = 0  # no evidence: every expert runs
    values["x"] = r(*rows, d)
    if act == SCORED:
        values["scores"] *= torch.where(values["x"].sum(-1, keepdim=True) < 0, -1, 1)
    if not gated:
        values |= dict(w_gate=None, b_gate=None)
    want = reference(**values, expert_size=size, act=act)
    made = door.function(act, gated)
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(made.name, list(made.input), ["y"], domain="skimp", expert_size=size)
    weights = {n: values[n].numpy() for n in made.input if n[0] in "wb"}
    feed = {n: values[n].numpy() for n in made.input if n not in weights}
    lead = [f"n{i}" for i in range(len(rows))]
    shapes = dict(x=[*lead, d], scores=[*lead, d_ff // size], tau=[])
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info(n, kind, shapes[n]) for n in feed],
        [helper.make_tensor_value_info("y", kind, [*lead, d])],
        [onnx.numpy_helper.from_array(v, n) for n, v in weights.items()],
    )  # fmt: skip
    model = helper.make_model(
        graph, functions=[made], ir_version=10,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("skimp", 1)],
    )  # fmt: skip
    return model, feed, want.numpy()
