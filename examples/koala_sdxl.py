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
from koala_pictures import encode
from skimp.passes.prune_unet import PruneUNet, example_of, prune
from skimp.passes.unet_distill import DistillUNet
from skimp.runtime.unet import Pictures, load_unet
from skimp.runtime.unet_store import read_pairs, save_student
from skimp.runtime.unet_train import Training, train


def main():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
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
