"""IREE: a ``.vmfb`` for CPUs, with thresholds as inputs, that needs neither torch nor skimp.

It is an archive, as IREE writes it, with the names of inputs and outputs in ``skimp/index.json``.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.artefact import drafts
from ..ir.errors import ArtefactError, ExportError, first_line, out_of_memory
from .cpp.bundle import check_machine
from .cpp.spec import detect_isa
from .exported import Program, Report, needs
from .loaded import Loaded, append, read
from .mlir import lower, to_module

VERSION = 1
_LITTLE = 1 << 24


def write_iree(captured: Program, path: Path, tolerance: float = 1e-4) -> Report:
    """Compile a converted model with IREE, for the CPU at hand.

    Args:
        captured: The model, on the CPU.
        path: Replaced only when the new file is complete and agrees.
        tolerance: Largest relative difference of an output to the model's.

    Raises:
        ExportError: It cannot be exported, or the result is not within the bounds.
    """
    module = to_module(lower(captured), captured.taus, "linalg-on-tensors")
    index = {
        "format": "skimp-iree",
        "version": VERSION,
        "isa": detect_isa(),
        "defaults": [float(captured.program.state_dict[n]) for n in captured.taus.values()],
        **captured.index(),
    }
    with drafts(path) as scratch:
        draft = scratch / "model.vmfb"
        _compile(module, scratch / "model.mlirbc", draft)
        append(draft, index)
        errors = captured.compare(IreeModule(draft).run, tolerance)
        size = draft.stat().st_size
        os.replace(draft, path)
    return Report(
        "iree", str(path), size, f"IREE's runtime {version('iree-base-runtime')}, {detect_isa()}",
        captured.coverage, len(captured.taus), errors, captured.free, None,
        [f"main takes {len(captured.taus)} thresholds, then {', '.join(captured.inputs)}",
         "every expert is computed and masked: the time of a dense model"],
    )  # fmt: skip


def _compile(module: Any, code: Path, to: Path) -> None:
    from iree.compiler import tools

    with code.open("wb") as file:  # weights as text would be twice as large
        module.operation.write_bytecode(file)
    try:
        tools.compile_file(
            str(code),
            target_backends=["llvm-cpu"],
            input_type="auto",
            output_file=str(to),
            extra_args=["--iree-llvmcpu-target-cpu=host"],
        )
    except tools.CompilerToolError as error:
        lines = [x for x in str(error).splitlines() if "error:" in x] or [first_line(error)]
        told = f"IREE cannot compile the model: {lines[0].strip()}"
        for folder in (to.parent, Path(tempfile.gettempdir())):
            # its linker says nothing of a full disk, and stumbles over the empty files there
            if (free := shutil.disk_usage(folder).free) < _LITTLE:
                told += f"; there is no space left in {folder} but {free / 1e6:.1f} MB"
        raise ExportError(told) from error


class IreeModule(Loaded):
    """A loaded ``.vmfb``.

    Raises:
        ArtefactError: It is damaged, truncated or foreign, or made for another processor.
    """

    def __init__(self, path: str | Path) -> None:
        needs("iree-base-runtime", "iree.runtime")
        from iree import runtime

        index, _ = read(Path(path), VERSION)
        check_machine(str(index["isa"]), str(path))
        self.told(index)
        self._given = {
            name: torch.tensor(value)
            for name, value in zip(self.taus.values(), index["defaults"], strict=True)
        }
        config = runtime.Config("local-task")
        try:
            context = runtime.SystemContext(config=config)
            module = runtime.VmModule.copy_buffer(context.instance, Path(path).read_bytes())
            context.add_vm_module(module)
            self._main: Any = context.modules.module.main
        except Exception as error:  # of no common class
            if out_of_memory(error):
                raise
            raise ArtefactError(
                f"{path} cannot be loaded by IREE {version('iree-base-runtime')}: "
                f"{first_line(error)}; export the model again"
            ) from error

    def run(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """From inputs by name to the outputs, in order."""
        tensors = [*self._given.values(), *(named[n] for n in self.inputs)]
        got = self._main(*(t.detach().contiguous().numpy() for t in tensors))
        outputs = got if isinstance(got, tuple | list) else [got]
        return [torch.from_numpy(o.to_host().copy()) for o in outputs]

    def turn(self, thresholds: Mapping[str, Tensor]) -> None:
        """Set thresholds, 0-d float32, by their names in the file."""
        self._given |= thresholds
