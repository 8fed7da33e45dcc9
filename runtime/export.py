"""Every door out: ``skimp.export(model, example, "m.pt2")``."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.fx import GraphModule

from ..codegen.exported import (
    Metric,
    Report,
    capture,
    check_errors,
    check_floor,
    coverage,
    differences,
    needs,
    run_model,
)
from ..ir.artefact import INDEX, drafts, read_into, take_place
from ..ir.errors import ExportError
from ..passes.lift import blocks

DOORS = ("pt2", "onnx", "mlir", "iree", "safetensors")
"""The forms that :func:`export` writes."""


def suffix_of(door: str) -> str:
    """Of the files of a door."""
    return {"iree": ".vmfb", "safetensors": ""}.get(door, f".{door}")


def door_of(path: Path) -> str:
    """The door that a file name asks for: by its suffix, or ``safetensors`` for a folder."""
    named = {suffix_of(door): door for door in DOORS}
    return named.get(path.suffix, path.suffix.removeprefix("."))


def export(
    model: nn.Module,
    example: Mapping[str, Any],
    path: str | Path,
    *,
    to: str | None = None,
    dynamic_shapes: Mapping[str, Mapping[int, Any]] | None = None,
    tolerance: float = 1e-4,
    floor: float = 0.0,
    opset: int | None = None,
    native: bool = False,
    metric: Metric | None = None,
) -> Report:
    """Write a converted model in a form that leaves Python, and compare it with the model.

    Args:
        model: With blocks, on the CPU, in evaluation mode.
        example: Keyword arguments of one call, free dimensions at least 2.
        path: A file, or a folder for ``safetensors``; replaced only when the new one agrees.
        to: One of :data:`DOORS`; by default as the path's suffix says.
        dynamic_shapes: Free dimensions by input; by default batch and length.
        tolerance: Largest relative difference of an output to the model's.
        floor: Least share of the model's FLOPs in converted blocks.
        opset: Of ONNX; by default the smallest that is written.
        native: With ONNX, write the library of skimp's kernels beside it.
        metric: Of the task, to be reported of the model and of the artefact, where it runs in
            Python.

    Raises:
        ExportError: It cannot be exported, or the result is not within the bounds.
    """
    door = to or door_of(Path(path))
    check_door(door)
    if door == "safetensors":
        report = _export_folder(model, example, Path(path), tolerance, floor)
    else:
        write = _writer(door, Path(path), opset, native)
        captured = capture(model, example, dynamic_shapes, floor)
        report = write(captured, Path(path), tolerance)
    return report if metric is None else _measured(report, model, metric)


def _writer(door: str, path: Path, opset: int | None, native: bool) -> Callable[..., Report]:
    """What writes a door's artefacts; refuses early what cannot be."""
    if door == "pt2":
        from ..codegen.package import write_pt2

        if path.suffix != ".pt2":  # or torch refuses it, after all the work
            raise ExportError(f"{path} must end in .pt2")
        return write_pt2
    if door == "onnx":
        needs("onnx onnxruntime onnxscript", "onnx", "onnxruntime", "onnxscript")
        from ..codegen.onnx import OPSET, write_onnx

        if opset is not None and opset < OPSET:
            raise ExportError(f"opset {opset} is too old: the smallest that is written is {OPSET}")
        return partial(write_onnx, opset=opset or OPSET, native=native)
    needs("'skimp[mlir]'", "torch_mlir")
    if door == "mlir":
        from ..codegen.mlir import write_mlir

        return write_mlir
    needs("'skimp[mlir]'", "iree.compiler", "iree.runtime")
    from ..codegen.iree import write_iree

    return write_iree


def _measured(report: Report, model: nn.Module, metric: Metric) -> Report:
    from .store import load_file

    found = {"model": metric(lambda **kwargs: run_model(model, kwargs)[1])}
    if report.door in ("pt2", "onnx", "iree"):
        artefact = load_file(report.file, report.door)
        found["artefact"] = metric(lambda **kwargs: list(artefact(**kwargs).values()))
    return replace(report, metric=found)


def check_door(door: str) -> None:
    """Refuse what is not one of :data:`DOORS`.

    Raises:
        ExportError: It is none.
    """
    if door not in DOORS:
        raise ExportError(f"there is no door {door!r}; there are {', '.join(DOORS)}")


RUNTIMES = {
    "pt2": "torch (libtorch suffices, no Python) and a CPU like this one",
    "onnx": "any ONNX Runtime",
    "mlir": "a compiler of linalg, such as IREE",
    "iree": "IREE's runtime and a CPU like this one",
    "safetensors": "torch, skimp and the model's own code",
}
"""What each door's artefacts need."""


def dry_run(model: nn.Module, to: str, floor: float = 0.0) -> dict[str, Any]:
    """What an export would cover, without compiling or writing anything.

    Raises:
        ExportError: It would be refused.
    """
    check_door(to)
    found = blocks(model)
    if not found:
        raise ExportError("the model holds no converted block; convert it first")
    share = coverage(model)
    check_floor(share, floor)
    dense = sum(b.dense for b in found.values())
    return {
        "door": to, "coverage": share, "blocks": len(found), "dense": dense,
        "runtime": RUNTIMES[to],
    }  # fmt: skip


def _export_folder(
    model: nn.Module, example: Mapping[str, Any], path: Path, tolerance: float, floor: float
) -> Report:
    from .store import save

    if not isinstance(model, GraphModule):
        raise ExportError(
            "a folder of safetensors takes the graph that skimp.convert gave; for a module tree "
            "there is skimp.save_pretrained"
        )
    share = coverage(model)
    check_floor(share, floor)
    names, want = run_model(model, example)
    with drafts(path / INDEX) as part:
        save(model, part, example)
        errors = differences(names, want, run_model(_reader(part, model), example)[1])
        check_errors(errors, tolerance, ())
        size = sum(f.stat().st_size for f in part.iterdir())
        report = Report(
            "safetensors", str(path), size, RUNTIMES["safetensors"], share,
            len(blocks(model)), errors, {},
        )  # fmt: skip
        take_place(part, path)
    return report


def _reader(path: Path, model: GraphModule) -> GraphModule:
    """What the folder holds, in a copy of the graph: the architecture is not at hand."""
    again = copy.deepcopy(model)
    read_into(path, again)
    return again
