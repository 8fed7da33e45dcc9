"""Find feed-forward networks in a graph, by structure and by numbers, never by class name.

    x -> linear ---------> f ------> linear -> y          plain:  f(u) = act(u)
    x -> linear, linear -> f(u, g) -> linear -> y         gated:  f(u, g) = act(g) * u

A gated pair may be one linear cut in half. ``f`` may be spelled in any elementwise ops: it is run
on numbers and compared with each activation that the op knows, so a GELU written out in eight ops
is still a GELU.
"""

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..ir.op import ACTIVATIONS
from ..ir.site import FFNSite, Miss, ProjectionSite
from .linear import Linear, as_linear

aten = torch.ops.aten

ELEMENTWISE = {
    aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default,
    aten.tanh.default, aten.erf.default, aten.exp.default, aten.neg.default, aten.square.default,
    aten.mul.Tensor, aten.mul.Scalar, aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor,
    aten.div.Tensor, aten.pow.Tensor_Scalar, aten.clamp.default, aten.clamp_min.default,
    aten.leaky_relu.default, aten.elu.default, aten.hardswish.default, aten.hardtanh.default,
    aten.mish.default, aten.softplus.default, aten.relu6.default, aten.relu_.default,
    aten.silu_.default,
}  # fmt: skip
_ACTIVATIONS = {
    aten.relu.default, aten.relu_.default, aten.gelu.default, aten.silu.default,
    aten.silu_.default, aten.leaky_relu.default, aten.elu.default, aten.hardswish.default,
    aten.mish.default, aten.softplus.default, aten.relu6.default,
}  # fmt: skip
# The same numbers in the same last dimension: looked through, and skipped when f is run.
_TRANSPARENT = {
    aten.dropout.default, aten.clone.default, aten.alias.default, aten.contiguous.default,
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.detach_.default,
    aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout,
}  # fmt: skip
_CUTS = {aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default}


def is_transparent(node: Node) -> bool:
    """Whether a node hands on the numbers of its first input as they are."""
    return node.op == "call_function" and node.target in _TRANSPARENT


@dataclass(frozen=True, slots=True)
class Found:
    """What the search came to: the sites in order of execution, and what nearly was one.

    Attributes:
        sites: Feed-forward networks.
        misses: What came near being one.
        projections: Attention projections, where they were searched for.
        projection_misses: What came near being one.
    """

    sites: tuple[FFNSite, ...]
    misses: tuple[Miss, ...]
    projections: tuple[ProjectionSite, ...] = ()
    projection_misses: tuple[Miss, ...] = ()


@dataclass(frozen=True, slots=True)
class _Source:
    """An input of ``f``: a linear, or the first or second half of one."""

    linear: Linear
    half: int | None = None

    @property
    def width(self) -> int:
        return self.linear.d_out if self.half is None else self.linear.d_out // 2


@dataclass(slots=True)
class _Between:
    """The elementwise nodes between the sources and the last linear, inputs first."""

    nodes: list[Node] = field(default_factory=list)
    sources: dict[Node, _Source] = field(default_factory=dict)
    stranger: Node | None = None


def find(gm: GraphModule) -> Found:
    """Find every feed-forward network of a graph.

    Args:
        gm: A graph of aten ops, as :func:`skimp.passes.trace.trace` makes it.
    """
    linears = {n: lin for n in gm.graph.nodes if (lin := as_linear(gm, n)) is not None}
    for product in [lin.product for lin in linears.values() if lin.product is not None]:
        del linears[product]  # one layer, not two
    sites: list[FFNSite] = []
    misses: list[Miss] = []
    for down in linears.values():
        match _check(down, linears):
            case FFNSite() as site:
                sites.append(site)
            case Miss() as miss:
                misses.append(miss)
    return Found(tuple(sites), tuple(misses))


