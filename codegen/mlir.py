"""MLIR: a model as linalg on tensors, or with its blocks whole.

Thresholds are arguments of the function ``main``, before the model's own inputs; weights are
constants in it. torch-mlir lowers only what it knows, so blocks are taken apart first: the dense
network, with the neurons of experts that do not run replaced by zeros.
"""

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..ir.artefact import drafts
from ..ir.errors import ExportError, out_of_memory
from ..ir.op import SCORED, hidden, select
from .exported import Program, Report

aten, prims = torch.ops.aten, torch.ops.prims
RAW = ".raw.mlir"
"""End of the name of the file with whole blocks, beside that of linalg."""


def masked(
    x: Tensor, scores: Tensor, tau: Tensor, w_in: Tensor, b_in: Tensor | None,
    w_gate: Tensor | None, b_gate: Tensor | None, w_out: Tensor, b_out: Tensor | None,
    expert_size: int, act: str,
) -> Tensor:  # fmt: skip
    """The op, as :func:`skimp.ir.reference`, with experts as a dimension."""
    h = hidden(x, w_in, b_in, w_gate, b_gate, act).unflatten(-1, (-1, expert_size))
    if act == SCORED:
        h = h * scores.unsqueeze(-1)
    kept = torch.where(select(scores, tau, act).unsqueeze(-1), h, h.new_zeros(()))
    y = kept.flatten(-2) @ w_out
    return y if b_out is None else y + b_out


