"""Prune a diffusion U-Net in depth, and let what is left learn from it.

The U-Net is a small one in SDXL's layout that knows nothing; give `main` your own. With SDXL
itself: examples/koala_sdxl.py.

    python examples/unet.py --quick
"""

import sys
from pathlib import Path

import small
from diffusers import UNet2DConditionModel
from skimp.passes.prune_unet import PruneUNet, example_of, prune
from skimp.passes.unet_distill import DistillUNet
from skimp.runtime.unet import Pictures
from skimp.runtime.unet_train import Training, train


def main(quick=False, teacher=None, folder="out/unet"):
    teacher = teacher or small.unet()
    how = PruneUNet(preset="koala-700m")  # or remove=(..), or keep_params=0.5 and data
    made = prune(teacher, example_of(teacher, length=4), how)  # refused, with why, if not legal
    for what in ("parameters", "flops"):
        print(f"{made.report[what]['left']:.0%} of the {what} are left")
    taps = DistillUNet().pairs(made.unet, made.plan, made.names)
    pictures = small.pictures() if quick else Pictures.emoji(teacher)
    training = Training(steps=3 if quick else 1000, batch=2 if quick else 8, lr=1e-4)
    report = train(made.student, teacher, pictures, training, Path(folder), how=DistillUNet(),
                   pairs=taps)  # fmt: skip
    for name, values in report["losses"].items():
        print(f"{name:10} {values[0]:.4f} -> {values[-1]:.4f}")
    # plain diffusers: nothing of skimp is needed to load it
    student = UNet2DConditionModel.from_pretrained(Path(folder) / "unet")
    print(f"{sum(p.numel() for p in student.parameters()):,} parameters in {folder}/unet")
    return made.report


if __name__ == "__main__":
    main("--quick" in sys.argv)
