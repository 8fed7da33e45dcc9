"""Ranking on real weights: the trained terrain U-Net, read from ONNX."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from skimp.ir.errors import PlanError, TraceError
from skimp.passes.onnx_graph import read_onnx
from skimp.passes.unet_rank import drop, residuals, scores

pytest.importorskip("onnx")
found = importlib.util.find_spec("terrain_diffusion")
if found is None:
    pytest.skip("adaptive-terrain-diffusion is not installed", allow_module_level=True)
FILE = Path(found.origin).parent / "weights/terrain_consistency_unet_difficulty100.onnx"


def noise(sigma, seed=0, difficulty=0.0):
    """What its own generator feeds it: difficulties, from 0 to 1."""
    g = torch.Generator().manual_seed(seed)
    return dict(
        noisy=sigma * torch.randn(1, 1, 128, 128, generator=g),
        sigma=torch.tensor([sigma]),
        difficulty=torch.tensor([difficulty]),
    )


@pytest.fixture(scope="module")
def terrain():
    gm = read_onnx(FILE, noise(20.0))
    return gm, residuals(gm)


def test_the_graph_computes_what_the_file_does(terrain):
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(FILE), providers=["CPUExecutionProvider"])
    inputs = noise(1.0, seed=1)
    want = session.run(None, {n: v.numpy() for n, v in inputs.items()})[0]
    with torch.no_grad():
        got = terrain[0](**inputs)
    assert (got - torch.from_numpy(want)).abs().max() < 1e-5
    assert sum(p.numel() for p in terrain[0].parameters()) == pytest.approx(10.46e6, rel=1e-3)


def test_residual_blocks_are_found_and_named(terrain):
    names = [c.name for c in terrain[1]]
    assert len(names) == len(set(names)) == 55
    assert "network.input_blocks.5.0" in names  # a sampler: its skip is pooled
    assert "network.middle_block.1" in names


DEAD = [
    *(f"network.input_blocks.{i}.1" for i in (19, 21, 22, 23, 24)),
    "network.middle_block.1",
    *(f"network.output_blocks.{i}.1" for i in range(5)),
]


def test_the_dead_attentions_go_and_nothing_changes(terrain):
    """Eleven attentions contribute nothing; a few others are scored beside them."""
    gm, parts = terrain
    others = [f"network.input_blocks.{i}" for i in ("1.0", "3.0", "20.0")]
    some = [p for p in parts if p.name in DEAD or p.name in others]
    got = scores(gm, some, [noise(20.0)])
    assert sorted(n for n, v in got.items() if v < 1e-8) == sorted(DEAD)
    assert min(got[n] for n in others) > 1e-6
    assert max(got, key=got.__getitem__) == "network.input_blocks.1.0"
    small = copy.deepcopy(gm)
    drop(small, [p for p in parts if p.name in DEAD])
    before, after = (sum(p.numel() for p in m.parameters()) for m in (gm, small))
    assert 0.05 < 1 - after / before < 0.08
    # a difficulty that it was not trained on leaves less than one that it was
    for inputs, most in ((noise(20.0, 2), 5e-4), (noise(20.0, 2, 50.0), 1e-5)):
        with torch.no_grad():
            assert (small(**inputs) - gm(**inputs)).abs().max() < most


@pytest.mark.nightly
def test_early_blocks_matter_most(terrain):
    gm, parts = terrain
    got = scores(gm, parts, [noise(20.0), noise(1.0)])
    order = sorted(got, key=got.__getitem__)
    assert set(order[:11]) == set(DEAD)
    assert order[-1] == "network.input_blocks.1.0"
    assert sum("input_blocks" in n for n in order[-8:]) >= 5


def test_rankings_and_files_that_are_not_there(terrain, tmp_path):
    with pytest.raises(PlanError, match="there are cosine, output, attention"):
        scores(terrain[0], [], [], by="weight")
    (tmp_path / "a.onnx").write_bytes(b"no file of this kind")
    with pytest.raises(TraceError, match="cannot be read as an ONNX file"):
        read_onnx(tmp_path / "a.onnx", {})
