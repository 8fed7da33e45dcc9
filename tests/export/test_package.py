"""A .pt2 in a fresh process: the same numbers, a knob that turns, and errors that say why."""

import json
import shutil
import zipfile

import pytest
import skimp
import torch
from skimp.codegen import package
from skimp.codegen.exported import capture
from skimp.codegen.loaded import INDEX
from skimp.ir.errors import ArtefactError, ExportError
from torch import nn

pytest.importorskip("transformers")
from archives import rewritten
from fresh import check_fresh
from models import SHAPES, ids


@pytest.fixture
def made(small, pt2):
    skimp.set_tau(small, 0.3)
    return small, *pt2


def test_a_fresh_process_gives_the_same_over_five_shapes_and_three_thresholds(made, tmp_path):
    model, path, report = made
    assert report.blocks == 1
    assert report.coverage > 0.5
    assert all(dims == [0, 1] for dims in report.free.values())
    assert max(e["relative"] for e in report.errors.values()) <= 1e-4
    cases = [(tau, ids(*shape)) for tau in (0.0, 0.3, 0.9) for shape in SHAPES]
    check_fresh("pt2", model, path, cases, tmp_path)


@torch.no_grad()
def test_a_loaded_package_is_called_like_the_model(made):
    model, path, _ = made
    loaded, outputs = skimp.load(path), []
    for tau in (0.3, 0.9):
        loaded.set_tau(tau)
        skimp.set_tau(model, tau)
        # strides other than those of the example, which compiled code does not look at
        inputs = {n: t.T.contiguous().T for n, t in ids(4, 7).items()}
        outputs.append(loaded(**inputs)["last_hidden_state"])
        assert torch.allclose(outputs[-1], model(**inputs)["last_hidden_state"], atol=1e-4)
    assert not torch.allclose(*outputs, atol=1e-2)  # the knob does something


def test_a_threshold_that_fits_no_block_is_refused(made):
    loaded = skimp.load(made[1])
    with pytest.raises(ValueError, match="outside"):
        loaded.set_tau(1.5)
    with pytest.raises(ValueError, match="no block is named 'x'"):
        loaded.set_tau({"x": 0.5})


def test_a_missing_kernel_library(made, tmp_path):
    path = rewritten(
        made[1], tmp_path / "m.pt2", lambda n, d: None if n.endswith(package.LIBRARY) else d
    )
    with pytest.raises(ArtefactError, match="lacks its kernel library"):
        skimp.load(path)


def test_another_kernel_library(made, tmp_path):
    path = rewritten(
        made[1], tmp_path / "m.pt2", lambda n, d: d[:-1] + b"x" if n.endswith(".so") else d
    )
    with pytest.raises(ArtefactError, match="not the one it was made with"):
        skimp.load(path)


def test_a_file_for_another_processor(made, tmp_path, monkeypatch):
    def wider(name, data):
        if not name.endswith(INDEX):
            return data
        return json.dumps(json.loads(data) | {"isa": "avx512_bf16"}).encode()

    path = rewritten(made[1], tmp_path / "m.pt2", wider)
    monkeypatch.setattr("skimp.codegen.cpp.bundle.detect_isa", lambda: "avx2")
    with pytest.raises(ArtefactError, match="compiled for avx512_bf16, and this machine has avx2"):
        skimp.load(path)


def test_damage_of_any_kind(made, tmp_path):
    path, data = tmp_path / "m.pt2", made[1].read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ArtefactError, match="damaged or truncated"):
        skimp.load(path)
    with zipfile.ZipFile(made[1]) as archive:
        largest = max(archive.infolist(), key=lambda i: i.file_size)
    at = largest.header_offset + largest.file_size // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    with pytest.raises(ArtefactError, match="damaged"):
        skimp.load(path)
    path.write_bytes(b"")
    with pytest.raises(ArtefactError, match="damaged or truncated"):
        skimp.load(path)
    with pytest.raises(ArtefactError, match="does not exist"):
        skimp.load(tmp_path / "none.pt2")


def test_an_archive_of_somebody_else(made, tmp_path):
    path = rewritten(made[1], tmp_path / "m.pt2", lambda n, d: None if "/skimp/" in n else d)
    with pytest.raises(ArtefactError, match=r"not written by skimp\.export"):
        skimp.load(path)


def test_a_model_that_is_not_worth_it_leaves_what_was_there(made, tmp_path):
    path = tmp_path / "m.pt2"
    shutil.copy(made[1], path)
    before = path.read_bytes()
    with pytest.raises(ExportError, match=r"less than the floor of 99\.0%"):
        skimp.export(made[0], ids(), path, floor=0.99)
    assert path.read_bytes() == before
    with pytest.raises(ExportError, match="no converted block"):
        skimp.export(nn.Linear(2, 2), {"input": torch.ones(2, 2)}, path)
    with pytest.raises(ExportError, match=r"must end in \.pt2"):
        skimp.export(made[0], ids(), tmp_path / "m.zip", to="pt2")


@torch.no_grad()
def test_a_tie_is_named_where_outputs_differ(made):
    """The artefact may be right then: rounding decides which side a score falls."""
    model = made[0]
    assert capture(model, ids()).tied == ()
    scores = model.block.router(model.embed(ids()["input_ids"]))[1, 2]
    skimp.set_tau(model, float(scores.median() / scores.max()))
    program = capture(model, ids())
    assert program.tied == ("block",)
    assert max(e["max"] for e in program.compare(lambda _: program.expected, 0.0).values()) == 0
    with pytest.raises(ExportError, match=r"In block a score ties.*another example"):
        program.compare(lambda _: [2 * y for y in program.expected], 1e-4)
