"""``skimp prune-unet`` and ``skimp distill-unet``, from a folder to a folder."""

import json
import sys
from pathlib import Path

import pytest
import torch
from skimp.cli import app
from skimp.ir.errors import ArtefactError, PlanError, SkimpError
from skimp.runtime.unet import load_unet
from typer.testing import CliRunner

pytest.importorskip("diffusers")
for folder in ("passes", "runtime"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))
from test_unet_train import pictures  # noqa: E402
from unets import two  # noqa: E402


def skimp(*words):
    return CliRunner().invoke(app, [str(w) for w in words], catch_exceptions=False)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A teacher as a pipeline holds it, pictures, and a student of it."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("unet")
    teacher = two(in_channels=3, out_channels=3)
    teacher.save_pretrained(root / "pipe" / "unet")
    pictures().save(root / "few.safetensors")
    words = ("--preset", "koala-700m", "-o", root / "student", "--json")
    done = skimp("prune-unet", root / "pipe", *words)
    return root, json.loads(done.stdout)


def test_a_student_is_written_and_reported(place):
    root, report = place
    student, teacher = load_unet(str(root / "student")), load_unet(str(root / "pipe"))
    sizes = [sum(p.numel() for p in m.parameters()) for m in (teacher, student)]
    assert [report["parameters"][k] for k in ("teacher", "student")] == sizes
    assert student.config.mid_block_type is None
    assert report["attentions"] == [8, 3]


def test_a_student_is_distilled(place):
    root, _ = place
    words = ("--data", root / "few.safetensors", "-o", root / "out", "--steps", 2, "--batch", 2)
    done = skimp("distill-unet", root / "pipe", root / "student", *words, "--json")
    losses = json.loads(done.stdout)["losses"]
    assert len(losses["features"]) == 2
    assert load_unet(str(root / "out")).config.layers_per_block == 1
    with pytest.raises(ArtefactError, match=r"holds no skimp-unet\.json"):
        skimp("distill-unet", root / "pipe", root / "pipe", *words)
    with pytest.raises(SkimpError, match="none of no, bf16, fp16"):
        skimp("distill-unet", root / "pipe", root / "student", "--precision", "int8")


def test_what_can_go_is_listed_and_what_cannot_is_refused(place):
    root, _ = place
    found = json.loads(skimp("prune-unet", root / "pipe", "--explain", "--json").stdout)
    assert [s["kind"] for s in found["steps"]].count("pop") == 4
    assert len(found["taps"]) == 8
    assert {s["fixed"] for s in found["steps"] if "samplers" in s["name"]} == {
        "it changes the resolution from 8x8 to 4x4",
        "it changes the resolution from 4x4 to 8x8",
    }
    with pytest.raises(PlanError, match=r"C\(conv_in\) = 8 is pushed and never popped"):
        skimp("prune-unet", root / "pipe", "--remove", "up_blocks.1.resnets.1")
    with pytest.raises(SkimpError, match="say what to remove"):
        skimp("prune-unet", root / "pipe")
    with pytest.raises(SkimpError, match="a search ranks on data"):
        skimp("prune-unet", root / "pipe", "--keep-params", 0.5)
