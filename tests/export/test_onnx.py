"""ONNX files in ONNX Runtime, in a process that has neither torch nor skimp."""

import itertools

import numpy as np
import pytest
import skimp
import torch
from skimp.codegen import onnx as door
from skimp.codegen.cpp import bundle
from skimp.codegen.cpp.build import build
from skimp.codegen.cpp.ort import compile_operators, emit_operators
from skimp.codegen.cpp.spec import FLAGS
from skimp.codegen.ort import Session, operators, specs_of
from skimp.ir.errors import ArtefactError, ExportError
from skimp.ir.op import ACTIVATIONS, SCORED

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")
from fresh import check_fresh  # noqa: E402
from models import SHAPES, ids, one_node  # noqa: E402

CASES = [(tau, ids(*shape)) for tau in (0.3, 0.0, 0.9) for shape in SHAPES]


def test_stock_runtime_over_five_shapes_and_thresholds(small, onnx_file, tmp_path):
    path, report = onnx_file
    assert report.blocks == 1
    assert all(dims == [0, 1] for dims in report.free.values())
    nodes = [n for n in onnx.load(path).graph.node if n.domain == "skimp"]
    assert [n.op_type for n in nodes] == ["DynkFfn_relu"]
    assert int(check_fresh("onnx", small, path, CASES, tmp_path)) == 0


def test_the_library_of_kernels_over_five_shapes_and_thresholds(small, onnx_file, tmp_path):
    path, _ = onnx_file
    assert int(check_fresh("onnx", small, path, CASES, tmp_path, f"{path}.so")) == 1


@torch.no_grad()
def test_a_loaded_file_is_called_like_the_model(small, onnx_file):
    loaded = skimp.load(onnx_file[0])
    skimp.set_tau(small, 0.3)
    one = next(iter(loaded.taus))
    for tau in (None, 0.7, {one: 0.1}):
        if tau is not None:
            loaded.set_tau(tau)
            skimp.set_tau(small, tau)
        got, want = loaded(**ids()), small(**ids())
        assert torch.allclose(got["last_hidden_state"], want["last_hidden_state"], atol=1e-4)
    with pytest.raises(ValueError, match="outside"):
        loaded.set_tau(-0.1)


@torch.no_grad()
def test_large_weights_lie_beside(small, onnx_file, tmp_path, monkeypatch):
    skimp.set_tau(small, 0.3)
    monkeypatch.setattr(door, "LARGE", 0)
    monkeypatch.setattr(door, "to_model", lambda *_: onnx.load(onnx_file[0]))  # made already
    path = tmp_path / "m.onnx"
    report = skimp.export(small, ids(), path, metric=lambda run: float(run(**ids())[0].mean()))
    assert report.metric["artefact"] == pytest.approx(report.metric["model"], rel=1e-4)
    (beside,) = tmp_path.glob("m.onnx.*.data")
    assert report.bytes == path.stat().st_size + beside.stat().st_size
    assert beside.stat().st_size > 5000
    check_fresh("onnx", small, path, CASES, tmp_path)
    monkeypatch.chdir(tmp_path)
    skimp.set_tau(small, 0.3)
    skimp.export(small, ids(), path.name)  # the same again, in the folder where it lies
    beside.unlink()
    with pytest.raises(ArtefactError, match=r"m\.onnx"):
        skimp.load(path)


def test_an_old_opset(small, tmp_path):
    with pytest.raises(ExportError, match=r"opset 11 is too old: the smallest .* is 18"):
        skimp.export(small, ids(), tmp_path / "m.onnx", opset=11)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("opset", [21, 23])
def test_a_later_opset(small, tmp_path, opset):
    skimp.export(small, ids(), tmp_path / "m.onnx", opset=opset)
    versions = {o.domain: o.version for o in onnx.load(tmp_path / "m.onnx").opset_import}
    assert versions[""] == opset
    loaded = skimp.load(tmp_path / "m.onnx")
    for tau in (0.3, 0.8):
        loaded.set_tau(tau)
        skimp.set_tau(small, tau)
        got, want = loaded(**ids()), small(**ids())
        assert torch.allclose(got["last_hidden_state"], want["last_hidden_state"], atol=1e-4)


def test_an_opset_that_is_not_there_yet(small, tmp_path):
    with pytest.raises(ExportError, match="opset 99"):
        skimp.export(small, ids(), tmp_path / "m.onnx", opset=99)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("act", "gated"), [*itertools.product(sorted(ACTIVATIONS), (False, True)), (SCORED, False)]
)
def test_every_function_is_the_op(act, gated):
    model, feed, want = one_node(act, gated)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.allclose(session.run(None, feed)[0], want, rtol=1e-4, atol=1e-4)


