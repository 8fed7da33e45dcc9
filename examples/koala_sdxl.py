"""Prune SDXL as KOALA does, distil the student on your own pictures, and draw with it.

Give a folder of pictures, each with its caption in a text file beside it (cat.jpg, cat.txt), and
SDXL as a folder or as its name on the hub. The paper took 8 million pictures, batches of 128 and
500,000 steps on four A100s.

    python examples/koala_sdxl.py stabilityai/stable-diffusion-xl-base-1.0 pictures/ --checkpointing

Every part is skipped if its result is there: encoded pictures, the student, the checkpoint.
"""

import argparse
from pathlib import Path

import torch
from skimp.passes.prune_unet import PruneUNet, example_of, prune
from skimp.passes.unet_distill import DistillUNet
from skimp.runtime.unet import Pictures, load_unet
from skimp.runtime.unet_store import read_pairs, save_student
from skimp.runtime.unet_train import Training, train

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
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="SDXL: a folder, or its name on the hub")
    parser.add_argument("pictures", type=Path)
    parser.add_argument("--preset", default="koala-700m")
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30_000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=32)
    parser.add_argument("--precision", default="fp16" if torch.cuda.is_available() else "no")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--prompt", default="a koala in a library")
    parser.add_argument("--draw-steps", type=int, default=25)
    parser.add_argument("--out", type=Path, default=Path("out/koala-sdxl"))
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    encoded = args.out / "pictures.safetensors"
    if not encoded.exists():
        pipe = StableDiffusionXLPipeline.from_pretrained(args.model, unet=None).to(device)
        encode(pipe, args.pictures, args.size).save(encoded)
        del pipe
    pictures = Pictures.load(encoded)

    teacher = load_unet(args.model)
    if not (args.out / "student" / "skimp-unet.json").exists():
        made = prune(teacher, example_of(teacher, batch=1), PruneUNet(preset=args.preset))
        save_student(made, args.out / "student", args.model)
        print(made.report["parameters"])

    student = load_unet(str(args.out / "student"))
    how = DistillUNet()
    training = Training(
        steps=args.steps, batch=args.batch, accumulate=args.accumulate, precision=args.precision,
        checkpointing=args.checkpointing,
    )  # fmt: skip
    report = train(
        student, teacher, pictures, training, args.out, how=how,
        pairs=read_pairs(args.out / "student", how),
        progress=lambda _, done, total, note="": print(f"{done}/{total} {note}", flush=True),
    )  # fmt: skip
    print(report["losses"])

    pipe = StableDiffusionXLPipeline.from_pretrained(args.model, unet=load_unet(str(args.out)))
    pipe.scheduler = EulerDiscreteScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing"
    )
    drawn = pipe.to(device)(args.prompt, num_inference_steps=args.draw_steps, guidance_scale=3.5)
    drawn.images[0].save(args.out / "drawn.png")
    print(f"drawn: {args.out / 'drawn.png'}")


if __name__ == "__main__":
    main()
