"""MLIR text of a small block, and an IREE module in a process that has neither torch nor skimp."""

import os
from pathlib import Path

import pytest
import skimp
import torch
from skimp.codegen import iree as door
from skimp.codegen.loaded import INDEX
from skimp.codegen.mlir import _groups
from skimp.ir.block import DynkFFN
from skimp.ir.errors import ArtefactError, ExportError
from torch import nn

pytest.importorskip("torch_mlir")
pytest.importorskip("iree.compiler")
from archives import rewritten
from fresh import check_fresh
from models import SHAPES


class One(nn.Module):
    """A block alone."""

    def __init__(self):
        super().__init__()
        size, gate = (8, 4), torch.arange(32).view(8, 4) % 3 / 4 - 0.25
        w_in, w_out = torch.linspace(-1, 1, 32).view(size), torch.linspace(1, -1, 32).view(size)
        self.block = DynkFFN(
            w_in, torch.arange(8) / 8, gate, None, w_out, None, expert_size=2, act="silu",
            router_width=2,
        )  # fmt: skip
        with torch.no_grad():
            self.block.router.down.weight.copy_(torch.linspace(-1, 1, 8).view(2, 4))
            self.block.router.up.weight.copy_(torch.linspace(-1, 2, 8).view(4, 2))

    def forward(self, x):
        return self.block(x)


@pytest.fixture(scope="module")
def one():
    model = One().eval()
    skimp.set_tau(model, 0.6)
    return model, {"x": torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="module")
def vmfb(one, tmp_path_factory):
    path = tmp_path_factory.mktemp("iree") / "m.vmfb"
    dynamic = {"x": dict.fromkeys((0, 1), torch.export.Dim.AUTO)}
    return path, skimp.export(*one, path, dynamic_shapes=dynamic)


def check_golden(text, name):
    path = Path(__file__).parents[1] / "golden" / "mlir" / f"{name}.expected"
    if os.environ.get("SKIMP_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_the_text_of_a_block(one, tmp_path):
    dynamic = {"x": dict.fromkeys((0, 1), torch.export.Dim.AUTO)}
    report = skimp.export(*one, tmp_path / "m.mlir", dynamic_shapes=dynamic)
    assert report.blocks == 1
    assert report.free == {"x": [0, 1]}
    check_golden((tmp_path / "m.mlir").read_text(), "linalg")
    raw = (tmp_path / "m.raw.mlir").read_text()
    assert raw.count('torch.operator "torch.skimp.dynk_ffn"') == 1
    check_golden(raw, "raw")


def test_a_fresh_process_over_five_shapes_and_three_thresholds(one, vmfb, tmp_path):
    model, path = one[0], vmfb[0]
    g = torch.Generator().manual_seed(1)
    inputs = [{"x": torch.randn(*shape, 4, generator=g)} for shape in SHAPES]
    check_fresh("iree", model, path, [(t, x) for t in (0.0, 0.9) for x in inputs], tmp_path)
    skimp.set_tau(model, 0.6)


@torch.no_grad()
def test_a_loaded_module_is_called_like_the_model(one, vmfb):
    model, example = one
    loaded = skimp.load(vmfb[0])
    outputs = []
    for tau in (None, 0.0, 0.95):
        if tau is not None:
            loaded.set_tau(tau)
            skimp.set_tau(model, tau)
        (got,) = loaded(**example).values()
        assert torch.allclose(got, model(**example), atol=1e-5)
        outputs.append(got)
    skimp.set_tau(model, 0.6)
    assert not torch.allclose(outputs[1], outputs[2], atol=1e-2)  # the knob does something
    with pytest.raises(ValueError, match="x missing"):
        loaded(y=example["x"])


def test_damage_of_any_kind(vmfb, tmp_path, monkeypatch):
    path, data = tmp_path / "m.vmfb", vmfb[0].read_bytes()
    for cut in (b"", data[: len(data) // 2], data[:-50]):
        path.write_bytes(cut)
        with pytest.raises(ArtefactError, match="damaged or truncated"):
            skimp.load(path)
    at = len(data) // 3
    path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    with pytest.raises(ArtefactError, match="damaged"):
        skimp.load(path)
    rewritten(vmfb[0], path, lambda n, d: None if n == INDEX else d)
    with pytest.raises(ArtefactError, match=r"not written by skimp\.export"):
        skimp.load(path)
    with pytest.raises(ArtefactError, match="does not exist"):
        skimp.load(tmp_path / "none.vmfb")
    monkeypatch.setattr("skimp.codegen.cpp.bundle.detect_isa", lambda: "portable")
    if door.detect_isa() != "portable":
        with pytest.raises(ArtefactError, match="this machine has portable"):
            skimp.load(vmfb[0])


def test_what_torch_mlir_cannot_lower(tmp_path, capfd):
    class Odd(One):
        def forward(self, x):
            return torch.special.bessel_j0(self.block(x))

    with pytest.raises(ExportError, match="torch-mlir cannot lower the model"):
        skimp.export(Odd().eval(), {"x": torch.ones(2, 3, 4)}, tmp_path / "m.mlir")
    assert "bessel_j0" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_runs_of_dimensions():
    assert _groups([2, 3, 4], [6, 4]) == [((0, 2), (0, 1)), ((2, 3), (1, 2))]
    assert _groups([2, 12], [2, 3, 4]) == [((0, 1), (0, 1)), ((1, 2), (1, 3))]
    assert _groups([4, 1], [4]) == [((0, 1), (0, 1)), ((1, 2), (1, 1))]
    assert _groups([6, 2], [4, 3]) == [((0, 2), (0, 2))]
    assert _groups([6], [4]) is None
