"""The examples in their quick form, the notebook cell by cell, and what is asked of all of them."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
pytest.importorskip("diffusers")
pytest.importorskip("onnxscript")
FOLDER = Path(__file__).parent.parent / "examples"
sys.path.insert(0, str(FOLDER))
SCRIPTS = [p for p in sorted(FOLDER.rglob("*.py")) if p.name not in ("small.py", "member.py")]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What they write goes to a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")


def test_an_encoder():
    import encoder

    far = encoder.main(quick=True)
    assert far["tau 0.0"] < far["tau 0.1"] < far["tau 0.5"] < 1
    assert Path("out/encoder").is_dir()


def test_a_decoder(capsys):
    import decoder

    assert decoder.main(quick=True, tokens=12).shape == (1, 12 + 12)
    assert "perplexity" in capsys.readouterr().out


def test_a_u_net():
    import unet

    report = unet.main(quick=True)
    assert 0 < report["parameters"]["left"] < report["flops"]["left"] < 1


def test_out_of_python(capsys):
    import leave_python

    assert leave_python.main(quick=True).blocks == 2
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("tau")]
    assert len(lines) == 4
    plain, native = lines[:2], lines[2:]
    assert [x.rsplit(" ", 1)[0] for x in plain] == [x.rsplit(" ", 1)[0] for x in native]
    firsts = [[float(x.rsplit(" ", 1)[1]) for x in part] for part in (plain, native)]
    assert firsts[0] == pytest.approx(firsts[1], abs=1e-4)
    assert abs(firsts[0][0] - firsts[0][1]) > 1e-3  # the knob does something


def test_a_pass_of_ones_own():
    import own_pass

    found = own_pass.main(quick=True)
    assert list(found) == ["split", "hot-first"]
    assert all(0 < cosine < 1 for cosine in found.values())


def test_the_notebook_runs_from_top_to_bottom(capsys):
    notebook = json.loads((FOLDER / "tour.ipynb").read_text())
    space = {"__name__": "__main__"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            assert cell["execution_count"] is None
            exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
    assert len(space["found"].sites) == 2
    assert space["curve"][-1]["cosine"] > space["curve"][0]["cosine"]
    assert torch.equal(space["ours"], space["theirs"])
    assert "tau 0.6" in capsys.readouterr().out


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_each_is_short_and_begins_with_main(path):
    text = path.read_text()
    assert len(text.splitlines()) < 80
    assert "\ndef main(" in text
    assert 'if __name__ == "__main__":' in text
