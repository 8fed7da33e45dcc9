"""examples/koala_sdxl.py, on a pipeline in SDXL's parts that is small and knows nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
hf = pytest.importorskip("transformers")
ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "passes"))
from unets import two  # noqa: E402


def pipeline():
    torch.manual_seed(0)
    text = hf.CLIPTextConfig(
        vocab_size=64, hidden_size=4, intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=1, projection_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    letters = [f"{c}{end}" for c in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    tokenizer = hf.CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 77
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae, hf.CLIPTextModel(text), hf.CLIPTextModelWithProjection(text), tokenizer, tokenizer,
        two(), diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip


@pytest.mark.nightly
def test_from_pictures_to_a_drawing(tmp_path):
    from PIL import Image

    pipeline().save_pretrained(tmp_path / "pipe")
    (tmp_path / "pictures").mkdir()
    for i, word in enumerate(("red", "blue")):
        picture = Image.new("RGB", (20 + i * 8, 24), word)
        picture.save(tmp_path / "pictures" / f"{word}.png")
        (tmp_path / "pictures" / f"{word}.txt").write_text(f"a {word} square")
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "no-caption.png")
    words = ["--size", "16", "--steps", "2", "--batch", "2", "--accumulate", "1"]
    words += ["--draw-steps", "2", "--out", str(tmp_path / "out")]
    command = [sys.executable, str(ROOT / "examples" / "koala_sdxl.py")]
    command += [str(tmp_path / "pipe"), str(tmp_path / "pictures"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2/2 red.png" in done.stdout
    assert Image.open(tmp_path / "out" / "drawn.png").size == (16, 16)
    loaded = diffusers.StableDiffusionXLPipeline.from_pretrained(
        tmp_path / "pipe",
        unet=diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet"),
    )
    assert loaded.unet.mid_block is None
