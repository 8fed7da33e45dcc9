"""Find the projections of attentions in a graph, by structure and by numbers, never by name.

    x -> linear -> heads -> query \
    y -> linear -> heads -> key    } softmax(query key^T) value -> rows -> linear -> output
    y -> linear -> heads -> value /

The middle is ``scaled_dot_product_attention``, or matrix products around a softmax. Between a
linear layer and the attention may lie what keeps a row a row: heads, rotary embedding, norms of
heads, repeated groups. One linear layer may serve several roles. Which of its columns serve which
is found by sending the columns' numbers through the graph, so that any layout is understood, also
heads of query, key and value in turn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..ir.site import FFNSite, Miss, ProjectionSite
from .find import ELEMENTWISE
from .linear import Linear, as_linear

aten = torch.ops.aten

_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}
_SOFTMAX = {aten.softmax.int, aten._softmax.default}
# Where a number goes, not what it is: these can be run on the numbers of columns.
_MOVES = {
    "view", "reshape", "_unsafe_view", "transpose", "permute", "t", "movedim", "unsqueeze",
    "squeeze", "expand", "slice", "select", "split", "split_with_sizes", "chunk", "unbind",
    "getitem", "unflatten", "flatten", "contiguous", "clone", "alias", "narrow", "dropout",
    "repeat_interleave", "detach_", "to", "_to_copy", "index_select",
}  # fmt: skip
# What heads go through on their way: rotary embedding, norms, scaling.
_HEADS = _MOVES | {
    "cat", "stack", "layer_norm", "rms_norm", "mean", "rsqrt", "sqrt", "linalg_vector_norm",
    "expand_as", "view_as_complex", "view_as_real", "where", "type_as",
} | {n.name().split("::")[1].split(".")[0] for n in ELEMENTWISE}  # fmt: skip
# What scores go through between the product, the softmax, and the next product.
_SCORES = _HEADS | {"masked_fill", "masked_fill_", "minimum", "maximum", "max", "min"}


def find_projections(
    gm: GraphModule, ffns: Sequence[FFNSite] = ()
) -> tuple[tuple[ProjectionSite, ...], tuple[Miss, ...]]:
    """Find every attention projection of a graph.

    Args:
        gm: A graph of aten ops, as :func:`skimp.passes.trace.trace` makes it.
        ffns: Feed-forward networks, whose linear layers are not looked at.

    Returns:
        The projections in order of execution, and what nearly was one.
    """
    linears = {n: lin for n in gm.graph.nodes if (lin := as_linear(gm, n)) is not None}
    taken = {w for s in ffns for w in (s.w_in, s.w_gate, s.w_out)}
    sites: dict[Node, list[ProjectionSite]] = {}
    misses: list[Miss] = []
    for node in gm.graph.nodes:
        match _attention(node):
            case Miss() as miss:
                misses.append(miss)
            case _Attention() as attention:
                for linear, found in _of(attention, linears, taken):
                    if isinstance(found, Miss):
                        misses.append(found)
                    elif [(s.role, s.columns) for s in sites.setdefault(linear.node, found)] != [
                        (s.role, s.columns) for s in found
                    ]:
                        first = sites[linear.node][0].role
                        misses.append(_miss(f"is also the {first} of another attention", linear))
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    return tuple(s for n in sorted(sites, key=order.__getitem__) for s in sites[n]), tuple(misses)


@dataclass(frozen=True, slots=True)
class _Attention:
    """One attention: what enters it by role, ``[.., length, width of a head]``, and what leaves."""

    inputs: dict[str, Node]
    output: Node
    widths: dict[str, int]
    heads: int | None


@dataclass(slots=True)
class _Walk:
    """What a walk against or along the edges met: what it ended at, and what it went through."""

    ends: dict[Node, None] = field(default_factory=dict)
    through: set[Node] = field(default_factory=set)
    stranger: Node | None = None


def _attention(node: Node) -> _Attention | Miss | None:
    if node.target is aten.scaled_dot_product_attention.default:
        query, key, value = node.args[:3]
        return _make(query, key, value, node)
    if node.target not in _SOFTMAX:
        return None
    scores = _back(node.args[0], lambda n: n.target in _PRODUCTS, _SCORES)  # type: ignore[arg-type]
    if not scores.ends:
        return None
    weighted = _forward(node, lambda n, _: n.target in _PRODUCTS, _MOVES | {"mul"})
    operands = [a for n in (*scores.ends, *weighted.ends) for a in _operands(n)]
    if not weighted.ends or any(a.op == "get_attr" for a in operands):
        return None  # a router, or scores that weigh nothing
    if len(scores.ends) > 1 or len(weighted.ends) > 1:
        which = "feed" if len(scores.ends) > 1 else "read"
        count = max(len(scores.ends), len(weighted.ends))
        return Miss(f"{count} matrix products {which} the softmax; one may", (node.name,))
    (product,), (output,) = scores.ends, weighted.ends
    query, key = _operands(product)
    value = next(a for a in _operands(output) if a not in weighted.through and a is not node)
    return _make(query, key, value, output)


def _make(query: Any, key: Any, value: Any, output: Node) -> _Attention:
    head = {"query": _size(query, -1), "value": _size(value, -1)}
    head["key"], head["output"] = head["query"], head["value"]
    heads = _size(query, -3) if len(_shape(query)) > 3 else None
    return _Attention(dict(query=query, key=key, value=value), output, head, heads)


def _of(
    attention: _Attention, linears: dict[Node, Linear], taken: set[str | None]
) -> Iterator[tuple[Linear, list[ProjectionSite] | Miss]]:
    """The projections of one attention, each with the linear layer that computes it."""
    roles: dict[Node, dict[str, _Walk]] = {}
    whole = (attention.output.name,)
    nowhere = Linear(attention.output, attention.output, "", None, False, 0, 0)
    for role, node in attention.inputs.items():
        walk = _back(node, linears.__contains__, _HEADS)
        if len(walk.ends) == 1:
            roles.setdefault(next(iter(walk.ends)), {})[role] = walk
        elif walk.ends:
            yield nowhere, Miss(f"{len(walk.ends)} linears feed the {role}; one may", whole)
        else:
            what = "an input" if walk.stranger is None else _name(walk.stranger)
            yield nowhere, Miss(f"no linear feeds the {role}; {what} does", whole)
    walk = _forward(attention.output, lambda n, x: n in linears and linears[n].x is x, _ROWS)
    if len(walk.ends) == 1:
        roles.setdefault(next(iter(walk.ends)), {})["output"] = walk
    else:
        count = len(walk.ends) or "no"
        yield nowhere, Miss(f"{count} linears read the attention's output; one must", whole)
    for node, by_role in roles.items():
        linear = linears[node]
        if linear.weight in taken:
            role = next(iter(by_role))
            yield linear, _miss(f"feeds the {role}, but is part of a feed-forward network", linear)
            continue
        yield linear, _sites(attention, linear, by_role)


def _sites(
    attention: _Attention, linear: Linear, roles: dict[str, _Walk]
) -> list[ProjectionSite] | Miss:
    columns: dict[str, list[int]] = {next(iter(roles)): list(range(linear.d_out))}
    if len(roles) > 1:
        columns = _columns(attention, linear, roles)
        used = [c for part in columns.values() for c in part]
        if len(used) != len(set(used)):
            return _miss(f"the same columns feed {' and '.join(roles)}", linear)
        if len(used) != linear.d_out:
            missing = linear.d_out - len(used)
            return _miss(f"{missing} of {linear.d_out} columns do not feed the attention", linear)
    for role, part in columns.items():
        width, size = (linear.d_in if role == "output" else len(part)), attention.widths[role]
        heads = width // size if size > 0 else 0
        whole = heads * size == width and heads > 0
        if not whole or (attention.heads is not None and attention.heads % heads):
            return _miss(
                f"width {width} of the {role} does not make heads of {size} for an attention of "
                f"{attention.heads or 'some'} heads",
                linear,
            )
    stem = linear.weight.removesuffix("weight").rstrip("._")
    return [
        ProjectionSite(
            name=stem if len(columns) == 1 else f"{stem}.{role}",
            role=role,
            d=linear.d_in,
            d_out=len(part),
            weight=linear.weight,
            bias=linear.bias,
            columns=None if len(columns) == 1 else _runs(part),
            transposed=linear.transposed,
            input_node=linear.x.name,
            output_node=linear.node.name,
        )
        for role, part in columns.items()
    ]


def _columns(
    attention: _Attention, linear: Linear, roles: dict[str, _Walk]
) -> dict[str, list[int]]:
    """Send the numbers of a fused linear's columns through the graph, and see where they arrive."""
    shape = _shape(linear.node)
    values: dict[Node, Any] = {linear.node: torch.arange(linear.d_out).expand(shape)}
    inside = set().union(*(w.through for w in roles.values()))
    for node in linear.node.graph.nodes:
        if node in inside and _name(node) in _MOVES and node not in values:
            args, kwargs = _known(node.args, values), _known(node.kwargs, values)
            if args is not None and kwargs is not None:
                values[node] = node.target(*args, **kwargs)
    found = {}
    for role, walk in roles.items():
        last = [
            n
            for n in (*walk.through, linear.node)
            if isinstance(values.get(n), Tensor)
            and (
                n is attention.inputs.get(role)
                or any(u in walk.through and u not in values for u in n.users)
            )
        ]
        found[role] = sorted({c for n in last for c in values[n].unique().tolist()})
    return found


