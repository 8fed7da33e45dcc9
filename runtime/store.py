"""Save a converted model, and load it into its architecture."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..ir import artefact
from ..ir.errors import ArtefactError
from ..passes.convert import prepare

if TYPE_CHECKING:
    from ..codegen.loaded import Loaded


def save(model: GraphModule, folder: str | Path, example: Mapping[str, Any]) -> None:
    """Write a converted model: safetensors and versioned JSON, never a pickle.

    Args:
        model: What :func:`skimp.convert` gave.
        folder: Made if need be; replaced only when everything is written.
        example: Keyword arguments of one call; their shapes and dtypes are kept for loading.

    Raises:
        ArtefactError: The folder cannot be written.
    """
    record = {"inputs": spec_of(example), "pipeline": model.meta.get("skimp.pipeline", "")}
    artefact.write(Path(folder), model, record)


@overload
def load(folder: str | Path, model: nn.Module) -> GraphModule: ...


@overload
def load(folder: str | Path) -> "Loaded": ...


def load(folder: str | Path, model: nn.Module | None = None) -> "GraphModule | Loaded":
    """Load a converted model.

    Args:
        folder: Where :func:`save` wrote it, or a ``.pt2``, ``.onnx`` or ``.vmfb`` that
            :func:`skimp.export` wrote.
        model: The architecture it was converted from; its weights do not matter. Files need none.

    Returns:
        The converted model; call it like the original.

    Raises:
        ArtefactError: A damaged or foreign file, or another architecture.
    """
    if door := _DOORS.get(Path(folder).suffix):
        return load_file(folder, door)
    if model is None:
        raise ArtefactError(f"{folder} holds weights only: pass the model it was converted from")
    index = artefact.read_index(Path(folder))
    record = index["record"]
    projections = bool(index.get("linears")) or any(
        b.get("linear") for b in index["blocks"].values()
    )
    gm, _ = prepare(model.eval(), example_of(record.get("inputs", {})), projections=projections)
    artefact.read_into(Path(folder), gm)
    gm.meta["skimp.pipeline"] = record.get("pipeline", "")
    return gm


_DOORS = {".pt2": "pt2", ".onnx": "onnx", ".vmfb": "iree"}


def load_file(path: str | Path, door: str) -> "Loaded":
    """Load what :func:`skimp.export` wrote as ``pt2``, ``onnx`` or ``iree``, whatever its name."""
    if door == "pt2":
        from ..codegen.package import load_pt2

        return load_pt2(path)
    if door == "onnx":
        from ..codegen.ort import Session

        return Session(path)
    from ..codegen.iree import IreeModule

    return IreeModule(path)


def spec_of(example: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes and dtypes of the keyword arguments of a call, for JSON."""
    return {
        name: {"shape": list(v.shape), "dtype": str(v.dtype).removeprefix("torch.")}
        if isinstance(v, Tensor)
        else {"value": v}
        for name, v in example.items()
    }


def example_of(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of a call from what :func:`spec_of` kept of one.

    Masks are ones; other integers alternate between 0 and 1, which any vocabulary has.
    """
    return {name: _example(name, spec) for name, spec in inputs.items()}


def _example(name: str, spec: dict[str, Any]) -> Any:
    if "value" in spec:
        return spec["value"]
    dtype = getattr(torch, str(spec["dtype"]))
    shape = [int(n) for n in spec["shape"]]
    if dtype.is_floating_point:
        return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    if "mask" in name:
        return torch.ones(shape, dtype=dtype)
    return (torch.arange(math.prod(shape)) // 2 % 2).view(shape).to(dtype)
