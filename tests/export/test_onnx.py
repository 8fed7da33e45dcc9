"""ONNX files in stock ONNX Runtime, in a process that has neither torch nor skimp."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import skimp
import torch
from skimp.codegen import onnx as door
from skimp.ir.errors import ExportError
from skimp.ir.op import ACTIVATIONS, reference

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))
from models import ids, minilm, small_bert  # noqa: E402

SHAPES = [(1, 1), (2, 7), (3, 6), (5, 9), (8, 16)]
STOCK = """
import json, sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 3
session = onnxruntime.InferenceSession(sys.argv[1], options, ["CPUExecutionProvider"])
names = [i.name for i in session.get_overridable_initializers()]
taus = json.loads(session.get_modelmeta().custom_metadata_map["skimp.taus"])
assert names == list(taus.values())
cases = np.load(sys.argv[2])
for i in range(int(cases["count"])):
    tau = cases[f"tau{i}"]
    feed = {n: tau for n in names} if tau >= 0 else {}
    want = cases[f"want{i}"]
    inputs = {n: cases[f"{n}{i}"] for n in ("input_ids", "attention_mask")}
    got = session.run(None, inputs | feed)[0]
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want), (i, tau, want.shape)
assert "torch" not in sys.modules and "skimp" not in sys.modules
"""


def run_stock(model, path, taus, tmp_path, default):
    arrays, i = {}, 0
    for tau in taus:
        skimp.set_tau(model, default if tau < 0 else tau)
        for shape in SHAPES:
            batch = ids(*shape)
            arrays |= {f"{n}{i}": v.numpy() for n, v in batch.items()}
            arrays |= {f"want{i}": model(**batch)[0].numpy(), f"tau{i}": np.float32(tau)}
            i += 1
    np.savez(tmp_path / "cases.npz", count=i, **arrays)
    # isolated: no PYTHONPATH, so nothing of the source tree can be imported
    command = [sys.executable, "-I", "-c", STOCK, str(path), str(tmp_path / "cases.npz")]
    got = subprocess.run(command, capture_output=True, text=True, check=False)
    assert got.returncode == 0, got.stderr


@torch.no_grad()
def test_stock_runtime_over_five_shapes_and_thresholds(tmp_path):
    model, path = small_bert(tau=0.3), tmp_path / "m.onnx"
    report = skimp.export(model, ids(), path)
    assert report.blocks == 10
    assert all(dims == [0, 1] for dims in report.free.values())
    nodes = [n for n in onnx.load(path).graph.node if n.domain == "skimp"]
    assert [n.op_type for n in nodes] == ["DynkFfn_relu"] * 10
    run_stock(model, path, [-1, 0.0, 0.9], tmp_path, default=0.3)


@torch.no_grad()
def test_minilm_with_its_projections(tmp_path):
    model, path = minilm(tau=0.3), tmp_path / "minilm.onnx"
    skimp.export(model, ids(), path)
    run_stock(model, path, [-1], tmp_path, default=0.3)


@torch.no_grad()
def test_large_weights_lie_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(door, "LARGE", 0)
    model, path = small_bert(), tmp_path / "m.onnx"
    report = skimp.export(model, ids(), path)
    beside = tmp_path / "m.onnx.data"
    assert report.bytes == path.stat().st_size + beside.stat().st_size
    assert beside.stat().st_size > 3 * path.stat().st_size
    run_stock(model, path, [-1], tmp_path, default=0.3)


def test_an_old_opset(tmp_path):
    with pytest.raises(ExportError, match=r"opset 11 is too old: the smallest .* is 18"):
        skimp.export(small_bert(), ids(), tmp_path / "m.onnx", opset=11)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("act", sorted(ACTIVATIONS))
def test_every_function_is_the_op(act, gated):
    g = torch.Generator().manual_seed(0)
    d, d_ff, size, rows = 6, 12, 3, 5
    x, scores = torch.randn(2, rows, d, generator=g), torch.rand(2, rows, d_ff // size, generator=g)
    scores[0, 0] = 0  # no evidence: every expert runs
    tau = torch.tensor(0.6)
    w_in, w_gate, w_out = (torch.randn(d_ff, d, generator=g) for _ in range(3))
    b_in, b_gate, b_out = (torch.randn(n, generator=g) for n in (d_ff, d_ff, d))
    want = reference(
        x, scores, tau, w_in, b_in, w_gate if gated else None, b_gate if gated else None, w_out,
        b_out, size, act,
    )  # fmt: skip
    values = dict(x=x, scores=scores, tau=tau, w_in=w_in, b_in=b_in, w_gate=w_gate, b_gate=b_gate,
                  w_out=w_out, b_out=b_out)  # fmt: skip
    made = door.function(act, gated)
    feed = {n: values[n].numpy() for n in made.input}
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    node = helper.make_node(made.name, list(made.input), ["y"], domain="skimp", expert_size=size)
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info(n, kind, v.shape) for n, v in feed.items()],
        [helper.make_tensor_value_info("y", kind, want.shape)],
    )  # fmt: skip
    model = helper.make_model(
        graph, functions=[made], ir_version=10,
        opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("skimp", 1)],
    )  # fmt: skip
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, feed)
    assert np.allclose(got, want.numpy(), rtol=1e-4, atol=1e-4)
