"""The modules that each node of an exported graph was traced in, and what they cost."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten = torch.ops.aten

_WEIGHTED = {aten.linear.default, aten.conv2d.default, aten.conv1d.default}
_PRODUCTS = _WEIGHTED | {
    aten.scaled_dot_product_attention.default, aten.matmul.default, aten.mm.default,
    aten.addmm.default, aten.bmm.default,
}  # fmt: skip


class Scopes:
    """Which modules each node of a graph was traced in.

    Attributes:
        order: Position of each node.
        span: First and last position of each module path.
    """

    def __init__(self, gm: GraphModule) -> None:
        self.nodes = list(gm.graph.nodes)
        self.order = {n: i for i, n in enumerate(self.nodes)}
        self.span: dict[str, tuple[int, int]] = {}
        self.inside: dict[str, list[Node]] = defaultdict(list)
        self.calls: dict[str, set[str]] = defaultdict(set)
        for i, n in enumerate(self.nodes):
            for key, path in _stack(n):
                low, _ = self.span.get(path, (i, i))
                self.span[path] = (low, i)
                self.inside[path].append(n)
                self.calls[path].add(key)

    def paths(self, node: Node) -> list[str]:
        """The modules around a node, outermost first, without the root."""
        return [p for _, p in _stack(node)]

    def outputs(self, path: str) -> list[Node]:
        """The nodes of a module that others read."""
        own = set(self.inside[path])
        return [n for n in self.inside[path] if any(u not in own for u in n.users)]

    def inputs(self, path: str) -> list[Node]:
        """The computed tensors of others that a module reads, in order."""
        own = set(self.inside[path])
        read = {a for n in own for a in n.all_input_nodes if a not in own and a.op != "get_attr"}
        return sorted((n for n in read if shape(n)), key=self.order.__getitem__)


def _stack(node: Node) -> Iterator[tuple[str, str]]:
    for key, (path, _) in (node.meta.get("nn_module_stack") or {}).items():
        plain = re.sub(r"@\d+", "", str(path))
        if plain:
            yield str(key), plain


def shape(node: Node) -> tuple[int, ...]:
    """Of a node's tensor; empty where it is none."""
    value = node.meta.get("val")
    return tuple(map(int, value.shape)) if isinstance(value, Tensor) else ()


def flops_of(scopes: Scopes) -> dict[str, int]:
    """FLOPs by module path, ``""`` the whole, from shapes; a multiply-add counts as two."""
    found: dict[str, int] = defaultdict(int)
    for n in scopes.nodes:
        if n.op != "call_function" or n.target not in _PRODUCTS:
            continue
        a, b = (shape(x) for x in n.all_input_nodes[:2])
        if n.target is aten.scaled_dot_product_attention.default:
            each = 2 * a[-1] * math.prod(a[:-1]) * b[-2] / math.prod(shape(n))
            each += 2 * b[-2]
        elif n.target is aten.addmm.default:
            each = 2 * b[-1]
        else:  # a weight's columns times its window; or the rows of a product
            each = 2 * (math.prod(b[1:]) if n.target in _WEIGHTED else a[-1])
        for path in ("", *scopes.paths(n)):
            found[path] += int(each * math.prod(shape(n)))
    return dict(found)
