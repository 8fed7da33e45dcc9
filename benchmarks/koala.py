"""Distil a pruned U-Net in six ways, three seeds each, at equal steps; time teacher and students.

A tiny teacher in SDXL's layout is trained on OpenMoji, pruned as koala-700m, and its student is
trained on each set of losses. Start it again after an interruption and it goes on. It takes about
half an hour on two cores; `--only timing` and `--only training` run one part, `--page` writes
docs/koala.md from what was measured.
"""

import argparse
import copy
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from koala_report import write_page
from skimp.ir.cost import write_atomically
from skimp.ir.measure import compare, machine
from skimp.passes.prune_unet import PruneUNet, example_of, prune
from skimp.passes.unet_distill import DistillUNet
from skimp.passes.unet_graph import discover, export_unet
from skimp.runtime.unet import Pictures, load_unet, sample
from skimp.runtime.unet_train import Training, train
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path("benchmarks/results/koala.json")
PRESETS = ("teacher", "bk-sdxl", "koala-1b", "koala-700m")
# task, output, features, taps, aligned, and whether it inherits the teacher's weights
ARMS = {
    "task": (DistillUNet(output=0, taps="none"), True),
    "+ output": (DistillUNet(taps="none"), True),
    "+ output + last features": (DistillUNet(taps="last"), True),
    "+ output + attention, bottom": (DistillUNet(), True),
    "+ output + attention, up": (DistillUNet(aligned="up"), True),
    "random weights, + output + attention, bottom": (DistillUNet(), False),
}
TEACHER = Training(steps=500, batch=8, lr=2e-3, warmup=20, ema=0.98, every=50)
STUDENT = Training(steps=60, batch=8, lr=5e-4, warmup=5, ema=0.9, every=1000)
DRAWN = (5, 120, 300, 420, 560, 700, 860, 1000)  # captions of the picture


def layout(width, depths, size, text, channels=4):
    """SDXL's layout at another width and depth."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=2,
        block_out_channels=(width, 2 * width, 4 * width), norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=depths, attention_head_dim=(2, 4, 8),
        use_linear_projection=True, cross_attention_dim=text, addition_embed_type="text_time",
        addition_time_embed_dim=8, projection_class_embeddings_input_dim=48 + text,
    )  # fmt: skip


def told(what):
    def progress(stage, done, total, note=""):
        if done % 50 == 0 or done == total:
            print(f"{what}: {done}/{total} {note}", flush=True)

    return progress


def error(unet, teacher, pictures):
    """Held-out squared errors, to the noise and to the teacher, on eight fixed batches."""
    sums = [0.0, 0.0]
    with torch.no_grad():
        for step in range(8):
            call, noise = pictures.batch(step, 16, seed=10**6, blank=0.0)
            got, want = unet(**call)[0], teacher(**call)[0]
            sums[0] += float(F.mse_loss(got, noise)) / 8
            sums[1] += float(F.mse_loss(got, want)) / 8
    return dict(task=sums[0], teacher=sums[1])


def training(work, result, seeds, store):
    torch.manual_seed(0)
    teacher = layout(16, (1, 1, 2), 16, 64, 3)
    pictures = Pictures.emoji(teacher)
    learn, held = pictures.split()
    if not (work / "teacher" / "unet").exists():
        done = train(teacher, None, learn, TEACHER, work / "teacher", progress=told("teacher"))
        result["teacher"] = dict(losses=done["losses"]["task"])
    teacher = load_unet(str(work / "teacher"))
    example = example_of(teacher, length=8)
    gm = export_unet(teacher, example)
    made = prune(teacher, example, PruneUNet(preset="koala-700m"), captured=(gm, discover(gm)))
    result["pictures"] = [len(learn.captions), len(held.captions)]
    result["student"] = made.report
    result["held out"] = {
        "teacher": error(teacher, teacher, held),
        "pruned, not trained": error(made.student.eval(), teacher, held),
    }
    result.setdefault("arms", {})
    drawn = {"teacher": teacher, "pruned, not trained": made.student}
    for seed in range(seeds):
        for arm, (how, inherits) in ARMS.items():
            place = work / f"{seed}-{arm}".replace(" ", "").replace(",", "-")
            student = copy.deepcopy(made.student)
            if not inherits:
                torch.manual_seed(seed)
                student = type(student).from_config(dict(student.config))
            pairs = how.pairs(made.unet, made.plan, made.names)
            runs = result["arms"].setdefault(arm, {})
            if str(seed) not in runs or not (place / "unet").exists():
                train(
                    student, teacher, learn, replace(STUDENT, seed=seed + 1), place, how=how,
                    pairs=pairs, progress=told(f"seed {seed}, {arm}"),
                )  # fmt: skip
                trained = load_unet(str(place))
                runs[str(seed)] = error(trained, teacher, held) | {"taps": len(pairs)}
                store()
            if seed == 0:
                drawn[arm] = load_unet(str(place))
    picture(drawn, pictures)


def picture(models, pictures):
    """Samples of every model from the same noise, a row each, and the real pictures first."""
    from PIL import Image

    rows = [r % len(pictures.captions) for r in DRAWN]
    grid = [pictures.latents[rows]] + [sample(m, pictures, rows) for m in models.values()]
    tiles = torch.stack(grid).clamp(-1, 1).add(1).mul(127.5).round().byte()
    n, k, _, h, w = tiles.shape
    flat = tiles.permute(0, 3, 1, 4, 2).reshape(n * h, k * w, 3)
    image = Image.frombytes("RGB", (k * w, n * h), flat.numpy().tobytes())
    image.resize((k * w * 3, n * h * 3), Image.Resampling.NEAREST).save("docs/koala.png")


def large():
    """Models of enough size to time: width 64, SDXL's depths, random weights; by preset."""
    with torch.device("meta"):
        teacher = layout(64, (1, 2, 10), 32, 64).eval()
    gm = export_unet(teacher, example_of(teacher, batch=1))
    captured = gm, discover(gm)
    models = {"teacher": teacher}
    for preset in PRESETS[1:]:
        how = PruneUNet(preset=preset)
        models[preset] = prune(teacher, {}, how, captured=captured, verified=False).student
    torch.manual_seed(0)
    return {p: type(m).from_config(dict(m.config)).eval() for p, m in models.items()}


