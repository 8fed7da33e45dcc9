"""Read a diffusion U-Net off its exported graph, by structure, never by class or attribute name.

    push   h = f(h), and a later join reads h        the encoder, one skip each
    stay   h = f(h)                                  the middle, upsamplers, the head
    pop    h = f(cat(h, skip))                       the decoder, last skip first

A skip join is a concatenation of two 4-D tensors along their channels: its later operand is the
hidden state, its earlier one the skip. Whatever lies between two such points is a step. Stacks of
transformer layers are members of one container that read each other, shape by shape; a
self-attention is the smallest module around an attention whose queries and keys are computed from
the same tensor.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from ..ir.errors import NothingToConvertError, TraceError
from .find import is_transparent
from .unet_scopes import Scopes, flops_of, shape

aten = torch.ops.aten

_CORES = {
    aten.scaled_dot_product_attention.default, aten.softmax.int, aten._softmax.default,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the skip stack.

    Attributes:
        kind: ``push``, ``stay`` or ``pop``.
        members: Paths of the modules that it runs, in order.
        reads: Channels of what it reads, after the join.
        gives: Channels of what it gives.
        size: Height and width of what it reads.
        size_out: And of what it gives.
        input, output: Names of the graph nodes.
        join: Name of the node that concatenates, of a pop.
        first: The hidden state is the join's first operand.
        fixed: Why it cannot be removed, whatever else is; ``None`` where it can.
    """

    kind: str
    members: tuple[str, ...]
    reads: int
    gives: int
    size: tuple[int, int]
    size_out: tuple[int, int]
    input: str
    output: str
    join: str | None = None
    first: bool = True
    fixed: str | None = None

    @property
    def name(self) -> str:
        """The path of its first module."""
        return self.members[0] if self.members else self.output

    def holds(self, path: str) -> bool:
        """Whether a module is one of its members, or inside one."""
        return any(path == m or path.startswith(f"{m}.") for m in self.members)


@dataclass(frozen=True, slots=True)
class Stack:
    """Transformer layers in a row.

    Attributes:
        name: Path of their container.
        layers: Their paths, in order of execution.
        inputs, outputs: Names of the graph nodes that enter and leave each.
        size: Height and width of the feature map that they work on.
    """

    name: str
    layers: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Tap:
    """A self-attention: its module, the node that it gives, and the layer that it is in."""

    name: str
    output: str
    layer: str


@dataclass(frozen=True, slots=True)
class UNet:
    """What was found.

    Attributes:
        steps: In order of execution.
        stacks: Transformer stacks, in order.
        taps: Self-attentions, in order.
        flops: FLOPs of one call by module path, of all modules; ``""`` is the whole.
    """

    steps: tuple[Step, ...]
    stacks: tuple[Stack, ...]
    taps: tuple[Tap, ...]
    flops: Mapping[str, int]

    @property
    def joins(self) -> tuple[Step, ...]:
        """The steps that join a skip."""
        return tuple(s for s in self.steps if s.kind == "pop")

    def stages(self, kind: str) -> list[list[Step]]:
        """Removable steps of a kind, those of one resolution together, in order."""
        found: dict[tuple[int, int], list[Step]] = defaultdict(list)
        for s in self.steps:
            if s.kind == kind and s.fixed is None:
                found[s.size].append(s)
        return list(found.values())


def export_unet(model: nn.Module, example: Mapping[str, Any]) -> GraphModule:
    """Capture a U-Net as one graph of fixed shapes; meta tensors do.

    Args:
        model: In any mode; it is captured in evaluation mode.
        example: Keyword arguments of one call.

    Raises:
        TraceError: It cannot be captured.
    """
    was_training = model.training
    try:
        with torch.no_grad():
            program = torch.export.export(model.eval(), (), dict(example), strict=False)
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise TraceError(
            f"{type(model).__name__} cannot be captured as one graph: {first}\n"
            "Check that it runs with these inputs: skimp.passes.prune_unet.example_of makes some"
        ) from error
    finally:
        model.train(was_training)
    gm = program.module(check_guards=False)
    assert isinstance(gm, GraphModule)
    return gm


