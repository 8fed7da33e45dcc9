"""Recognise, in a graph on its way to Inductor's code, what a kernel can take over with a block."""

from typing import Any

import torch
from torch.fx import Node

aten = torch.ops.aten


def router(scores: Any, x: Any) -> tuple[Node, Node] | None:
    """The two weights, if ``scores`` are what a router makes of ``x`` and nothing else needs."""
    first = _step(scores, aten.abs.default)
    up = first and _product(first)
    second = up and _step(up[0], aten.relu.default)
    down = second and _product(second)
    if not up or not down or unviewed(down[0]) is not unviewed(x):
        return None
    return down[1], up[1]


def _step(node: Any, target: Any) -> Node | None:
    """The argument of ``node``, if it is a call of ``target``, views aside, with one user."""
    node = unviewed(node)
    if not isinstance(node, Node) or node.target is not target or len(node.users) != 1:
        return None
    argument = unviewed(node.args[0])
    return argument if isinstance(argument, Node) and len(argument.users) == 1 else None


def _product(node: Node) -> tuple[Any, Node] | None:
    """``(x, w)``, if ``node`` is ``mm(x, w^T)`` of a weight."""
    if node.target is not aten.mm.default:
        return None
    x, turned = node.args
    w = turned_weight(turned)
    return None if w is None else (x, w)


_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}


def unviewed(node: Any) -> Any:
    """What a node is a view of, or itself."""
    while isinstance(node, Node) and node.target in _VIEWS:
        node = node.args[0]
    return node


def turned_weight(turned: Any) -> Node | None:
    """``w``, if ``turned`` is its transpose, a contiguous matrix that the graph is given."""
    if not isinstance(turned, Node) or turned.target is not aten.permute.default:
        return None
    w: Any = turned.args[0]
    if not is_weight(w) or turned.args[1] != [1, 0]:
        return None
    return w if w.meta["val"].dim() == 2 and w.meta["val"].is_contiguous() else None


def is_weight(node: Any) -> bool:
    """Whether the graph is given ``node``."""
    return isinstance(node, Node) and node.op in ("placeholder", "get_attr")