def _known(argument: Any, values: dict[Node, Any]) -> Any:
    """An argument with numbers in the place of nodes; ``None`` if one has none."""
    missing = False

    def number(node: Node) -> Any:
        nonlocal missing
        if node in values:
            return values[node]
        if isinstance(size := node.meta.get("val"), int | torch.SymInt):
            return _hint(size)
        missing = True
        return None

    result = torch.fx.node.map_arg(argument, number)
    return None if missing else result


def _back(start: Node, end: Any, allowed: set[str]) -> _Walk:
    """Walk against the edges from ``start``, included, through ops of these names."""
    walk, queue = _Walk(), [start]
    while queue:
        node = queue.pop()
        if node in walk.ends or node in walk.through:
            continue
        if end(node):
            walk.ends[node] = None
        elif node.op == "call_function" and _name(node) in allowed:
            walk.through.add(node)
            queue += [a for a in node.all_input_nodes if _is_tensor(a)]
        elif node.op != "get_attr":
            walk.stranger = walk.stranger or node
    return walk


def _forward(start: Node, end: Any, allowed: set[str]) -> _Walk:
    """Walk along the edges from ``start``, not included, through ops of these names."""
    walk, queue = _Walk(), [(u, start) for u in start.users]
    while queue:
        node, source = queue.pop()
        if node in walk.ends or node in walk.through:
            continue
        tensors = [a for a in node.all_input_nodes if _is_tensor(a) and a.op != "get_attr"]
        if end(node, source):
            walk.ends[node] = None
        elif _name(node) in allowed and not (_name(node) == "add" and len(tensors) > 1):
            walk.through.add(node)
            queue += [(u, node) for u in node.users]
    return walk