def discover(gm: GraphModule) -> UNet:
    """Find the steps, transformer stacks and self-attentions of a U-Net.

    Args:
        gm: What :func:`export_unet` gave.

    Raises:
        NothingToConvertError: It has no skip joins, or they do not pair up last first.
    """
    scopes = Scopes(gm)
    steps = tuple(_steps(scopes))
    stacks = tuple(_stacks(scopes, steps))
    return UNet(steps, stacks, tuple(_taps(scopes, stacks)), flops_of(scopes))


def _joins(scopes: Scopes) -> list[tuple[Node, Node, Node]]:
    """Each join with its hidden state and its skip."""
    found = []
    for n in scopes.nodes:
        if n.target is not aten.cat.default or len(shape(n)) != 4:
            continue
        operands, dim = n.args[0], n.args[1] if len(n.args) > 1 else n.kwargs.get("dim", 0)
        if dim not in (1, -3) or len(operands) != 2:
            continue
        first, second = operands
        order = sorted([first, second], key=lambda a: scopes.order[_behind(a)])
        if any(a.op == "placeholder" for a in order):
            continue  # a condition put beside the sample
        found.append((n, order[1], order[0]))
    return found


def _behind(node: Node) -> Node:
    """What a node hands on, in the same shape."""
    while is_transparent(node) and shape(node) == shape(node.all_input_nodes[0]):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _steps(scopes: Scopes) -> Iterator[Step]:
    joins = _joins(scopes)
    skips = [_behind(skip) for _, _, skip in joins]
    if not joins:
        raise NothingToConvertError(
            "no skip join was found: no two 4-D tensors are concatenated along their channels, so "
            "this is no U-Net"
        )
    if [scopes.order[s] for s in skips] != sorted({scopes.order[s] for s in skips}, reverse=True):
        raise NothingToConvertError(
            "the skips are not joined last first: "
            + "; ".join(
                f"{j.name} reads {s.name}" for (j, _, _), s in zip(joins, skips, strict=True)
            )
            + ". Only U-Nets that pop what they pushed can be pruned."
        )
    before: Node | None = None
    for skip in reversed(skips):
        yield _step(scopes, "push", before, skip)
        before = skip
    here = before
    for i, (join, h, _) in enumerate(joins):
        h = _behind(h)
        assert here is not None
        if h is not here:
            yield from _runs(scopes, None if i == 0 else joins[i - 1], here, h)
        elif i:
            raise NothingToConvertError(
                f"nothing lies between {joins[i - 1][0].name} and {join.name}"
            )
        here = h
    assert here is not None
    yield from _runs(scopes, joins[-1], here, scopes.nodes[-1].all_input_nodes[0])


def _runs(
    scopes: Scopes, join: tuple[Node, Node, Node] | None, h: Node, end: Node
) -> Iterator[Step]:
    """What lies between a join, or the last push, and the next: a pop and what stays after it."""
    if join is None:
        yield _step(scopes, "stay", h, end)
        return
    members = _members(scopes, join[0], end)
    keep = 0  # the unit: members of containers that keep the resolution
    last = join[0]
    for path in members:
        out = scopes.outputs(path)
        if not path.rpartition(".")[2].isdigit() or len(out) != 1:
            break
        if shape(out[0])[2:] != shape(join[0])[2:]:
            break
        keep, last = keep + 1, out[0]
    if not keep:
        raise NothingToConvertError(f"no module of a container reads the join {join[0].name}")
    first = join[0].all_input_nodes[0]
    yield _step(scopes, "pop", join[0], last, h, members[:keep], _behind(first) is _behind(join[1]))
    if last is not end:
        yield _step(scopes, "stay", last, end, members=members[keep:])


