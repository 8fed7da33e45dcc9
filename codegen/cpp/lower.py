"""Replace, in a graph on its way to Inductor's code, what generated CPU kernels serve.

skimp::dynk_ffn(x, scores, tau, ..)            -->  skimp_cpu::dynk_ffn(x, scores, tau, ..)
  where scores = abs(relu(x down^T) up^T)      -->  skimp_cpu::routed_ffn(x, down, up, tau, ..)
addmm(b, x, w^T), mm(x, w^T)                   -->  skimp_cpu::linear(x, w, b)

The last only where this machine was measured to be faster at few rows; with many, the op calls
PyTorch's linear layer.
"""

from pathlib import Path
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from ...ir.errors import CompileError
from ..match import is_weight, turned_weight
from ..match import router as matched
from .kernels import DTYPES, few_rows, kernel, ops, unserved
from .spec import LinearSpec, detect_isa

aten = torch.ops.aten


class Lowering(CustomGraphPass):
    """The rewriting as a post-grad pass."""

    def __call__(self, graph: Graph) -> None:
        """Rewrite a graph in place."""
        lower(graph)

    def uuid(self) -> Any:
        """Text of the generator: a change recompiles."""
        here = Path(__file__).parent
        files = [*sorted(here.iterdir()), here.parent / "match.py"]
        return get_hash_for_files(tuple(str(f) for f in files if f.is_file()))


def lower(graph: Graph) -> int:
    """Rewrite ``graph`` in place.

    Returns:
        The number of calls replaced.
    """
    count = 0
    for node in list(graph.nodes):
        if node.target is torch.ops.skimp.dynk_ffn.default:
            count += _block(graph, node)
    graph.eliminate_dead_code()  # routers that are part of a call now
    for node in list(graph.nodes):
        if node.target in (aten.addmm.default, aten.mm.default):
            count += _linear(graph, node)
    graph.eliminate_dead_code()
    graph.lint()
    return count


def _block(graph: Graph, node: Node) -> bool:
    values: list[Any] = [a.meta.get("val") if isinstance(a, Node) else a for a in node.args]
    if unserved(*values):
        return False  # the op stays, and says at run time why it runs its reference
    x, scores, *others = node.args
    router = matched(scores, x)
    with graph.inserting_before(node):
        if router is None:
            call = graph.call_function(ops().dynk_ffn.default, node.args)
        else:
            call = graph.call_function(ops().routed_ffn.default, (x, *router, *others))
    _replace(node, call)
    return True


def _linear(graph: Graph, node: Node) -> bool:
    args: tuple[Any, ...] = node.args
    *bias, x, turned = args
    w = turned_weight(turned)
    if w is None or (bias and not is_weight(bias[0])) or node.kwargs:
        return False
    rows, weight = x.meta["val"], w.meta["val"]
    offset = bias[0].meta["val"] if bias else None
    tensors = [rows, weight, *([] if offset is None else [offset])]
    if rows.dtype not in DTYPES or any(
        t.dtype is not rows.dtype or t.device.type != "cpu" for t in tensors
    ):
        return False
    if offset is not None and (offset.shape != weight.shape[:1] or not offset.is_contiguous()):
        return False
    if not _pays(weight, offset is not None, rows):
        return False
    with graph.inserting_before(node):
        call = graph.call_function(ops().linear.default, (x, w, bias[0] if bias else None))
    _replace(node, call)
    return True


def _replace(node: Node, call: Node) -> None:
    # what Inductor noted of the arguments holds for the old signature only
    call.meta = {k: v for k, v in node.meta.items() if k != "eager_input_vals"}
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)


def _pays(w: torch.Tensor, bias: bool, x: torch.Tensor) -> bool:
    d_out, d = (int(n) for n in w.shape)
    spec = LinearSpec(d, d_out, bias, DTYPES[x.dtype], detect_isa())
    try:
        kernel(spec)
        ops()
        few = few_rows(spec)
    except CompileError:
        return False
    count = x.shape[0]
    return few > 0 if isinstance(count, torch.SymInt) else int(count) <= few
