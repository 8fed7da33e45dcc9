"""Where in the module tree a site lives, so that a block can take its place without a graph.

A graph runs one fixed call; ``generate()`` with a cache, pipelines and everything else that walks
a model needs the modules. Nothing is known by class name: the export notes for every op which
modules it ran in, and a module is a site's own if all that it computes is the site.

    mlp(x)                                  the module computes the site and nothing else
    dense(x) ... act ... output.dense(h)    no module does, but each linear is a module of its own
    q_proj(x)                               an attention projection that is a module of its own
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from ..ir.site import FFNSite, ProjectionSite
from .find import is_transparent
from .linear import as_linear


@dataclass(frozen=True, slots=True)
class Place:
    """The modules that a block replaces.

    Attributes:
        paths: One module that is the whole site; or the linear modules of the site in order of
            execution, the first reading its input and the last giving its output. Empty: refused.
        whole: Whether it is the former.
        width: Columns that the first linear gives out where the model cuts its output, else 1.
        reason: Why it was refused.
    """

    paths: tuple[str, ...]
    whole: bool = False
    width: int = 1
    reason: str = ""


def places(gm: GraphModule, sites: Sequence[FFNSite | ProjectionSite]) -> list[Place]:
    """Find the place of each site.

    Args:
        gm: The graph that the sites were found in, unchanged since.
        sites: What :func:`skimp.passes.lift.search` found.
    """
    tree = _Tree(gm)
    found = [_place(tree, s) if isinstance(s, FFNSite) else _place_linear(tree, s) for s in sites]
    times = Counter(path for place in found for path in place.paths)
    return [_refuse_other_calls(tree, place, times) for place in found]


class _Tree:
    """Which nodes ran in which call of which module."""

    def __init__(self, gm: GraphModule) -> None:
        self.gm = gm
        self.nodes: dict[str, Node] = {n.name: n for n in gm.graph.nodes}
        self.members: dict[str, set[Node]] = defaultdict(set)
        self.calls: dict[str, set[str]] = defaultdict(set)
        for node in gm.graph.nodes:
            for call, path in stack(node):
                self.members[call].add(node)
                self.calls[path].add(call)


def stack(node: Node) -> list[tuple[str, str]]:
    """The calls that a node ran in, outermost first: (key of the call, path of the module)."""
    found: dict[str, Any] = node.meta.get("nn_module_stack") or {}
    return [(call, str(entry[0])) for call, entry in found.items()]


def _place(tree: _Tree, site: FFNSite) -> Place:
    out, x = tree.nodes[site.output_node], _origin(tree.nodes[site.input_node])
    inside = _between(out, x)
    known = {n: lin for n in tree.nodes.values() if n in inside and (lin := as_linear(tree.gm, n))}
    products = {lin.product for lin in known.values()}
    linears = [n for n in known if n not in products]
    for call, path in reversed(stack(out)):
        if path and set(linears) <= tree.members[call]:
            if _computes(tree.members[call], inside, x, out):
                return Place((path,), whole=True)
            break
    paths = []
    for linear in linears:
        call, path = stack(linear)[-1] if stack(linear) else ("", "")
        if not path or not _computes(tree.members[call], {linear}, _origin(_input(linear)), linear):
            return Place((), reason=f"{linear.name} is not a module of its own, nor is {site.name}")
        paths.append(path)
    cut = site.fused is not None
    return Place(tuple(paths), width=int(linears[0].meta["val"].shape[-1]) if cut else 1)


def _place_linear(tree: _Tree, site: ProjectionSite) -> Place:
    if site.columns is not None:
        return Place((), reason=f"{site.name} is a part of a fused linear layer")
    out = tree.nodes[site.output_node]
    call, path = stack(out)[-1] if stack(out) else ("", "")
    x = _origin(tree.nodes[site.input_node])
    if not path or not _computes(tree.members[call], _between(out, x), x, out):
        return Place((), reason=f"{site.name} is not a module of its own")
    return Place((path,), whole=True)


def _refuse_other_calls(tree: _Tree, place: Place, times: Counter[str]) -> Place:
    for path in place.paths:
        if len(tree.calls[path]) != times[path]:
            return Place((), reason=f"{path} is also called elsewhere")
    return place


def _between(out: Node, x: Node) -> set[Node]:
    """The nodes on the way from ``x`` to ``out``, both excluded and included respectively."""
    inside: set[Node] = set()
    waiting = [out]
    while waiting:
        node = waiting.pop()
        if node not in inside and node is not x and node.op == "call_function":
            inside.add(node)
            waiting += [a for a in node.all_input_nodes if _is_tensor(a) or _holds_tensors(a)]
    return inside


def _computes(members: set[Node], core: set[Node], x: Node, out: Node) -> bool:
    """Whether a module call computes ``core`` from ``x`` and nothing else, row by row."""
    entries, exits = [], []
    for node in members:
        carries = node.op == "get_attr" or not _is_tensor(node) or is_transparent(node)
        if node not in core and not carries:
            return False
        for source in node.all_input_nodes:
            if source not in members and source.op != "get_attr" and _is_tensor(source):
                entries.append(source)
        if node.op != "get_attr" and _is_tensor(node) and any(u not in members for u in node.users):
            exits.append(node)
    fits = all(_origin(n) is x for n in entries) and all(_origin(n, out) is out for n in exits)
    rows = {str(tuple(n.meta["val"].shape[:-1])) for n in (*entries, *exits)}
    return bool(entries) and bool(exits) and fits and len(rows) == 1


def _origin(node: Node, stop: Node | None = None) -> Node:
    """Look through what keeps the numbers: reshapes, dropout, copies."""
    while node is not stop and is_transparent(node) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _input(linear: Node) -> Node:
    return next(a for a in linear.all_input_nodes if a.op != "get_attr")


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _holds_tensors(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value)
