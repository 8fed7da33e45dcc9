"""The pipeline on a small real architecture: parity, budget, resuming, and bad input."""

import copy
import json
import math
import os
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import skimp
import torch
from skimp.ir import artefact
from skimp.ir.cost import DRAFT, ffn_share
from skimp.ir.cost import evaluate as cost
from skimp.ir.errors import (
    ArtefactError,
    BadWeightsError,
    CalibrationError,
    NothingToConvertError,
    VerificationError,
)
from skimp.ir.text import BlockLine, parse
from skimp.passes.base import Context, Pass, PassResult, expert_norms, hoyer
from skimp.passes.budget import Budget, parse_target
from skimp.passes.convert import prepare
from skimp.passes.lift import blocks
from skimp.passes.pipeline import run
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

transformers = pytest.importorskip("transformers")


def bert(seed=0, **more):
    torch.manual_seed(seed)
    config = dict(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64,
    )  # fmt: skip
    return transformers.BertModel(transformers.BertConfig(**config | more)).eval()


def data(count=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    result = []
    for i in range(count):
        tokens = torch.randint(2, 60, (8, 6 + i), generator=g)
        mask = torch.ones_like(tokens)
        mask[0, 3:] = 0
        result.append(dict(input_ids=tokens, attention_mask=mask))
    return result


QUICK = [
    Relufy(),
    Sparsify(tokens=600, chunk=300, batch=64),
    Split(),
    Route(tokens=300, steps=20),
    Recover(steps=3, share=0.5),
    Budget("flops <= 0.8"),
]


def quick(model, **more):
    return skimp.convert(model, data(), passes=QUICK, expert_size=4, router_width=4, **more)


def test_conversion_changes_only_its_copy_and_meets_its_budget():
    model = bert()
    before = copy.deepcopy(model.state_dict())
    done = quick(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert [r["pass"].split("{")[0] for r in done.history] == [p.name for p in QUICK]
    assert done.history[-1]["stats"]["tried"][-1]["flops"] <= 0.8
    assert all(b.act == "relu" and 0 < float(b.tau) < 1 for b in blocks(done.model).values())
    batch = data()[0]
    assert type(done.model(**batch)) is type(model(**batch))


def test_tau_zero_is_the_dense_relufied_model():
    done = quick(bert())
    skimp.set_tau(done.model, 0.0)
    batch = data()[1]
    got = done.model(**batch)[0]
    dense = copy.deepcopy(done.model)
    for b in blocks(dense).values():
        b.dense = True
    want = dense(**batch)[0]
    assert (got - want).norm() <= 1e-5 * want.norm()


def test_training_lowers_the_error_and_makes_zeros():
    done = quick(bert())
    sparse = next(r for r in done.history if r["pass"].startswith("sparsify"))["stats"]["blocks"]
    assert all(s["zeros"] > 0.3 and math.isfinite(s["error"]) for s in sparse.values())
    teacher, _ = prepare(bert(), data()[0], expert_size=4, router_width=4)
    context = Context(teacher, data(), data(2, seed=1))
    few = Sparsify(tokens=300, chunk=300).run(
        Relufy().run(copy.deepcopy(teacher), context).gm, context
    )
    many = Sparsify(tokens=6000, chunk=300, epochs=4, lr=2e-3, alpha=0).run(
        Relufy().run(copy.deepcopy(teacher), context).gm, context
    )
    for name in blocks(teacher):
        assert many.stats["blocks"][name]["error"] < 0.5 * few.stats["blocks"][name]["error"]


def test_norms_are_those_of_the_experts_outputs():
    gm, _ = prepare(bert(), data()[0], expert_size=4, router_width=4)
    block = next(iter(blocks(gm).values()))
    h = block.hidden(torch.randn(5, 32))
    want = torch.stack(
        [
            (h[:, i * 4 : i * 4 + 4] @ block.w_out[i * 4 : i * 4 + 4]).norm(dim=-1)
            for i in range(16)
        ],
        -1,
    )
    assert torch.allclose(expert_norms(block, h), want, atol=1e-5)


def test_hoyer_is_one_over_n_for_one_hot_and_one_for_constant():
    assert float(hoyer(torch.eye(8)[0])) == pytest.approx(1 / 8)
    assert float(hoyer(torch.full((8,), 3.0))) == pytest.approx(1)


def test_flops_agree_with_an_independent_count():
    gm, _ = prepare(bert(), data()[0], expert_size=4, router_width=4)
    block = next(iter(blocks(gm).values()))
    x = torch.randn(10, 32)
    with FlopCounterMode(display=False) as counter:
        block.router(x)
    assert counter.get_total_flops() == cost("router_flops", block, rows=10)
    with FlopCounterMode(display=False) as counter:
        block.hidden(x) @ block.w_out
    assert counter.get_total_flops() == cost("dense_flops", block, rows=10)
    # by hand: 3 of 16 experts of 4 neurons, each d multiply-adds in and d_out out
    by_hand = 2 * (32 * 4 + 4 * 16) + 3 * 4 * 2 * (32 + 32)
    assert cost("flops", block, k=3) == pytest.approx(by_hand)
    share = ffn_share(dict.fromkeys(blocks(gm), 3.0), blocks(gm))
    assert share == pytest.approx(by_hand / (2 * 64 * 64))


def test_text_form_parses_back():
    gm, _ = prepare(bert(), data()[0], expert_size=4, router_width=4)
    for name, block in blocks(gm).items():
        line = BlockLine.of(name, block)
        assert parse(str(line)) == line
    with pytest.raises(ValueError, match="not a block line"):
        parse("mlp: linear")


@pytest.mark.parametrize("text", ["cosine <= 0.9", "flops >= 0.5", "fast", "flops <= 1.5"])
def test_a_budget_that_makes_no_sense_is_refused(text):
    with pytest.raises(ValueError, match="is neither like"):
        parse_target(text)


def test_cosine_budget_spends_no_more_than_it_must():
    done = skimp.convert(
        bert(), data(), passes=[*QUICK[:-1], Budget("cosine >= 0.9")], expert_size=4, router_width=4
    )
    tried = done.history[-1]["stats"]["tried"]
    assert tried[-1]["cosine"] >= 0.9
    assert tried[-1]["flops"] < 1.1


def test_nothing_to_convert():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x).tanh()

    with pytest.raises(NothingToConvertError, match="no feed-forward network"):
        skimp.convert(Plain(), [dict(x=torch.randn(3, 4))] * 3)


def test_weights_that_are_not_finite():
    model = bert()
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = math.nan
    with pytest.raises(BadWeightsError, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        quick(model)


@pytest.mark.parametrize("few", [[], data(1)])
def test_too_little_data(few):
    with pytest.raises(CalibrationError, match="give"):
        skimp.convert(bert(), few)


def test_no_passages_at_all():
    with pytest.raises(CalibrationError, match="empty"):
        skimp.batches(None, [])
    with pytest.raises(CalibrationError, match="1 calibration passages"):
        skimp.hold_out(["one sentence"], 1)


class Break(Pass):
    name = "break"

    def run(self, gm, context):
        with torch.no_grad():
            next(iter(blocks(gm).values())).w_in.fill_(math.inf)
        return PassResult(gm, True, {})


def test_a_pass_that_breaks_the_model_is_named():
    gm, _ = prepare(bert(), data()[0], expert_size=4, router_width=4)
    with pytest.raises(VerificationError, match=r"break \(after relufy\{\}\) left values"):
        run([Relufy(), Break()], gm, Context(gm, data(), data()))


def test_dumps_and_fuel(tmp_path, monkeypatch):
    monkeypatch.setenv("SKIMP_DUMP", str(tmp_path))
    monkeypatch.setenv("SKIMP_FUEL", "2")
    gm, _ = prepare(bert(), data()[0], expert_size=4, router_width=4)
    out, history = run([Relufy(), Split(), Break()], gm, Context(gm, data(), data()))
    assert len(history) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["01-relufy.py", "02-split.py"]
    assert "dynk_ffn<relu, 32 -> 64 -> 32, 16 x 4" in (tmp_path / "02-split.py").read_text()
    marks = [n.meta["skimp.provenance"] for n in out.graph.nodes if n.op == "call_module"]
    assert marks == [("lift", "relufy", "split")] * 2


def test_a_finished_stage_is_not_run_again(tmp_path):
    first = quick(bert(), folder=tmp_path)
    left = tmp_path / f"{DRAFT}skimp.json.x"  # by a kill once the last stage was in its place
    left.mkdir()
    os.utime(left, (0, 0))
    seen = []
    again = quick(bert(), folder=tmp_path, progress=lambda stage, *_: seen.append(stage))
    assert seen == []
    assert not left.exists()
    assert again.history == first.history
    for a, b in zip(
        first.model.state_dict().values(), again.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    other = quick(bert(seed=1), folder=tmp_path)  # another model never goes on from it
    assert other.history != first.history


KILLED = """
import os, signal, sys, torch
sys.path.insert(0, {tests!r})
import test_convert as t
stage = sys.argv[1]
def progress(name, done, total, note=""):
    if name == stage and done == 0:
        os.kill(os.getpid(), signal.SIGKILL)
t.quick(t.bert(), folder={folder!r}, progress=progress)
"""


def test_a_killed_conversion_goes_on_where_it_was(tmp_path):
    whole = quick(bert(), folder=tmp_path / "whole")
    folder = tmp_path / "killed"
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    for stage in ("split", "recover"):
        got = subprocess.run([sys.executable, "-c", script, stage], check=False)
        assert got.returncode == -signal.SIGKILL
    stages = []
    done = quick(bert(), folder=folder, progress=lambda stage, *_: stages.append(stage))
    assert dict.fromkeys(stages) == dict.fromkeys(["recover", "budget"])
    pairs = zip(whole.model.state_dict().items(), done.model.state_dict().values(), strict=True)
    for (name, a), b in pairs:
        assert torch.allclose(a, b, atol=1e-4), name


KILLED_WRITING = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_convert as t
real, count = os.replace, 0
def replace(here, there):
    global count
    count += Path(there) == Path({folder!r}, t.artefact.INDEX)
    if count == 2:  # the second stage's index, its weights being in place: between the two
        os.kill(os.getpid(), signal.SIGKILL)
    real(here, there)
os.replace = replace
t.quick(t.bert(), folder={folder!r})
"""


def test_a_kill_while_a_stage_is_written_leaves_the_stage_before(tmp_path):
    script = KILLED_WRITING.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    got = subprocess.run([sys.executable, "-c", script], check=False)
    assert got.returncode == -signal.SIGKILL
    stages = []
    quick(bert(), folder=tmp_path, progress=lambda stage, *_: stages.append(stage))
    assert stages[0] == "sparsify"  # relufy was whole on disk, sparsify was not


def test_a_full_disk_during_conversion_loses_no_finished_stage(tmp_path):
    def fill(stage, done, total, note=""):
        if stage == "split" and done == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))

    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(ArtefactError, match="free some space"):
            quick(bert(), folder=tmp_path, progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    stages = []
    quick(bert(), folder=tmp_path, progress=lambda stage, *_: stages.append(stage))
    assert stages[0] == "split"


def test_saved_and_loaded_it_is_the_same(tmp_path):
    done, batch = quick(bert()), data()[2]
    skimp.save(done.model, tmp_path, batch)
    again = skimp.load(tmp_path, bert(seed=5))
    assert torch.equal(done.model(**batch)[0], again(**batch)[0])
    with pytest.raises((OSError, ValueError)):  # a library that does not know it finds no model
        transformers.AutoModel.from_pretrained(tmp_path)


def test_damaged_foreign_and_future_artefacts(tmp_path):
    done, batch = quick(bert()), data()[2]
    skimp.save(done.model, tmp_path, batch)
    with pytest.raises(ArtefactError, match="another architecture"):
        skimp.load(tmp_path, bert(num_hidden_layers=1))
    weights = next(tmp_path.glob("weights-*"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ArtefactError, match="damaged or truncated"):
        skimp.load(tmp_path, bert())
    weights.unlink()
    with pytest.raises(ArtefactError, match="cannot be read"):
        skimp.load(tmp_path, bert())
    index = tmp_path / artefact.INDEX
    saved = json.loads(index.read_text())
    for text, match in (
        (json.dumps(saved | {"version": 99}), "reads version 1"),
        (json.dumps({"format": "other"}), "not written by skimp"),
        ("{", "cannot be read"),
    ):
        index.write_text(text)
        with pytest.raises(ArtefactError, match=match):
            skimp.load(tmp_path, bert())
    index.unlink()
    with pytest.raises(ArtefactError, match="holds no"):
        skimp.load(tmp_path, bert())


def test_a_full_disk_leaves_what_was_there(tmp_path):
    done, batch = quick(bert()), data()[2]
    skimp.save(done.model, tmp_path, batch)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        next(done.model.parameters()).add_(1)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(ArtefactError, match="free some space"):
            skimp.save(done.model, tmp_path, batch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_import_is_light():
    code = textwrap.dedent(
        """
        import sys, skimp
        heavy = {"transformers", "sympy.core", "matplotlib", "typer", "rich", "safetensors"}
        base = {m for m in sys.modules}
        assert not {"transformers", "matplotlib", "typer"} & base, base & heavy
        """
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_set_tau_says_what_is_wrong():
    done = quick(bert())
    with pytest.raises(ValueError, match="outside"):
        skimp.set_tau(done.model, 1.5)
    with pytest.raises(ValueError, match="no block is named"):
        skimp.set_tau(done.model, {"nowhere": 0.1})
    with pytest.raises(ValueError, match="convert it first"):
        skimp.set_tau(nn.Linear(2, 2), 0.1)
