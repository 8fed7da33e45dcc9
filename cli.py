"""The command line; ``cli_tree`` decodes, ``cli_cascade`` serves, ``cli_economics`` counts."""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .cli_cascade import cascade, serve
from .cli_economics import economics
from .cli_export import export
from .cli_judge import judge
from .cli_router import router
from .cli_tree import generate, train_drafter
from .cli_unet import distill_unet, prune_unet
from .ir.cost import cache_dir
from .ir.errors import SkimpError, no_room, out_of_memory, unwritable

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Skimp on compute, not on quality: run only the experts each token needs.",
)
app.add_typer(cascade, name="cascade")
app.add_typer(economics, name="economics")
app.add_typer(router, name="router")
app.command(epilog="Example:  skimp serve cascade.yaml --port 8080")(serve)
app.command(epilog="Example:  skimp judge pairs.jsonl --config cascade.yaml --judge large --both")(
    judge
)
app.command(epilog="Example:  skimp generate smollm2 --prompt 'Why is the sky blue?'")(generate)
app.command("train-drafter", epilog="Example:  skimp train-drafter smollm2 --prompts prompts.txt")(
    train_drafter
)
app.command(epilog="Example:  skimp export out/model --to pt2 -o encoder.pt2")(export)
app.command(
    "prune-unet",
    epilog="Examples:  skimp prune-unet sdxl/ --preset koala-700m -o student;  skimp prune-unet "
    "sdxl/ --explain;  skimp prune-unet toy --keep-params 0.4 --data openmoji",
)(prune_unet)
app.command(
    "distill-unet",
    epilog="Example:  skimp distill-unet sdxl/ student --data laion.safetensors --precision fp16",
)(distill_unet)
_out = Console()
_err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
Model = Annotated[str, typer.Argument(help="'minilm', a folder, or a model on the hub.")]
Budget = Annotated[str, typer.Option(help="'flops <= 0.55' (FFN FLOPs left) or 'cosine >= 0.98'.")]


class _Bars:
    """Progress on stderr with rate and time left; silent when that is not a terminal."""

    def __init__(self) -> None:
        self.bars = Progress(
            TextColumn("{task.description:10}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=_err,
            disable=not _err.is_terminal,
        )
        self.tasks: dict[str, Any] = {}
        self.started: dict[str, float] = {}

    def __call__(self, stage: str, done: float, total: float, note: str = "") -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total, rate="", note="")
            self.started[stage] = time.monotonic()
        spent = time.monotonic() - self.started[stage]
        rate = f"{done / spent:,.0f}/s" if spent > 1 and total > 100 and done > 1 else ""
        if (done, total) == (1, 1):
            task = self.bars.tasks[self.tasks[stage]]
            done = total = task.total or 1
        self.bars.update(self.tasks[stage], completed=done, total=total, note=note, rate=rate)

    def __enter__(self) -> "_Bars":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()


@app.command(epilog="Example:  skimp demo --thorough --out out/thorough")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the model and the report.")] = Path("out"),
    budget: Annotated[
        str | None, typer.Option(help="By default 'flops <= 0.55', or 0.45 if thorough.")
    ] = None,
    thorough: Annotated[bool, typer.Option(help="Train some six times as long.")] = False,
    model: Annotated[str, typer.Option(help="Another encoder.")] = "minilm",
    as_json: AsJson = False,
) -> None:
    """Convert an encoder, compile it, and write a report of what that bought."""
    from .runtime.demo import demo as run
    from .runtime.report import headline, write_report

    with _Bars() as bars:
        chosen = budget or f"flops <= {0.45 if thorough else 0.55}"
        result = run(out, model=model, budget=chosen, thorough=thorough, progress=bars)
    page, _ = write_report(result, out)
    if as_json:
        print(json.dumps(result))  # noqa: T201
        return
    table = Table(show_header=False, box=None)
    for value, what in headline(result):
        table.add_row(f"[bold]{value}[/]", what)
    _out.print(table)
    _out.print(f"Report: {page}  ({result['seconds']:.0f} s)")