def _check(down: Linear, linears: dict[Node, Linear]) -> FFNSite | Miss | None:
    """Decide whether a linear is the last of a feed-forward network; ``None``: nothing like it."""
    between = _walk_back(down, linears)
    if not between.sources or not any(n.target in ELEMENTWISE for n in between.nodes):
        return None  # not an activation between linears, or two linears in a row
    nodes = tuple(n.name for n in (*between.sources, *between.nodes, down.node))
    if between.stranger is not None:
        if not _shaped(between, down):
            return None  # an ordinary projection, as of the sum that a norm has scaled
        what = getattr(between.stranger.target, "__name__", between.stranger.target)
        return Miss(f"{what} feeds the hidden activations; only elementwise ops may", nodes)
    sources = list(between.sources.values())
    if len(sources) > 2:
        return Miss(f"{len(sources)} linears feed the hidden activations; one or two may", nodes)
    if len({s.linear.x for s in sources}) > 1:
        return Miss("the two linears that feed the hidden activations read different inputs", nodes)
    if any(s.width != down.d_in for s in sources):
        return Miss(f"widths {[s.width for s in sources]} do not meet d_ff = {down.d_in}", nodes)
    first = sources[0].linear
    if first.d_in != down.d_out:
        return Miss(
            f"width {first.d_in} goes in and {down.d_out} comes out: a head, not a residual "
            "feed-forward network",
            nodes,
        )
    if (later := _fires_again(down.node)) is not None:
        return Miss(f"its output goes into {later.name} alone: a part of a deeper network", nodes)
    inside = {*between.nodes, *between.sources, *(s.linear.node for s in sources)}
    inside |= {down.product} if down.product is not None else set()
    for node in inside:
        if outside := [u for u in node.users if u not in inside and not _feeds(u, down, inside)]:
            return Miss(f"{node.name} is also read by {outside[0].name}", nodes)
    if any(s.linear.transposed != down.transposed for s in sources):
        return Miss("one linear stores [in, out] and the other [out, in]", nodes)
    named = _identify(between, down)
    if named is None:
        ops = ", ".join(dict.fromkeys(str(n.target).split(".")[1] for n in between.nodes))
        return Miss(f"activation ({ops}) is none of {', '.join(ACTIVATIONS)}", nodes)
    act, gate = named
    if act == "identity" and gate is None:
        return None
    return _site(down, between, act, gate)


def _shaped(between: _Between, down: Linear) -> bool:
    """Whether what was found would be a network if nothing else fed it."""
    sources = list(between.sources.values())
    return (
        len({s.linear.x for s in sources}) == 1
        and all(s.width == down.d_in for s in sources)
        and sources[0].linear.d_in == down.d_out != down.d_in
    )


def _fires_again(node: Node) -> Node | None:
    """The activation that alone reads a node."""
    users = list(node.users)
    while len(users) == 1 and users[0].target in _TRANSPARENT:
        users = list(users[0].users)
    return users[0] if len(users) == 1 and users[0].target in _ACTIVATIONS else None


def _site(down: Linear, between: _Between, act: str, gate: Node | None) -> FFNSite:
    gate_source = None if gate is None else between.sources[gate]
    up_source = next(s for n, s in between.sources.items() if n is not gate)
    fused = None
    if up_source.half is not None:
        fused = "up_gate" if up_source.half == 0 else "gate_up"
    up = up_source.linear
    return FFNSite(
        name=_common_prefix(up.weight, down.weight),
        act=act,
        d=up.d_in,
        d_ff=down.d_in,
        d_out=down.d_out,
        w_in=up.weight,
        b_in=up.bias,
        w_gate=None if gate_source is None else gate_source.linear.weight,
        b_gate=None if gate_source is None else gate_source.linear.bias,
        w_out=down.weight,
        b_out=down.bias,
        input_node=up.x.name,
        output_node=down.node.name,
        transposed=down.transposed,
        fused=fused,
    )


def _walk_back(down: Linear, linears: dict[Node, Linear]) -> _Between:
    """Collect what lies between a linear's input and the linears that it comes from."""
    between = _Between()

    def visit(node: Node) -> None:
        if node in between.sources or node in between.nodes:
            return
        if (source := _source(node, linears)) is not None:
            between.sources[node] = source
        elif node.op == "call_function" and node.target in ELEMENTWISE | _TRANSPARENT:
            inputs = node.all_input_nodes[: 1 if node.target in _TRANSPARENT else None]
            for arg in inputs:
                visit(arg)
            between.nodes.append(node)
        elif not _is_scalar(node):
            between.stranger = between.stranger or node

    visit(down.x)
    return between


def _source(node: Node, linears: dict[Node, Linear]) -> _Source | None:
    node = _through(node)
    if node in linears:
        return _Source(linears[node])
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        cut, index = node.args
        assert isinstance(cut, Node)
        whole = linears.get(_through(cut.args[0])) if cut.target in _CUTS else None  # type: ignore[arg-type]
        dim = cut.args[2] if len(cut.args) > 2 else cut.kwargs.get("dim", 0)
        last = dim in (-1, _rank(node) - 1)
        if whole is not None and last and len(cut.users) == 2 and _width(node) * 2 == whole.d_out:
            return _Source(whole, index)  # type: ignore[arg-type]
    if node.target is aten.slice.Tensor and isinstance(node.args[0], Node):
        whole = linears.get(_through(node.args[0]))
        last = len(node.args) > 2 and node.args[1] in (-1, _rank(node) - 1)
        if whole is not None and last and _width(node) * 2 == whole.d_out:
            return _Source(whole, 0 if node.args[2] in (0, None) else 1)
    if node.target is aten.select.int and isinstance(node.args[0], Node):  # of [.., 2, d_ff]
        halves, dim, index = node.args
        assert isinstance(halves, Node)
        whole = linears.get(_origin(halves))
        last = dim in (-2, _rank(node) - 1) and _value(halves).shape[dim] == 2
        if whole is not None and last and _width(node) * 2 == whole.d_out:
            return _Source(whole, index)  # type: ignore[arg-type]
    return None