# What may lie between the attention and the output projection; a sum of tensors is a residual.
_ROWS = _MOVES | {"mul", "add", "div", "sub", "pow", "mean", "rsqrt", "layer_norm", "rms_norm"}


def _operands(product: Node) -> list[Node]:
    """The two factors of a matrix product."""
    if product.target is aten.einsum.default:
        return list(product.args[1])  # type: ignore[arg-type]
    factors = product.args[1:3] if product.target is aten.baddbmm.default else product.args[:2]
    return [f for f in factors if isinstance(f, Node)]


def _name(node: Node) -> str:
    target = node.target
    return (
        target._schema.name.split("::")[1]
        if isinstance(target, torch._ops.OpOverload)
        else getattr(target, "__name__", str(target))
    )


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor | tuple | list)


def _shape(node: Any) -> tuple[int, ...]:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(_hint(n) for n in value.shape) if isinstance(value, Tensor) else ()


def _size(node: Any, dim: int) -> int:
    shape = _shape(node)
    return shape[dim] if len(shape) >= -dim else 0


def _hint(size: Any) -> int:
    """A size as it was in the example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _runs(columns: list[int]) -> tuple[tuple[int, int], ...]:
    """Sorted numbers as runs ``(start, stop)``."""
    starts = [c for i, c in enumerate(columns) if i == 0 or columns[i - 1] != c - 1]
    stops = [
        c + 1 for i, c in enumerate(columns) if i + 1 == len(columns) or columns[i + 1] != c + 1
    ]
    return tuple(zip(starts, stops, strict=True))


def _miss(reason: str, linear: Linear) -> Miss:
    return Miss(reason, (linear.node.name,))