@app.command(epilog="Example:  skimp explain minilm")
def explain(model: Model = "minilm", as_json: AsJson = False) -> None:
    """Show which networks and attention projections are found, what nearly was, and why not."""
    from .passes.convert import explain as run
    from .passes.project import hidden_neurons
    from .runtime.models import load_pretrained

    loaded = load_pretrained(model)
    example = dict(
        loaded.tokenizer(["one short text", "another"], padding=True, return_tensors="pt")
    )
    found = run(loaded.model, example)
    if as_json:
        print(json.dumps(asdict(found)))  # noqa: T201
        return
    table = Table("site", "activation", "d", "d_ff", "gated")
    for s in found.sites:
        table.add_row(s.name, s.act, str(s.d), str(s.d_ff), "yes" if s.gated else "no")
    _out.print(table)
    if found.projections:
        table = Table("attention projection (--projections)", "role", "d", "d_out", "hidden")
        for p in found.projections:
            hidden = str(hidden_neurons(p.d, p.d_out, 8))
            table.add_row(p.name, p.role, str(p.d), str(p.d_out), hidden)
        _out.print(table)
    for miss in (*found.misses, *found.projection_misses):
        _out.print(f"not {miss.nodes[-1]}: {miss.reason}", style="yellow")


@app.command(epilog="Example:  skimp convert minilm --text corpus.txt --budget 'cosine >= 0.98'")
def convert(
    model: Model = "minilm",
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = Path("out/model"),
    text: Annotated[
        Path | None, typer.Option(help="Calibration text, a passage per line; else Python's own.")
    ] = None,
    budget: Budget = "flops <= 0.55",
    thorough: Annotated[bool, typer.Option(help="Train some six times as long.")] = False,
    projections: Annotated[
        bool, typer.Option("--projections", help="Convert attention projections too.")
    ] = False,
    ray: Annotated[
        str | None, typer.Option(help="Ray cluster whose workers treat the layers: HOST:PORT.")
    ] = None,
    offload: Annotated[
        Path | None,
        typer.Option(help="Folder on a disk for weights and activations that memory cannot hold."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Convert an encoder; start again after an interruption and it goes on where it was.

    Started by torchrun (torchrun --nproc-per-node 2 -m skimp convert ..), processes divide among
    them what fine-tuning takes: weights, gradients, what optimisers know, and each batch.
    """
    from .passes.data import embedded_text
    from .passes.ranks import is_first
    from .runtime.cluster import on_ray
    from .runtime.demo import convert_text_model
    from .runtime.models import load_pretrained

    loaded = load_pretrained(model)
    passages = text.read_text().splitlines() if text else embedded_text()
    passages = [p for p in passages if p.strip()]
    alone = ray is None or not is_first()
    with nullcontext(map) if alone else on_ray(str(ray)) as each, _Bars() as bars:
        done, _ = convert_text_model(
            loaded,
            passages,
            out,
            stages=out.with_name(out.name + "-stages"),
            budget=budget,
            thorough=thorough,
            projections=projections,
            progress=bars,
            each=each,
            offload=offload,
        )
    if not is_first():
        return
    if as_json:
        print(json.dumps(done.history))  # noqa: T201
        return
    table = Table("pass", "seconds")
    for record in done.history:
        table.add_row(record["pass"].replace("[", r"\["), f"{record['seconds']:.1f}")
    _out.print(table)
    _out.print(f"Saved to {out}; load it with skimp.load({str(out)!r}, model)")


@app.command(epilog="Example:  skimp unconvert hub/encoder plain/encoder")
def unconvert(
    folder: Annotated[Path, typer.Argument(help="What skimp.save_pretrained wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder of the plain dense model.")],
) -> None:
    """Make a converted Hugging Face folder a plain dense one, which needs no skimp to load."""
    from .runtime.hub.folder import unconvert as run

    run(folder, out)
    _out.print(f"Saved to {out}: the network that tau = 0 computes")


@app.command(epilog="Example:  skimp bench encoder --json")
def bench(
    name: Annotated[str, typer.Argument(help="'block', 'encoder', 'split' or 'decode'.")] = "block",
    as_json: AsJson = False,
    quick: Annotated[bool, typer.Option(help="Fewer shapes and repeats.")] = False,
) -> None:
    """Run one of the comparisons in benchmarks/ (from a source checkout)."""
    script = Path(__file__).parent / "benchmarks" / f"{name}.py"
    if not script.exists():
        raise SkimpError(f"{script} does not exist; benchmarks run from a source checkout")
    flags = ["--json"] * as_json + ["--quick"] * quick
    raise typer.Exit(subprocess.run([sys.executable, str(script), *flags], check=False).returncode)


@app.command(epilog="Example:  skimp doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Show what this machine offers: versions, compiler, instruction set, cache."""
    from . import __version__
    from .codegen.cpp.build import compiler
    from .codegen.cpp.spec import detect_isa

    try:
        found = " ".join(compiler())
    except SkimpError as error:
        found = f"none: {error}"
    facts: dict[str, Any] = {
        "skimp": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "instruction set": detect_isa(),
        "compiler": found,
        "cache": str(cache_dir()),
        "cache writable": os.access(_existing(cache_dir()), os.W_OK),
        "free in cache, GB": round(shutil.disk_usage(_existing(cache_dir())).free / 1e9, 1),
        "cuda": torch.cuda.is_available(),
    }
    if as_json:
        print(json.dumps(facts))  # noqa: T201
        return
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(key, str(value))
    _out.print(table)


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


@app.command(epilog="Example:  skimp aot out/model --target sm_90")
def aot(
    folder: Annotated[Path, typer.Argument(help="A converted model.")],
    target: Annotated[str, typer.Option(help="sm_80, sm_90, sm_100, gfx942 or gfx90a.")] = "sm_90",
    out: Annotated[Path | None, typer.Option(help="Of the kernels; default FOLDER/TARGET.")] = None,
    model: Annotated[str, typer.Option(help="The dense model it was made of.")] = "minilm",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    as_json: AsJson = False,
) -> None:
    """Compile a model's GPU kernels for a device that need not be here, and report what they take.

    NVIDIA kernels report bytes spilled, AMD ones registers spilled. Predicted times are bounds from
    published peaks, not measurements. On a machine with such a device
    skimp.codegen.triton.driver.serve(file) lets the model run them; Triton need not be there.
    """
    from .codegen.triton import aot as ahead
    from .codegen.triton import report
    from .codegen.triton.bundle import write
    from .passes.lift import blocks
    from .runtime.models import load_pretrained
    from .runtime.store import load

    gm = load(folder, load_pretrained(model).model)
    found = {(ahead.spec_of(b, dtype), b.router.width) for b in blocks(gm).values()}
    path = out or folder / f"{target}.kernels"
    made = write(path, sorted(found, key=lambda f: (f[0].name, f[1])), target)
    lines = [report.line(c) for c in made]
    if as_json:
        print(json.dumps(lines))  # noqa: T201
        return
    table = Table(*report.COLUMNS.values())
    for line in lines:
        table.add_row(*(str(line[n]) for n in report.COLUMNS))
    _out.print(table)
    _out.print(f"Kernels: {path}")


def main() -> None:
    """Run the command line; errors of ours are a message, not a traceback."""
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # torch warns of its own pytree
    try:
        app()
    except SkimpError as error:
        told = str(error)
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        if no_room(error):
            place = getattr(error, "filename", None) or "what was being written"
            told = str(unwritable(place, error))
        elif out_of_memory(error):
            told = (
                f"not enough memory ({str(error).splitlines()[0] if str(error) else 'no more'}); "
                "give it less at once (fewer or shorter texts, a smaller model) or more memory. "
                "Nothing half-written is left; a command that goes on after an interruption will."
            )
        else:
            raise
    try:
        _err.print("[red]error:[/]", escape(told), highlight=False)
    except MemoryError:  # a plain line needs less
        sys.stderr.write(f"error: {told}\n")
    raise SystemExit(1)
