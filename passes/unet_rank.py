"""How much each step or layer of a U-Net matters, on data of several timesteps.

    cosine      1 - cos(what enters, what leaves)
    output      |y without it - y|^2 / |y|^2 at the model's output
    attention   the same, summed over the self-attentions that run after it

All run on the exported graph: a part is left out by handing on what entered it, and only what
comes after is computed again. A ranking says what is lost before any training; it need not say
what is lost after it.
"""

import itertools
import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn import functional as F

from ..ir.errors import PlanError
from .base import first_tensor
from .lift import drop_unused_parameters
from .unet_graph import UNet
from .unet_scopes import shape
from .unet_student import sweep

RANKINGS = ("cosine", "output", "attention")
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Candidate:
    """A part of a graph that could be left out: what it is called, what enters, what leaves."""

    name: str
    input: str
    output: str


def candidates(gm: GraphModule, unet: UNet) -> list[Candidate]:
    """The steps and transformer layers that give what they read in shape."""
    found = [Candidate(s.name, s.input, s.output) for s in unet.steps if s.fixed is None] + [
        Candidate(layer, a, b)
        for s in unet.stacks
        for layer, a, b in zip(s.layers, s.inputs, s.outputs, strict=True)
    ]
    node = {n.name: n for n in gm.graph.nodes}
    return [c for c in found if shape(node[c.input]) == shape(node[c.output])]


def residuals(gm: GraphModule) -> list[Candidate]:
    """Every ``x + f(x)`` of 4-D tensors in a graph, whatever modules it was traced from.

    ``x`` may have been resized on the way, as around a sampler. Each is called as the parameters
    of its branch are, as far as these agree.
    """
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    found = []
    for n in gm.graph.nodes:
        if n.target not in (aten.add.Tensor, torch.add) or len(n.all_input_nodes) < 2:
            continue
        if len(shape(n)) != 4 or len({shape(n), *map(shape, n.all_input_nodes)}) > 1:
            continue
        for x, branch in itertools.permutations(n.all_input_nodes):
            inside = _between(branch, _source(x), order)
            if _source(x) in inside:
                read = [a.target.split(".") for a in inside if a.op == "get_attr"]  # type: ignore[union-attr]
                weights = [parts for parts in read if len(parts) > 1]
                name = ".".join(
                    itertools.takewhile(bool, map(_agreed, zip(*weights, strict=False)))
                )
                found.append(Candidate(name or n.name, x.name, n.name))
                break
    return found


def _source(node: Node) -> Node:
    """What a feature map is, or was before it was resized without weights."""
    inputs = node.all_input_nodes
    if len(inputs) == 1 and len(shape(node)) == len(shape(inputs[0])) == 4:
        same = shape(node)[:2] == shape(inputs[0])[:2]
        return inputs[0] if same and shape(node)[2:] != shape(inputs[0])[2:] else node
    return node


def _agreed(parts: tuple[str, ...]) -> str:
    return parts[0] if len(set(parts)) == 1 else ""


def _between(node: Node, x: Node, order: Mapping[Node, int]) -> set[Node]:
    """What a node is computed from, up to ``x`` and no further back, with parameters."""
    seen: set[Node] = set()
    todo = [node]
    while todo:
        here = todo.pop()
        if here not in seen and (order[here] >= order[x] or here.op == "get_attr"):
            seen.add(here)
            todo.extend(() if here is x else here.all_input_nodes)
    return seen


def drop(gm: GraphModule, parts: Sequence[Candidate]) -> None:
    """Leave parts out of a graph for good, in place."""
    node = {n.name: n for n in gm.graph.nodes}
    for part in sorted(parts, key=lambda c: list(node).index(c.output)):
        entry = node[part.input]
        node[part.output].replace_all_uses_with(entry)
        for name, other in node.items():  # what was entered here now enters later parts
            if other is node[part.output] and name != part.output:
                node[name] = entry
        node[part.output] = entry
    sweep(gm)
    drop_unused_parameters(gm)
    gm.recompile()


def rank(
    gm: GraphModule, unet: UNet, data: Sequence[Mapping[str, Any]], by: str = "output"
) -> dict[str, float]:
    """Score every step and layer of a U-Net, see :func:`scores`."""
    return scores(gm, candidates(gm, unet), data, by, [t.output for t in unet.taps])


