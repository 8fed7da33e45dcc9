"""Replace, in a graph on its way to Inductor's code, what generated CPU kernels serve.

skimp::dynk_ffn(x, scores, tau, ..)            -->  skimp_cpu::dynk_ffn(x, scores, tau, ..)
  where scores = abs(relu(x down^T) up^T)      -->  skimp_cpu::routed_ffn(x, down, up, tau, ..)
addmm(b, x, w^T), mm(x, w^T)                   -->  skimp_cpu::linear(x, w, b)
  several of one shape that read the same x    -->  skimp_cpu::linears(x, [w, ..], [b, ..])

The last two only where this machine was measured to be faster at few rows; with many, the ops call
PyTorch's linear layer.
"""

from operator import getitem
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node

from ...ir.errors import CompileError
from ..match import is_weight, turned_weight, unviewed
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
    alike: dict[Any, list[_Linear]] = {}
    for node in list(graph.nodes):
        if node.target in (aten.addmm.default, aten.mm.default) and (found := _linear(node)):
            alike.setdefault(found.kind, []).append(found)
            count += 1
    for layers in alike.values():
        _call(graph, layers)
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


class _Linear(NamedTuple):
    """A linear layer that a kernel serves; those of one kind can share a call."""

    node: Node
    x: Node
    w: Node
    b: Node | None

    @property
    def kind(self) -> tuple[Node, tuple[int, ...], bool]:
        # where shapes are dynamic, every layer has a view of its own
        return unviewed(self.x), tuple(self.w.meta["val"].shape), self.b is None


def _linear(node: Node) -> _Linear | None:
    args: tuple[Any, ...] = node.args
    *bias, x, turned = args
    w = turned_weight(turned)
    if w is None or (bias and not is_weight(bias[0])) or node.kwargs:
        return None
    rows, weight = x.meta["val"], w.meta["val"]
    offset = bias[0].meta["val"] if bias else None
    tensors = [rows, weight, *([] if offset is None else [offset])]
    if rows.dtype not in DTYPES or any(
        t.dtype is not rows.dtype or t.device.type != "cpu" for t in tensors
    ):
        return None
    if offset is not None and (offset.shape != weight.shape[:1] or not offset.is_contiguous()):
        return None
    if not _pays(weight, offset is not None, rows):
        return None
    return _Linear(node, x, w, bias[0] if bias else None)


def _call(graph: Graph, layers: list[_Linear]) -> None:
    first = layers[0]
    # Weights are inputs of the graph, so all layers can run where the first does.
    with graph.inserting_before(first.node):
        if len(layers) == 1:
            call = graph.call_function(ops().linear.default, (first.x, first.w, first.b))
            return _replace(first.node, call)
        weights, biases = [n.w for n in layers], [n.b for n in layers if n.b is not None]
        call = graph.call_function(ops().linears.default, (first.x, weights, biases))
        call.meta["val"] = [n.node.meta["val"] for n in layers]
        parts = [graph.call_function(getitem, (call, i)) for i in range(len(layers))]
    for layer, part in zip(layers, parts, strict=True):
        _replace(layer.node, part)
    return None


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
