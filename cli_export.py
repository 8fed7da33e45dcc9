"""The command that takes a converted model out of Python: ``skimp export``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.table import Table
from torch import nn

from .cli_console import AsJson, print_json
from .cli_console import out as console
from .ir.artefact import INDEX
from .ir.errors import ExportError, out_of_memory

if TYPE_CHECKING:
    from .codegen.exported import Report


def export(
    folder: Annotated[Path, typer.Argument(help="What `skimp convert` or save_pretrained wrote.")],
    to: Annotated[str, typer.Option(help="pt2, onnx, mlir, iree or safetensors.")] = "pt2",
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="By default FOLDER/model.TO.")
    ] = None,
    model: Annotated[str, typer.Option(help="The dense model it was made of.")] = "minilm",
    tolerance: Annotated[float, typer.Option(help="Largest relative error of an output.")] = 1e-4,
    floor: Annotated[
        float, typer.Option(help="Least share of FLOPs in converted blocks, else it fails.")
    ] = 0.0,
    opset: Annotated[int | None, typer.Option(help="Of ONNX.")] = None,
    native: Annotated[
        bool, typer.Option("--native", help="With ONNX: write the library of its kernels, too.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would cover; write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a converted model for a life outside Python, compare it with the model, and report."""
    from .runtime.export import check_door, suffix_of
    from .runtime.export import dry_run as plan
    from .runtime.export import export as run

    check_door(to)
    loaded, example = _load(folder, model)
    if dry_run:
        planned = plan(loaded, to, floor)
        if as_json:
            print_json(planned)
            return
        _table({k: f"{v:.1%}" if k == "coverage" else v for k, v in planned.items()})
        return
    path = out or folder / ("exported" if to == "safetensors" else f"model{suffix_of(to)}")
    report = run(
        loaded, example, path, to=to, tolerance=tolerance, floor=floor, opset=opset, native=native
    )
    try:
        if as_json:
            print_json(report.as_dict())
        else:
            _print(report)
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ExportError(
            f"{report.file} is written and agrees with the model, but there is not enough memory "
            "to report on it"
        ) from error


def _print(report: "Report") -> None:
    _table(
        {
            "file": report.file,
            "size": f"{report.bytes / 1e6:.1f} MB",
            "needs": report.runtime,
            "coverage": f"{report.coverage:.1%} of the FLOPs, in {report.blocks} blocks",
            "free dimensions": "; ".join(f"{n} {d}" for n, d in report.free.items()) or "-",
        }
    )
    table = Table("output", "largest error", "mean error", "relative")
    for name, e in report.errors.items():
        table.add_row(name, *(f"{e[k]:.1e}" for k in ("max", "mean", "relative")))
    console.print(table)
    for note in report.notes:
        console.print(note, highlight=False)


def _table(facts: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(key, str(value))
    console.print(table)


def _load(folder: Path, name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A converted model and an example of a call."""
    from .ir.artefact import read_index
    from .runtime.models import load_pretrained
    from .runtime.store import example_of, load

    loaded: nn.Module
    if (folder / INDEX).exists():
        loaded = load(folder, load_pretrained(name).model)
        return loaded, _at_least_two(example_of(read_index(folder)["record"].get("inputs", {})))
    if not (folder / "config.json").exists():
        raise ExportError(f"{folder} holds no converted model; `skimp convert` makes one")
    found = load_pretrained(str(folder))
    text = ["one short text", "another short text"]
    return found.model, dict(found.tokenizer(text, padding=True, return_tensors="pt"))


def _at_least_two(example: dict[str, Any]) -> dict[str, Any]:
    """Dimensions of one would be taken for constants."""
    tensors = [v for v in example.values() if isinstance(v, torch.Tensor) and v.dim()]
    if any(len(t) == 1 for t in tensors):
        return {
            k: v.repeat_interleave(2, 0) if isinstance(v, torch.Tensor) and v.dim() else v
            for k, v in example.items()
        }
    return example
