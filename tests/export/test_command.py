"""``skimp export``: the report, the floor, and a dry run that writes nothing."""

import json
import sys
from pathlib import Path

import pytest
import skimp
from skimp.cli import app
from typer.testing import CliRunner

hf = pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
sys.path.insert(0, str(Path(__file__).parent))
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


def test_a_report_for_people_and_for_programs(folders, tmp_path):
    sparse, dense = folders
    path = tmp_path / "m.onnx"
    got = run(sparse, "--to", "onnx", "--model", dense, "-o", path, "--json")
    assert got.exit_code == 0, got.output
    report = json.loads(got.stdout.splitlines()[-1])
    assert report["blocks"] == 5
    assert report["bytes"] == path.stat().st_size
    assert report["errors"]["last_hidden_state"]["relative"] <= 1e-4
    got = run(sparse, "--to", "safetensors", "--model", dense, "-o", tmp_path / "copy")
    assert got.exit_code == 0, got.output
    assert "last_hidden_state" in got.stdout
    assert "in 5 blocks" in got.stdout


def test_a_dry_run_writes_nothing(folders, tmp_path):
    sparse, dense = folders
    path = tmp_path / "m.pt2"
    got = run(sparse, "--model", dense, "-o", path, "--dry-run", "--json")
    assert got.exit_code == 0, got.output
    plan = json.loads(got.stdout.splitlines()[-1])
    assert plan["blocks"] == 5
    assert 0.5 < plan["coverage"] < 1
    assert not path.exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--to", "onnx", "--floor", "0.999"], "less than the floor of 99.9%"),
        (["--to", "coreml"], "there is no door 'coreml'"),
        (["--to", "onnx", "--opset", "9"], "opset 9 is too old"),
    ],
)
def test_what_is_refused(folders, tmp_path, args, message):
    sparse, dense = folders
    got = run(sparse, "--model", dense, "-o", tmp_path / "m", *args)
    assert got.exit_code == 1
    assert message in str(got.exception)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_model(tmp_path):
    got = run(tmp_path)
    assert "holds no converted model" in str(got.exception)