def _var_mean(
    x: Tensor, dim: Sequence[int] | None = None, *, correction: float | None = None,
    keepdim: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As in PyTorch, without the float64 that torch-mlir computes it in."""
    dims = list(range(x.dim()) if dim is None else dim)
    mean = x.mean(dims, keepdim=True)
    total = (x - mean).square().sum(dims, keepdim=keepdim)
    count = reduce(operator.mul, [x.shape[d] for d in dims])
    of = count - (1 if correction is None else int(correction))
    return total / of, mean if keepdim else x.mean(dims)


def lower(captured: Program, whole: bool = False) -> ExportedProgram:
    """A program in the operators that torch-mlir knows, with or without ``skimp::dynk_ffn``."""
    from torch_mlir.extras.fx_decomp_util import get_decomposition_table

    table: dict[Any, Callable[..., Any]] = dict(get_decomposition_table())
    table[aten.var_mean.correction] = _var_mean
    if not whole:
        table[torch.ops.skimp.dynk_ffn.default] = masked
    program: ExportedProgram = captured.program.run_decompositions(table)
    _collapse_views(program.graph_module.graph)
    return program


def to_module(program: ExportedProgram, taus: Mapping[str, str], form: str) -> Any:
    """An MLIR module of a lowered program.

    Args:
        program: What :func:`lower` gave; used up.
        taus: See :class:`Program`.
        form: ``raw`` or ``linalg-on-tensors``.

    Raises:
        ExportError: torch-mlir cannot lower it.
    """
    from torch_mlir.fx import stateless_fx_import

    graph = program.graph_module.graph
    held = {**program.state_dict, **program.constants}
    free = set(taus.values())
    by_name = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT or spec.target in free:
            continue
        node = by_name[spec.arg.name]
        node.replace_all_uses_with(held[str(spec.target)])
        graph.erase_node(node)
    try:
        return stateless_fx_import(
            program.graph_module, output_type=form, fx_importer=_importer(), model_name="main"
        )
    except Exception as error:  # of no common class
        if out_of_memory(error):
            raise
        raise ExportError(
            "torch-mlir cannot lower the model; which of its operators, it says on standard error"
        ) from error


def _importer() -> Any:
    """Promise that sizes are what the program says: equal ones are not compared again.

    IREE ends what it runs at once at each of those checks, two in a layer of a decoder, and the
    time that it takes to compile doubles with every layer.
    """
    from torch_mlir.dialects import torch as dialect
    from torch_mlir.extras.fx_importer import FxImporter
    from torch_mlir.ir import Context, UnitAttr

    class Importer(FxImporter):  # type: ignore[misc]
        def import_stateless_graph(self, g: Graph, **more: Any) -> Any:
            func = super().import_stateless_graph(g, **more)
            func.attributes["torch.assume_strict_symbolic_shapes"] = UnitAttr.get(func.context)
            return func

    context = Context()
    dialect.register_dialect(context)
    return Importer(context=context)


def _collapse_views(graph: Graph) -> None:
    """Say which dimensions a view merges: torch-mlir guesses where several are dynamic."""
    views = (aten.view.default, aten._unsafe_view.default)
    for node in [n for n in graph.nodes if n.target in views]:
        x, size = node.args
        before, after = list(x.meta["val"].shape), list(node.meta["val"].shape)
        groups = _groups(before, after)
        if groups is None:
            continue
        result: Node = x
        with graph.inserting_before(node):
            for (i, i_end), (j, j_end) in reversed(groups):
                if i == i_end:
                    result = _call(graph, aten.unsqueeze.default, result, i)
                if i_end - i > 1:
                    result = _call(graph, prims.collapse.default, result, i, i_end - 1)
                if j == j_end:
                    result = _call(graph, aten.squeeze.dim, result, i)
                if j_end - j > 1:
                    result = _call(graph, aten.unflatten.int, result, i, list(size[j:j_end]))
        node.replace_all_uses_with(result)
        graph.erase_node(node)


def _call(graph: Graph, target: Any, x: Node, *args: Any) -> Node:
    node = graph.call_function(target, (x, *args))

    def values(given: Any) -> Any:
        if isinstance(given, list):
            return [values(g) for g in given]
        return given.meta["val"] if isinstance(given, Node) else given

    node.meta["val"] = target(x.meta["val"], *(values(a) for a in args))
    return node


def _groups(
    before: Sequence[Any], after: Sequence[Any]
) -> list[tuple[tuple[int, int], tuple[int, int]]] | None:
    """Pairs of runs of dimensions that hold the same elements; None if they cannot be told."""
    found, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        first = i, j
        left, right = 1, 1
        if i < len(before):
            left, i = before[i], i + 1
        if j < len(after):
            right, j = after[j], j + 1
        while not statically_known_true(left == right):
            if j < len(after) and (i == len(before) or statically_known_true(left % right == 0)):
                right, j = right * after[j], j + 1
            elif i < len(before):
                left, i = left * before[i], i + 1
            else:
                return None
        found.append(((first[0], i), (first[1], j)))
    return found


def check_lowered(captured: Program, program: ExportedProgram, tolerance: float) -> dict[str, Any]:
    """Run a lowered program in PyTorch; see :attr:`Report.errors`.

    Raises:
        ExportError: It differs from the model.
    """
    with torch.no_grad():
        return captured.compare(lambda given: program.module()(*given.values()), tolerance)


def write_mlir(captured: Program, path: Path, tolerance: float = 1e-4) -> Report:
    """Write a converted model as MLIR text, twice: linalg on tensors, and with whole blocks.

    Args:
        captured: The model, on the CPU.
        path: Of the text of linalg; the other, in torch's dialect with ``skimp.dynk_ffn`` as an
            opaque operator, lies beside it and ends in :data:`RAW`.
        tolerance: Largest relative difference of an output to the model's.

    Raises:
        ExportError: It cannot be exported, or the result is not within the bounds.
    """
    program = lower(captured)
    errors = check_lowered(captured, program, tolerance)
    with drafts(path) as scratch:
        names = path.name, path.with_suffix("").name + RAW
        linalg = to_module(program, captured.taus, "linalg-on-tensors")
        raw = to_module(lower(captured, whole=True), captured.taus, "raw")
        for name, module in zip(names, (linalg, raw), strict=True):
            (scratch / name).write_text(str(module))
        size = sum(f.stat().st_size for f in scratch.iterdir())
        for name in names:
            os.replace(scratch / name, path.with_name(name))
    notes = [
        f"main takes {len(captured.taus)} thresholds, then {', '.join(captured.inputs)}",
        f"{names[1]} keeps torch.skimp.dynk_ffn whole, for compilers that know it",
        "errors are those of what torch-mlir was given, run in PyTorch; the door iree runs code",
    ]
    return Report(
        "mlir", str(path), size, "a compiler of linalg, such as IREE", captured.coverage,
        len(captured.taus), errors, captured.free, None, notes,
    )  # fmt: skip
