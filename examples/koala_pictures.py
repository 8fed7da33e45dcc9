"""Encode a folder of pictures once, so that training a U-Net needs neither texts nor pixels.

Each picture has its caption in a text file beside it (cat.jpg, cat.txt). The result is what
`--data` of `skimp prune-unet` and `skimp distill-unet` takes:

    python examples/koala_pictures.py stabilityai/stable-diffusion-xl-base-1.0 pictures/
"""

import argparse
from pathlib import Path

import torch
from skimp.runtime.unet import Pictures

KINDS = (".jpg", ".jpeg", ".png", ".webp")


def encode(pipe, folder, size):
    """Latents and text states of a folder of pictures, cropped to squares, by the pipeline."""
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image, ImageOps

    files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in KINDS)
    files = [f for f in files if f.with_suffix(".txt").exists()]
    if not files:
        raise SystemExit(f"{folder} holds no pictures with a .txt of the same name beside them")
    processor = VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor)
    captions = [f.with_suffix(".txt").read_text().strip() for f in files]
    parts = [[], [], [], []]
    for file, caption in zip(files, captions, strict=True):
        picture = Image.open(file).convert("RGB")
        square = ImageOps.fit(picture, (size, size))
        pixels = processor.preprocess(square).to(pipe.vae.device, pipe.vae.dtype)
        with torch.no_grad():
            latent = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
            states, _, pooled, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False)
        left, top = (max(0, side - min(picture.size)) // 2 for side in picture.size)
        times = torch.tensor([[picture.height, picture.width, top, left, size, size]])
        for part, value in zip(parts, (latent, states, pooled, times), strict=True):
            part.append(value.float().cpu())
        print(f"{len(parts[0])}/{len(files)} {file.name}", flush=True)
    return Pictures(*(torch.cat(p) for p in parts), captions)


def main():
    from diffusers import StableDiffusionXLPipeline

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="SDXL: a folder, or its name on the hub")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path("out/pictures.safetensors"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = StableDiffusionXLPipeline.from_pretrained(args.model, unet=None).to(device)
    encode(pipe, args.pictures, args.size).save(args.out)


if __name__ == "__main__":
    main()