def _step(
    scopes: Scopes,
    kind: str,
    start: Node | None,
    end: Node,
    h: Node | None = None,
    members: list[str] | None = None,
    first: bool = True,
) -> Step:
    found = _members(scopes, start, end) if members is None else members
    entry = start if start is not None else scopes.inputs(found[0])[-1]
    _, reads, *size = shape(entry)
    _, gives, *size_out = shape(end)
    fixed = None
    if start is None:
        fixed = "it reads the input"
    elif size != size_out:
        fixed = f"it changes the resolution from {size[0]}x{size[1]} to {size_out[0]}x{size_out[1]}"
    elif kind != "stay" and not all(m.rpartition(".")[2].isdigit() for m in found):
        fixed = "its modules are not members of containers"
    elif kind == "stay" and reads != gives:
        fixed = f"it changes the channels from {reads} to {gives}"
    elif any(len(scopes.calls[m]) > 1 for m in found):
        fixed = "a module of it is called more than once"
    return Step(
        kind, tuple(found), reads, gives, (size[0], size[1]), (size_out[0], size_out[1]),
        (h or entry).name, end.name, entry.name if kind == "pop" else None, first, fixed,
    )  # fmt: skip


def _members(scopes: Scopes, start: Node | None, end: Node) -> list[str]:
    """The outermost modules that ran between two nodes, and nowhere else."""
    low = -1 if start is None else scopes.order[start]
    high = scopes.order[end]
    found: dict[str, None] = {}
    spine = _ancestors(end, start)
    for node in scopes.nodes[low + 1 : high + 1]:
        for path in scopes.paths(node):
            a, b = scopes.span[path]
            if low < a and b <= high:
                if node in spine:
                    found[path] = None
                break
    return list(found)


def _ancestors(end: Node, start: Node | None) -> set[Node]:
    """What a node is computed from, and is computed from ``start`` or from 4-D inputs."""
    seen: set[Node] = set()
    todo = [end]
    while todo:
        node = todo.pop()
        if node in seen or node is start:
            continue
        seen.add(node)
        todo.extend(a for a in node.all_input_nodes if start is not None or len(shape(a)) == 4)
    return seen


def _stacks(scopes: Scopes, steps: tuple[Step, ...]) -> Iterator[Stack]:
    groups: dict[str, list[str]] = defaultdict(list)
    cores = [n for n in scopes.nodes if n.target in _CORES]
    around = {p for n in cores for p in scopes.paths(n)}
    for path in scopes.span:
        owner, _, leaf = path.rpartition(".")
        if leaf.isdigit() and path in around and _keeps_shape(scopes, path) is not None:
            groups[owner].append(path)
    for owner, layers in groups.items():
        ends = [_keeps_shape(scopes, p) for p in layers]
        pairs = [e for e in ends if e is not None]
        if any(a[1] is not b[0] for a, b in itertools.pairwise(pairs)):
            continue  # not one after the other
        size = next((s.size for s in steps if s.holds(layers[0])), (0, 0))
        yield Stack(
            owner, tuple(layers), tuple(a.name for a, _ in pairs), tuple(b.name for _, b in pairs),
            size,
        )  # fmt: skip


def _keeps_shape(scopes: Scopes, path: str) -> tuple[Node, Node] | None:
    """What enters and leaves a module of sequences ``[batch, length, d]``, where both are alike."""
    out = scopes.outputs(path)
    if len(out) != 1 or len(shape(out[0])) != 3 or len(scopes.calls[path]) > 1:
        return None
    like = [n for n in scopes.inputs(path) if shape(n) == shape(out[0]) and n.op != "placeholder"]
    return (like[-1], out[0]) if like else None


def _taps(scopes: Scopes, stacks: tuple[Stack, ...]) -> Iterator[Tap]:
    layers = [layer for s in stacks for layer in s.layers]
    for core in (n for n in scopes.nodes if n.target in _CORES):
        path = scopes.paths(core)[-1] if scopes.paths(core) else ""
        layer = next((la for la in layers if path.startswith(f"{la}.")), None)
        out = scopes.outputs(path) if layer is not None else []
        if layer is None or len(out) != 1:
            continue
        own = set(scopes.inside[path])
        asked = core.all_input_nodes[:2]  # queries and keys, or the scores alone
        if (
            len({frozenset(_outside(a, own)) for a in asked}) == 1
            and len(_outside(asked[0], own)) == 1
        ):
            yield Tap(path, out[0].name, layer)


def _outside(node: Node, own: set[Node]) -> set[Node]:
    """The computed tensors outside a module that one of its nodes comes from."""
    if node.op == "get_attr":
        return set()
    if node not in own:
        return {node} if shape(node) else set()
    return {o for a in node.all_input_nodes for o in _outside(a, own)}