def peak():
    """Largest resident memory of this process so far, MB."""
    status = Path("/proc/self/status").read_text()  # getrusage would count what it was forked from
    return float(next(x.split()[1] for x in status.splitlines() if x.startswith("VmHWM"))) / 1024


def memory(preset, work):
    """Print how far loading a model and one step raised the peak; in a process of its own."""
    import diffusers.models.unets.unet_2d_condition  # noqa: F401

    before = peak()
    model = load_unet(str(work / preset))
    call = example_of(model, batch=1)
    with torch.no_grad():
        model(**call)
    print(peak() - before)


def memories(work, rows):
    for preset, row in rows.items():
        own = [sys.executable, __file__, "--memory", preset, "--work", str(work)]
        done = subprocess.run(own, check=True, capture_output=True, text=True)
        row["peak MB"] = float(done.stdout)


def timing(work, result):
    """One denoising step, interleaved; what is predicted from FLOPs beside it."""
    models = large()
    calls, rows = {}, {}
    for preset, model in models.items():  # the work folder holds them for the memory's processes
        model.save_pretrained(work / preset)
        call = example_of(model, batch=1)
        empty = weightless(model)
        with FlopCounterMode(display=False) as count, torch.no_grad():
            empty(**example_of(empty, batch=1))
        parameters = sum(p.numel() for p in model.parameters())
        rows[preset] = dict(parameters=parameters, gmac=count.get_total_flops() / 2e9)
        calls[preset] = lambda model=model, call=call: model(**call)
    measured = compare(calls, "koala-700m", seconds=60, least=7, most=15).as_dict()
    for preset, row in rows.items():
        row["seconds"] = measured["timings"][preset]
    memories(work, rows)
    result["timing"] = dict(rows=rows, machine=machine(), batch=1, size=32)


def weightless(model):
    """The same model without memory, which counts attention's FLOPs on any machine."""
    with torch.device("meta"):
        return type(model).from_config(dict(model.config)).eval()


def main():
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["timing", "training"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("out/koala"))
    parser.add_argument("--page", action="store_true", help="only write the page")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return memory(args.memory, args.work)
    result = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}

    def store():
        write_atomically(RESULTS, json.dumps(result, indent=1).encode())

    if not args.page:
        result |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        result["steps"] = dict(teacher=TEACHER.steps, student=STUDENT.steps, batch=STUDENT.batch)
        if args.only != "timing":
            training(args.work, result, args.seeds, store)
        if args.only != "training":
            timing(args.work, result)
        store()
    write_page(result)
    return None


if __name__ == "__main__":
    main()
