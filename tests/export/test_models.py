"""Whole models through every door, and small ones of the same architecture."""

import pytest
import skimp
import torch

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
from fresh import check_fresh
from models import SHAPES, TinyGate, ids, minilm, small_bert, small_llama, smollm2
from skimp.runtime.cached import cached_example

FILES = {"pt2": "m.pt2", "onnx": "m.onnx", "iree": "m.vmfb"}


def export_and_check(door, model, example, shapes, cases, tmp_path, causal=False):
    if door == "iree":
        pytest.importorskip("torch_mlir")
        pytest.importorskip("iree.compiler")
    path = tmp_path / FILES[door]
    native = {"native": True} if door == "onnx" else {}
    report = skimp.export(model, example, path, dynamic_shapes=shapes, **native)
    printed = check_fresh(door, model, path, cases, tmp_path, causal=causal)
    if door == "onnx":
        assert int(printed) == 0  # stock: no operator of ours
        printed = check_fresh(door, model, path, cases, tmp_path, f"{path}.so", causal=causal)
        assert int(printed) == report.blocks
    return report


def check_encoder(door, model, tmp_path, taus=(0.0, 0.8)):
    cases = [(0.3, ids(*shape)) for shape in SHAPES] + [(tau, ids(2, 5)) for tau in taus]
    return export_and_check(door, model, ids(), None, cases, tmp_path)


def check_prompt(door, step, tmp_path, causal=False):
    example, shapes = cached_example(step)
    cases = [(0.3, ids(*shape)) for shape in SHAPES] + [(0.8, ids(2, 5))]
    return export_and_check(door, step, example, shapes, cases, tmp_path, causal)


def check_step(door, step, tmp_path, causal=False):
    """One step, of one token or several, after prompts of five lengths."""
    example, shapes = cached_example(step, past=4)
    cases = []
    for batch, length in SHAPES:
        skimp.set_tau(step, 0.3)
        with torch.no_grad():
            past = step(**ids(batch, length))["present"]
        for tau, tokens in ((0.3, 1), (0.8, 3)):
            kwargs = ids(batch, tokens)
            kwargs["attention_mask"] = torch.ones(batch, length + tokens, dtype=torch.long)
            cases.append((tau, kwargs | dict(past=past)))
    return export_and_check(door, step, example, shapes, cases, tmp_path, causal)


@pytest.fixture(scope="module")
def llama():
    return small_llama()


def test_a_step_of_a_small_decoder_in_onnx(llama, tmp_path):
    report = check_step("onnx", llama, tmp_path)
    assert report.blocks == 3
    assert report.free["past_0_1"] == [0, 2]


def test_sizes_of_a_step_are_not_compared_again(llama, tmp_path):
    """Two checks a layer, and the time that IREE takes doubles with each."""
    pytest.importorskip("torch_mlir")
    example, shapes = cached_example(llama, past=4)
    skimp.export(llama, example, tmp_path / "m.mlir", dynamic_shapes=shapes)
    assert "mismatched size for broadcast" not in (tmp_path / "m.mlir").read_text()


@torch.no_grad()
def test_steps_are_the_model(llama):
    step = llama
    tokens = ids(2, 9)["input_ids"]
    whole = step.model(tokens).logits
    first = step(tokens[:, :5], torch.ones(2, 5, dtype=torch.long))
    rest = step(tokens[:, 5:], torch.ones(2, 9, dtype=torch.long), first["present"])
    assert torch.allclose(torch.cat([first["logits"], rest["logits"]], 1), whole, atol=1e-4)


@pytest.mark.nightly
@pytest.mark.parametrize("door", FILES)
@pytest.mark.parametrize("check", [check_prompt, check_step])
def test_a_small_decoder(llama, door, check, tmp_path):
    assert check(door, llama, tmp_path).blocks == 3


@pytest.mark.nightly
@pytest.mark.parametrize("door", FILES)
def test_a_small_encoder(door, tmp_path):
    report = check_encoder(door, small_bert(), tmp_path)
    assert all(dims == [0, 1] for dims in report.free.values())


def check_gate(door, tmp_path):
    """Also at thresholds that no learned router could have."""
    assert check_encoder(door, TinyGate().eval(), tmp_path, (0.0, 1.5, 1e4)).blocks == 1


def test_a_gate_as_the_router_in_onnx(tmp_path):
    check_gate("onnx", tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("door", FILES)
def test_a_gate_as_the_router(door, tmp_path):
    check_gate(door, tmp_path)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("door", FILES)
def test_minilm_with_its_projections(door, tmp_path):
    assert check_encoder(door, minilm(), tmp_path).blocks == 6 * 5


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("door", FILES)
@pytest.mark.parametrize("check", [check_prompt, check_step])
def test_smollm2_with_its_projections(door, check, tmp_path):
    assert check(door, smollm2(), tmp_path, causal=True).blocks >= 30 * 3
