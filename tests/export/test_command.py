"""``skimp export``: the report, the floor, and a dry run that writes nothing."""

import json
import re

import pytest
import skimp
from skimp.cli import app
from skimp.ir.errors import ArtefactError
from typer.testing import CliRunner

hf = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
from models import SMALL, converted, ids  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A converted model, and the dense one it was made of."""
    root = tmp_path_factory.mktemp("command")
    model = hf.BertModel(hf.BertConfig(**SMALL))
    model.save_pretrained(root / "dense")
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]))
    hf.BertTokenizer(str(root / "vocab.txt")).save_pretrained(root / "dense")
    gm = converted(model, ids(), expert_size=8, router_width=64)
    skimp.save(gm, root / "sparse", ids())
    return root / "sparse", root / "dense"


def run(*args):
    return CliRunner().invoke(app, ["export", *map(str, args)], catch_exceptions=True)


def test_a_report_for_people_and_for_programs(folders, tmp_path, monkeypatch):
    sparse, dense = folders
    given = [sparse, "--model", dense]
    path = tmp_path / "copy"
    got = run(*given, "--to", "safetensors", "-o", path, "--json")
    assert got.exit_code == 0, got.output
    report = json.loads(got.stdout.splitlines()[-1])
    assert report["blocks"] == 5
    assert report["bytes"] == sum(f.stat().st_size for f in path.iterdir())
    assert report["errors"]["last_hidden_state"]["max"] == 0
    with pytest.raises(ArtefactError, match="pass the model it was converted from"):
        skimp.load(path)

    loaded = skimp.load(sparse, hf.AutoModel.from_pretrained(dense))
    monkeypatch.setattr("skimp.runtime.store.load", lambda *_: loaded)  # seconds each time
    got = run(*given, "--to", "safetensors", "-o", path)
    assert got.exit_code == 0, got.output
    assert "last_hidden_state" in got.stdout
    assert "in 5 blocks" in got.stdout
    held = {p.name: p.read_bytes() for p in path.iterdir()}
    skimp.set_tau(loaded, 0.9)  # another artefact, which is not good enough
    got = run(*given, "--to", "safetensors", "-o", path, "--tolerance", -1)
    assert "differs from the model by 0.0e+00" in str(got.exception)
    assert {p.name: p.read_bytes() for p in path.iterdir()} == held

    path = tmp_path / "m.pt2"
    got = run(*given, "-o", path, "--dry-run", "--json")
    assert got.exit_code == 0, got.output
    plan = json.loads(got.stdout.splitlines()[-1])
    assert plan["blocks"] == 5
    assert 0.5 < plan["coverage"] < 1
    for args, message in [
        (["--to", "onnx", "--floor", "0.999"], r"less than the floor of 99\.9%"),
        (["--to", "onnx", "--opset", "9"], "opset 9 is too old"),
    ]:
        got = run(*given, "-o", path, *args)
        assert got.exit_code == 1
        assert re.search(message, str(got.exception))
    assert not path.exists()


def test_what_is_refused(tmp_path):
    got = run(tmp_path)
    assert got.exit_code == 1
    assert "holds no converted model" in str(got.exception)
    assert "there is no door 'coreml'" in str(run(tmp_path, "--to", "coreml").exception)