def _origin(node: Node) -> Node:
    """Look through every reshape."""
    while node.target in _TRANSPARENT:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _through(node: Node) -> Node:
    """Look through reshapes that keep the last dimension, as a Conv1D wraps around its addmm."""
    while node.target in _TRANSPARENT and _width(node) == _width(node.args[0]):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, Node) else None


def _width(node: Any) -> int:
    shape = getattr(_value(node), "shape", None)
    return int(shape[-1]) if shape and isinstance(shape[-1], int) else -1


def _rank(node: Node) -> int:
    return len(getattr(_value(node), "shape", ()))


def _is_scalar(node: Node) -> bool:
    value = _value(node)
    return not isinstance(value, Tensor) or (node.op == "get_attr" and value.numel() == 1)


def _feeds(user: Node, down: Linear, inside: set[Node]) -> bool:
    """Whether a reader outside the site only carries values or sizes on the way through it."""
    if user is down.node:
        return True
    if not isinstance(_value(user), Tensor):  # sizes, and the tuple that a chunk returns
        return (user.target is not operator.getitem and not _tensors(user)[1:]) or all(
            _feeds(u, down, inside) or u in inside for u in user.users
        )
    return user.target in _TRANSPARENT and all(
        u in inside or _feeds(u, down, inside) for u in user.users
    )


def _tensors(node: Node) -> list[Any]:
    value = _value(node)
    return [v for v in value if isinstance(v, Tensor)] if isinstance(value, tuple | list) else []


def _common_prefix(a: str, b: str) -> str:
    pairs = zip(a.split("."), b.split("."), strict=False)
    return ".".join(x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _identify(between: _Between, down: Linear) -> tuple[str, Node | None] | None:
    """Run ``f`` on numbers: which activation it is, and which source is the gate."""
    generator = torch.Generator().manual_seed(0)
    sources = list(between.sources)
    inputs = {
        n: torch.cat([torch.linspace(-6, 6, 97), torch.randn(32, generator=generator) * 2])
        .roll(31 * i)
        .double()
        for i, n in enumerate(sources)
    }
    got = _run(between, down, dict(inputs))
    if got is None:
        return None
    # The tolerance admits a GELU constant written with seven digits; relatives are 1e-3 apart.
    for name, act in ACTIVATIONS.items():
        for gate in [None] if len(sources) == 1 else sources:
            main = next(n for n in sources if n is not gate)
            want = act(inputs[main]) if gate is None else act(inputs[gate]) * inputs[main]
            if torch.allclose(got, want, rtol=1e-6, atol=1e-6):
                return name, gate
    return None


def _run(between: _Between, down: Linear, values: dict[Node, Tensor]) -> Tensor | None:
    for node in between.nodes:
        if node.target in _TRANSPARENT:
            values[node] = values[node.args[0]]  # type: ignore[index]
            continue
        args = [_argument(a, values) for a in node.args]
        if any(a is None for a in args):
            return None
        target: Any = node.target
        values[node] = target(*args, **node.kwargs)
    return values.get(_resolve(down.x, values))


def _resolve(node: Node, values: dict[Node, Tensor]) -> Node:
    while node not in values and node.target in _TRANSPARENT:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _argument(arg: Any, values: dict[Node, Tensor]) -> Any:
    return values.get(_resolve(arg, values)) if isinstance(arg, Node) else arg


def table(found: Found) -> Iterator[str]:
    """One line per site and per miss."""
    for site in found.sites:
        kind = "gated " if site.gated else ""
        yield f"{site.name}: {kind}{site.act} {site.d} -> {site.d_ff} -> {site.d_out}"
    for projection in found.projections:
        yield f"{projection.name}: {projection.role} {projection.d} -> {projection.d_out}"
    for miss in (*found.misses, *found.projection_misses):
        yield f"not {miss.nodes[-1]}: {miss.reason}"
