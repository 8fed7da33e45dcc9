"""Ahead of time: a ``.pt2`` file with the model, its kernels, and nothing of Python.

AOTInductor compiles the graph; the ops it calls, and every kernel they run, are one C++ library on
libtorch's stable ABI that lies in the same file, under ``skimp/``. :func:`load` loads the library
before the model. Thresholds stay constants by name, which a loaded model lets be written.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.exc import InductorError
from torch.fx import Graph, Node

from ..ir.artefact import drafts
from ..ir.cost import cache_dir, write_atomically
from ..ir.errors import ArtefactError, ExportError, SkimpError, first_line, out_of_memory
from .cpp.bundle import Bundle, bundle, check_machine, load_bundle
from .cpp.kernels import DTYPES
from .cpp.library import OPS
from .cpp.lower import lower
from .cpp.spec import KernelSpec, LinearSpec, detect_isa
from .exported import Program, Report
from .loaded import Loaded, append, read
from .spec import constants_of

VERSION = 2
LIBRARY = "skimp/kernels.so"


class _Bundle(CustomGraphPass):
    """Lower a graph, then point its calls to a library made for it."""

    def __init__(self) -> None:
        self.made: Bundle | None = None

    def __call__(self, graph: Graph) -> None:
        lower(graph)
        ours = torch.ops.skimp_cpu
        by_target = {getattr(ours, name).default: name for name in OPS}
        calls = [n for n in graph.nodes if n.target in by_target]
        if stays := [n for n in graph.nodes if n.target is torch.ops.skimp.dynk_ffn.default]:
            raise ExportError(
                f"{len(stays)} blocks have no CPU kernel (dtypes other than "
                f"{', '.join(DTYPES.values())}, or weights that are not on the CPU)"
            )
        specs: list[KernelSpec | LinearSpec] = []
        for call in calls:
            specs += _specs(by_target[call.target], [_value(a) for a in call.args])
        self.made = bundle(specs)
        for call in calls:
            call.target = self.made.op(by_target[call.target])
        config.aot_inductor.custom_ops_to_c_shims = self.made.shims

    def __deepcopy__(self, memo: object) -> "_Bundle":
        return self  # Inductor copies its configuration, and what is made is asked for here

    def uuid(self) -> Any:
        """None: what it makes lies beside the code, so neither is to come from a cache."""
        return


def _value(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return [_value(a) for a in argument]
    return argument.meta["val"] if isinstance(argument, Node) else argument


def _specs(op: str, args: Sequence[Any]) -> list[KernelSpec | LinearSpec]:
    """The kernels that a call can ask for."""
    isa = detect_isa()

    def linear(x: Tensor, w: Tensor, bias: bool) -> LinearSpec:
        return LinearSpec(int(w.shape[1]), int(w.shape[0]), bias, DTYPES[x.dtype], isa)

    x = args[0]
    if op == "linear":
        return [linear(x, args[1], args[2] is not None)]
    if op == "linears":
        return [linear(x, args[1][0], bool(args[2]))]
    first: list[KernelSpec | LinearSpec] = []
    if op == "routed_ffn":
        first = [linear(x, args[1], False), linear(x, args[2], False)]
    *weights, size, act = args[-8:]
    return [*first, KernelSpec(**constants_of(tuple(weights), size, act, DTYPES[x.dtype]), isa=isa)]


def write_pt2(captured: Program, path: Path, tolerance: float = 1e-4) -> Report:
    """Compile a converted model ahead of time.

    Args:
        captured: The model, on the CPU.
        path: Replaced only when the new file is complete and agrees.
        tolerance: Largest relative difference of an output to the model's.

    Raises:
        ExportError: It cannot be exported, or the result is not within the bounds.
        CompileError: There is no C++ compiler.
    """
    lowering = _Bundle()
    with drafts(path) as scratch:
        draft = scratch / "model.pt2"
        _compile(captured, lowering, draft)
        assert lowering.made is not None
        index = {
            "format": "skimp-pt2",
            "version": VERSION,
            "torch": torch.__version__,
            "namespace": lowering.made.namespace,
            "library": LIBRARY,
            "sha256": lowering.made.sha256,
            "isa": lowering.made.isa,
            **captured.index(),
        }
        append(draft, index, {LIBRARY: lowering.made.data})
        errors = captured.compare(load_pt2(draft).run, tolerance)
        size = draft.stat().st_size
        os.replace(draft, path)
    runtime = f"torch {torch.__version__} (libtorch suffices, no Python), {lowering.made.isa}"
    return Report(
        "pt2", str(path), size, runtime, captured.coverage, len(captured.taus), errors,
        captured.free,
    )  # fmt: skip


def _compile(captured: Program, lowering: _Bundle, to: Path) -> None:
    try:
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                captured.program,
                package_path=str(to),
                inductor_configs={
                    "post_grad_custom_post_pass": lowering,
                    "aot_inductor.custom_ops_to_c_shims": {},  # `lowering` fills it
                    "always_keep_tensor_constants": True,  # else thresholds become numbers
                },
            )
    except InductorError as error:  # of any error, ours too
        inner = error.inner_exception
        raise (inner if isinstance(inner, SkimpError | OSError | MemoryError) else error) from error


class Package(Loaded):
    """A loaded ``.pt2``.

    Attributes:
        index: What was noted at export.
    """

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.index = index
        self.told(index)
        try:
            self._model: Any = torch._inductor.aoti_load_package(str(path))
        except Exception as error:
            if out_of_memory(error):
                raise
            raise ArtefactError(
                f"{path} cannot be loaded by torch {torch.__version__} (it was made by "
                f"{index['torch']}): {first_line(error)}"
            ) from error
        names = self._model.get_constant_fqns()
        if lost := [n for n in index["taus"].values() if n not in names]:
            raise ArtefactError(f"{path} has no constants {lost[:3]}; it is damaged")

    def run(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """From inputs by name to the outputs, in order."""
        # the code was compiled for the strides of the example, and does not look
        return list(self._model.loader.run([named[n].contiguous() for n in self.inputs]))

    def turn(self, thresholds: Mapping[str, Tensor]) -> None:
        """Set thresholds, 0-d float32, by their names in the package."""
        self._model.load_constants(dict(thresholds), check_full_update=False)


def load_pt2(path: str | Path) -> Package:
    """Load a package: its kernels first, then the model.

    Raises:
        ArtefactError: It is damaged, truncated, foreign, without its kernels, or made for another
            processor.
    """
    path = Path(path)
    index, files = read(path, VERSION)
    check_machine(str(index["isa"]), str(path))
    if index["library"] not in files:
        raise ArtefactError(
            f"{path} lacks its kernel library {index['library']}; export the model again"
        )
    library = files[index["library"]]
    if hashlib.sha256(library).hexdigest() != index["sha256"]:
        raise ArtefactError(f"the kernel library in {path} is not the one it was made with")
    namespace = str(index["namespace"])
    where = cache_dir() / "packages" / f"{namespace}-{index['sha256'][:16]}.so"
    try:
        if not where.exists() or hashlib.sha256(where.read_bytes()).hexdigest() != index["sha256"]:
            write_atomically(where, library)
    except OSError as error:
        raise ArtefactError(
            f"the kernel library cannot be unpacked to {where} ({error.strerror or error}); point "
            "SKIMP_CACHE at a folder that can be written"
        ) from error
    load_bundle(where, namespace)
    return Package(path, index)


__all__ = ["Package", "write_pt2", "load_pt2"]