def native(model, library):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library))
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def test_gated_blocks_of_few_and_of_many_rows_on_kernels():
    model = one_node("silu", True)[0]
    del model.functions[:]  # there is nothing else to run
    session = native(model, compile_operators(specs_of(model)))
    for rows in [(1, 1), (3, 7), (2, 70), (5, 129)]:
        _, feed, want = one_node("silu", True, rows)
        assert np.allclose(session.run(None, feed)[0], want, rtol=1e-4, atol=1e-4)
    _, feed, want = one_node("silu", True)
    feed["scores"][0, 1, 2] = np.nan  # runs every expert, as in the op
    one = dict(one_node("silu", True)[1], tau=np.array(0, np.float32))
    assert np.allclose(session.run(None, feed)[0][0, 1], session.run(None, one)[0][0, 1], atol=1e-4)
    feed["x"][1, 1, 1] = np.nan
    got = session.run(None, feed)[0]
    assert np.isnan(got[1, 1]).all()
    assert np.allclose(got[1, 2], want[1, 2], atol=1e-4)
    assert session.run(None, {**feed, "x": feed["x"][:, :0], "scores": feed["scores"][:, :0]})
    with pytest.raises(Exception, match="do not fit one another"):
        session.run(None, feed | dict(scores=feed["scores"][:, :4]))


def test_weighted_experts_of_few_and_of_many_rows_on_kernels():
    model = one_node(SCORED, False)[0]
    del model.functions[:]
    session = native(model, compile_operators(specs_of(model)))
    for rows in [(1, 1), (3, 7), (2, 70), (5, 129)]:
        _, feed, want = one_node(SCORED, False, rows)
        assert np.allclose(session.run(None, feed)[0], want, rtol=1e-4, atol=1e-4)


def test_a_library_of_another_model(onnx_file):
    model, feed, _ = one_node("relu", False)
    session = native(model, f"{onnx_file[0]}.so")
    with pytest.raises(Exception, match="made for another model"):
        session.run(None, feed)


def test_a_library_for_another_processor(tmp_path, onnx_file, monkeypatch):
    # as if for a feature that no processor of today has
    monkeypatch.setitem(bundle._FEATURES, "avx2", ("avx512er",))
    monkeypatch.setitem(bundle._FEATURES, "avx512", ("avx512er",))
    monkeypatch.setitem(bundle._FEATURES, "avx512_bf16", ("avx512er",))
    specs = specs_of(one_node("identity", False)[0])
    library = build(emit_operators(specs), "other", FLAGS[specs[0].isa])
    with pytest.raises(ArtefactError, match="this machine has no avx512er"):
        Session(onnx_file[0], library=library._name)


def test_damage_of_any_kind(onnx_file, tmp_path):
    path, data = tmp_path / "m.onnx", onnx_file[0].read_bytes()
    for share in (0.2, 0.5, 0.99):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ArtefactError, match=r"truncated|damaged"):
            skimp.load(path)
    model = onnx.load(onnx_file[0])
    weights = max((t.raw_data for t in model.graph.initializer), key=len)
    at = data.index(weights) + len(weights) // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ArtefactError, match="is damaged; export the model again"):
        skimp.load(path)
    path.write_bytes(b"")
    with pytest.raises(ArtefactError, match="not written by"):
        operators(path)
    onnx.save(one_node("relu", False)[0], path)
    with pytest.raises(ArtefactError, match=r"not written by skimp\.export"):
        skimp.load(path)
    with pytest.raises(ArtefactError, match="does not exist"):
        skimp.load(tmp_path / "none.onnx")
    with pytest.raises(ArtefactError, match="cannot be registered"):
        Session(onnx_file[0], library=tmp_path / "none.so")


SEEN = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
"""By rows, which keys each sees; one sees none."""


@pytest.mark.parametrize(
    ("mask", "more"),
    [
        (None, {}),
        (None, {"scale": 0.3}),
        (None, {"is_causal": True}),
        (SEEN, {}),
        (SEEN[:1], {}),
        (SEEN[:, :1].expand(2, 1, 3, 1), {"enable_gqa": True}),
        (torch.zeros(SEEN.shape).masked_fill(~SEEN, -torch.inf), {}),
        (torch.zeros(SEEN.shape).masked_fill(~SEEN, torch.finfo().min), {}),
        (torch.linspace(-2, 2, 15).view(1, 1, 3, 5), {"enable_gqa": True}),
    ],
)
@pytest.mark.parametrize("opset", [18, 23])
def test_attention_is_torch_s_where_a_row_sees_no_key_too(mask, more, opset):
    from skimp.codegen.onnx_attention import SDPA, attention

    class Attention(torch.nn.Module):
        def forward(self, q, k, v, mask=None):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **more)

    generator = torch.Generator().manual_seed(0)
    heads = 2 if "enable_gqa" in more else 4
    inputs = [torch.randn(2, n, m, 8, generator=generator) for n, m in ((4, 3), (heads, 5))]
    inputs += [torch.randn(inputs[1].shape, generator=generator)]
    inputs += [] if mask is None else [mask]
    made = torch.onnx.export(
        Attention().eval(), tuple(inputs), dynamo=True, verbose=False, opset_version=opset,
        custom_translation_table={SDPA: attention},
    )  # fmt: skip
    session = ort.InferenceSession(made.model_proto.SerializeToString())
    names = [i.name for i in session.get_inputs()]
    got = session.run(None, dict(zip(names, (t.numpy() for t in inputs), strict=True)))[0]
    assert np.allclose(got, Attention()(*inputs), rtol=1e-5, atol=1e-6)
