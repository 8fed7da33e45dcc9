"""The commands for diffusion U-Nets: ``skimp prune-unet`` and ``skimp distill-unet``."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli_console import AsJson, err, print_json, progress
from .cli_console import out as console
from .ir.errors import SkimpError

Data = Annotated[
    str, typer.Option(help="'openmoji', or a file of encoded pictures (examples/koala_sdxl.py).")
]


def prune_unet(
    model: Annotated[str, typer.Argument(help="A U-Net, or a pipeline with one: folder or hub.")],
    preset: Annotated[str, typer.Option(help="bk-sdxl, koala-1b or koala-700m.")] = "",
    remove: Annotated[
        list[str] | None, typer.Option(help="A step or a transformer layer; repeat it.")
    ] = None,
    keep_params: Annotated[
        float | None, typer.Option(help="Search for what to remove until this share is left.")
    ] = None,
    keep_flops: Annotated[float | None, typer.Option(help="The same, of FLOPs.")] = None,
    by: Annotated[str, typer.Option(help="Ranking: output, cosine or attention.")] = "output",
    data: Data = "",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder.")] = Path("out/student"),
    explain: Annotated[
        bool, typer.Option("--explain", help="Only list the steps and layers, with their costs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Remove residual steps and transformer layers from a diffusion U-Net, legally.

    The student keeps its teacher's weights and loads with diffusers' own from_pretrained. Names
    for --remove are those that --explain lists; a removal that would leave channels that do not
    fit is refused with the equation. Train the student with `skimp distill-unet`.
    """
    from .passes.prune_unet import PruneUNet, example_of, prune
    from .passes.unet_graph import discover, export_unet
    from .runtime.unet import load_unet
    from .runtime.unet_store import save_student

    teacher = load_unet(model)
    if not explain and not (preset or remove or keep_params or keep_flops):
        raise SkimpError("say what to remove: --preset, --remove, --keep-params or --keep-flops")
    probes = _pictures(data, teacher).probes() if data else []
    if (keep_params or keep_flops) and not probes:
        raise SkimpError("a search ranks on data: give --data openmoji, or a file")
    example = probes[0] if probes else example_of(teacher)
    err.print("reading the graph ...", style="dim")
    gm = export_unet(teacher, example)
    unet = discover(gm)
    if explain:
        _explain(teacher, unet, as_json)
        return
    how = PruneUNet(preset, tuple(remove or ()), keep_params, keep_flops, by)
    made = prune(teacher, example, how, data=probes, captured=(gm, unet))
    save_student(made, out, model)
    if as_json:
        print_json(made.report | {"out": str(out)})
        return
    table = Table("", "teacher", "student", "left")
    for name, unit in (("parameters", 1e6), ("flops", 2e9)):
        part = made.report[name]
        label = "parameters, M" if name == "parameters" else "GMAC per call"
        table.add_row(
            label, f"{part['teacher'] / unit:,.1f}", f"{part['student'] / unit:,.1f}",
            f"{part['left']:.1%}",
        )  # fmt: skip
    before, after = made.report["attentions"]
    table.add_row("self-attentions", str(before), str(after), "")
    console.print(table)
    console.print(f"{len(made.report['removed'])} modules went; saved to {out}", highlight=False)


def distill_unet(
    teacher: Annotated[str, typer.Argument(help="A U-Net, or a pipeline with one.")],
    student: Annotated[Path, typer.Argument(help="What `skimp prune-unet` wrote.")],
    data: Data = "openmoji",
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder.")] = Path("out/distilled"),
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 1000,
    batch: Annotated[int, typer.Option(help="Samples per device and pass.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Passes per step.")] = 1,
    lr: Annotated[float, typer.Option(help="Constant, of AdamW.")] = 1e-5,
    taps: Annotated[str, typer.Option(help="attention, last or none.")] = "attention",
    aligned: Annotated[str, typer.Option(help="bottom, up or kept.")] = "bottom",
    task: Annotated[float, typer.Option(help="Weight of the error to the noise.")] = 1.0,
    output: Annotated[float, typer.Option(help="And to the teacher's output.")] = 1.0,
    features: Annotated[float, typer.Option(help="And of the taps.")] = 1.0,
    ema: Annotated[float, typer.Option(help="Decay of the average saved; 0: none.")] = 0.999,
    precision: Annotated[str, typer.Option(help="no, bf16 or fp16.")] = "no",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Less memory, more time.")
    ] = False,
    every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 200,
    seed: Annotated[int, typer.Option(help="Of data and noise.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train a pruned U-Net to do what its teacher does, at its self-attentions too.

    Start it again with the same options after an interruption, and it goes on where it was. On
    several GPUs: accelerate launch -m skimp distill-unet ... The result is in OUT/unet.
    """
    from .passes.unet_distill import DistillUNet
    from .runtime.unet import load_unet
    from .runtime.unet_store import read_pairs
    from .runtime.unet_train import Training, train

    if precision not in ("no", "bf16", "fp16"):
        raise SkimpError(f"precision {precision!r} is none of no, bf16, fp16")
    how = DistillUNet(task, output, features, taps, aligned)
    pairs = read_pairs(student, how)
    learner, model = load_unet(str(student)), load_unet(teacher)
    training = Training(
        steps=steps, batch=batch, accumulate=accumulate, lr=lr, ema=ema, precision=precision,
        checkpointing=checkpointing, every=every, seed=seed,
    )  # fmt: skip
    bars, told = progress()
    with bars:
        report = train(
            learner, model, _pictures(data, learner), training, out, how=how, pairs=pairs,
            progress=lambda stage, done, total, note="": told(stage, done, total),
        )  # fmt: skip
    if as_json:
        print_json(report)
        return
    table = Table("loss", "first tenth", "last tenth")
    for name, values in report["losses"].items():
        table.add_row(name, f"{values[0]:.4f}", f"{values[-1]:.4f}")
    console.print(table)
    console.print(f"{len(pairs)} taps, {steps} steps; saved to {out / 'unet'}", highlight=False)


def _pictures(data: str, model: Any) -> Any:
    from .runtime.unet import Pictures

    return Pictures.emoji(model) if data == "openmoji" else Pictures.load(Path(data))


def _explain(teacher: Any, unet: Any, as_json: bool) -> None:
    from .passes.prune_unet import parameters

    sizes = parameters(teacher)
    rows = [
        {
            "name": s.name,
            "kind": s.kind,
            "modules": list(s.members),
            "channels": [s.reads, s.gives],
            "size": list(s.size),
            "parameters": sum(sizes.get(m, 0) for m in s.members),
            "flops": sum(unet.flops.get(m, 0) for m in s.members),
            "fixed": s.fixed,
        }
        for s in unet.steps
    ]
    stacks = [{"name": s.name, "layers": list(s.layers)} for s in unet.stacks]
    if as_json:
        print_json({"steps": rows, "stacks": stacks, "taps": [t.name for t in unet.taps]})
        return
    table = Table("step", "modules", "channels", "at", "parameters, M", "GMAC", "stays because")
    for r in rows:
        table.add_row(
            r["kind"], ", ".join(r["modules"]), "{} -> {}".format(*r["channels"]),
            "{}x{}".format(*r["size"]), f"{r['parameters'] / 1e6:,.2f}",
            f"{r['flops'] / 2e9:,.2f}", r["fixed"] or "",
        )  # fmt: skip
    console.print(table)
    table = Table("transformer stack", "layers", "self-attentions")
    for stack in unet.stacks:
        taps = sum(t.layer in stack.layers for t in unet.taps)
        table.add_row(stack.name, str(len(stack.layers)), str(taps))
    console.print(table)