def scores(
    gm: GraphModule,
    parts: Sequence[Candidate],
    data: Sequence[Mapping[str, Any]],
    by: str = "output",
    taps: Sequence[str] = (),
) -> dict[str, float]:
    """Score parts of a graph; the larger, the more is lost without it.

    Args:
        gm: An exported graph.
        parts: What could be left out.
        data: Arguments of calls, of the shapes that it was exported with, at several timesteps.
        by: ``cosine``, ``output`` or ``attention``.
        taps: Nodes of self-attentions, for ``attention``.

    Returns:
        By name, the mean over calls.

    Raises:
        PlanError: There is no such ranking.
    """
    if by not in RANKINGS:
        raise PlanError(f"there is no ranking {by!r}; there are {', '.join(RANKINGS)}")
    found: dict[str, float] = defaultdict(float)
    with torch.no_grad():
        for batch in data:
            for name, value in _one(gm, parts, batch, by, set(taps)):
                found[name] += value / len(data)
    return dict(found)


def _one(
    gm: GraphModule, parts: Sequence[Candidate], batch: Mapping[str, Any], by: str, taps: set[str]
) -> Iterator[tuple[str, float]]:
    nodes = list(gm.graph.nodes)
    at = {n.name: i for i, n in enumerate(nodes)}
    ends: dict[int, list[Candidate]] = defaultdict(list)
    last = {i: i for i in range(len(nodes))}  # where a value is needed last
    for n in nodes:
        for a in n.all_input_nodes:
            last[at[a.name]] = max(last[at[a.name]], at[n.name])
    for c in parts:
        ends[at[c.output]].append(c)
        last[at[c.input]] = max(last[at[c.input]], at[c.output])
    free: dict[int, list[int]] = defaultdict(list)
    for i, j in last.items():
        free[j].append(i)

    def go(values: dict[int, Any], start: int, watched: dict[str, Tensor]) -> Iterator[int]:
        for i in range(start, len(nodes)):
            values[i] = _value(gm, nodes[i], lambda n: values[at[n.name]], values.get(i))
            if nodes[i].name in taps:
                watched[nodes[i].name] = values[i]
            yield i
            for j in free[i]:
                if j != len(nodes) - 1:
                    values.pop(j, None)

    def rest(values: dict[int, Any], start: int) -> tuple[Tensor, dict[str, Tensor]]:
        seen: dict[str, Tensor] = {}
        for _ in go(values, start, seen):
            pass
        return first_tensor(values[len(nodes) - 1]), seen

    values = bind(gm, batch)
    if by != "cosine":
        want, features = rest(dict(values), 0)
    for i in go(values, 0, {}):
        for c in ends[i]:
            x, y = values[at[c.input]], values[i]
            if by == "cosine":
                dim = 1 if y.dim() == 4 else -1
                yield c.name, float((1 - F.cosine_similarity(x, y, dim=dim).double()).mean())
                continue
            fork = {**values, i: x}
            for j in free[i]:
                if j != i:
                    fork.pop(j, None)
            got, other = rest(fork, i + 1)
            if by == "output":
                yield c.name, lost(got, want)
            else:
                yield c.name, sum(lost(f, features[n]) for n, f in other.items())


def lost(got: Tensor, want: Tensor) -> float:
    """Squared error relative to the square of what it should be."""
    error = (got.double() - want.double()).square().sum()
    return float(error / want.double().square().sum().clamp_min(1e-30))


def bind(gm: GraphModule, batch: Mapping[str, Any]) -> dict[int, Any]:
    """The values of a graph's placeholders, by position in the graph."""
    places = [(i, n) for i, n in enumerate(gm.graph.nodes) if n.op == "placeholder"]
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is None:
        return {i: batch[str(n.target)] for i, n in places}
    _, keywords = info.in_spec.children()
    return dict(zip((i for i, _ in places), _leaves(batch, keywords), strict=True))


def _leaves(value: Any, spec: Any) -> list[Any]:
    if spec.is_leaf():
        return [value]
    names = spec.context if isinstance(value, Mapping) else range(len(spec.children()))
    return [x for n, s in zip(names, spec.children(), strict=True) for x in _leaves(value[n], s)]


def _value(gm: GraphModule, node: Node, known: Any, given: Any) -> Any:
    if node.op == "placeholder":
        return given
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(gm)
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), known)
    if node.op == "output":
        return args[0]
    if node.op == "call_module":
        return gm.get_submodule(str(node.target))(*args, **kwargs)
    target: Any = node.target
    return target(*args, **kwargs)
