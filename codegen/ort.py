"""An ONNX file of skimp's in ONNX Runtime: on the standard operators, or on skimp's kernels.

The file is the same. Where a library of the kernels is registered in a session, ONNX Runtime takes
an operator from there, and else the function in the file.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import ArtefactError, first_line, out_of_memory
from .cpp.emit import ACTS
from .cpp.ort import DOMAIN, compile_operators, operator_name
from .cpp.spec import KernelSpec, detect_isa
from .loaded import Loaded

PROPERTIES = ("skimp.taus", "skimp.sha256")


def digest(model: Any) -> str:
    """Of the weights of an ``onnx.ModelProto`` and the operators it calls."""
    total = hashlib.sha256()
    for tensor in model.graph.initializer:
        total.update(tensor.name.encode() + tensor.raw_data)
    for node in model.graph.node:
        total.update(f"{node.domain}.{node.op_type}({','.join(node.input)})".encode())
    return total.hexdigest()


def read(path: Path) -> Any:
    """An ``onnx.ModelProto`` with its weights, looked through.

    Raises:
        ArtefactError: It is damaged, truncated or foreign.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path))
    except FileNotFoundError as error:
        raise ArtefactError(f"{error.filename or path} does not exist") from error
    except (DecodeError, OSError, onnx.checker.ValidationError) as error:
        raise ArtefactError(
            f"{path} is damaged or truncated ({first_line(error)}); export the model again"
        ) from error
    held = {p.key: p.value for p in model.metadata_props}
    if not set(PROPERTIES) <= set(held):
        raise ArtefactError(f"{path} was not written by skimp.export, or is truncated")
    if digest(model) != held["skimp.sha256"]:
        raise ArtefactError(f"{path} is damaged; export the model again")
    return model


def specs_of(model: Any) -> list[KernelSpec]:
    """The kernels that an ``onnx.ModelProto`` can ask for on this machine."""
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    kinds = {operator_name(act, gated): (act, gated) for act in ACTS for gated in (False, True)}
    found = []
    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        act, gated = kinds[node.op_type]
        (d_ff, d), (_, d_out) = shapes[node.input[3]], shapes[node.input[-2]]
        (size,) = (a.i for a in node.attribute if a.name == "expert_size")
        widths = dict(expert_size=size, d=d, d_ff=d_ff, d_out=d_out)
        biases = dict(b_in=True, b_gate=gated, b_out=True)
        found.append(KernelSpec(act, gated, **biases, **widths, dtype="float32", isa=detect_isa()))
    return found


def operators(path: str | Path) -> Path:
    """The library for ``SessionOptions.register_custom_ops_library``, for this file and machine.

    Raises:
        ArtefactError: The file is damaged or foreign.
        CompileError: There is no C++ compiler, or the cache cannot be written.
    """
    return compile_operators(specs_of(read(Path(path))))


class Session(Loaded):
    """A loaded file.

    Args:
        path: What :func:`skimp.export` wrote.
        native: On skimp's kernels; otherwise as ONNX Runtime alone would run it.
        library: Of the kernels, if it shall not be compiled.

    Attributes:
        session: The ``onnxruntime.InferenceSession``.

    Raises:
        ArtefactError: The file or the library is damaged, foreign or for another machine.
        CompileError: There is no C++ compiler.
    """

    def __init__(
        self, path: str | Path, *, native: bool = True, library: str | Path | None = None
    ) -> None:
        import onnxruntime

        model = read(Path(path))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # it warns of every threshold that can be changed
        if native:
            library = library or compile_operators(specs_of(model))
            try:
                options.register_custom_ops_library(str(Path(library).absolute()))
            except Exception as error:  # of no common class
                raise ArtefactError(
                    f"the kernel library {library} cannot be registered: {first_line(error)}"
                ) from error
        try:
            self.session: Any = onnxruntime.InferenceSession(
                str(path), options, ["CPUExecutionProvider"]
            )
        except Exception as error:
            if out_of_memory(error):
                raise
            raise ArtefactError(
                f"{path} cannot be loaded by ONNX Runtime {onnxruntime.__version__}: "
                f"{first_line(error)}"
            ) from error
        held = {p.key: p.value for p in model.metadata_props}
        self.taus = json.loads(held["skimp.taus"])
        self.gates = json.loads(held.get("skimp.gates", "[]"))
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.outputs = [o.name for o in self.session.get_outputs()]
        self._given: dict[str, Any] = {}

    def run(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """From inputs by name, of which it may not need all, to the outputs, in order."""
        feed = {n: named[n].numpy() for n in self.inputs}
        return [torch.from_numpy(a) for a in self.session.run(None, feed | self._given)]

    def turn(self, thresholds: Mapping[str, Tensor]) -> None:
        """Set thresholds, 0-d float32, by their names in the file."""
        self._given |= {name: tau.numpy() for name, tau in thresholds.items()}


__all__ = ["Session", "operators"]
