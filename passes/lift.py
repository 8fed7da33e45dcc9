"""Turn the sites of a graph into modules of their own, the same function.

linear(x, w_in, b_in) -> act -> linear(., w_out, b_out)  -->  DynkFFN(x) with tau = 0
linear(x, w, b) of an attention                          -->  Projection(x)
linear(x, w, b) of an attention, fused                   -->  cat(Projection(x), ..)[columns]
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..ir.block import DynkFFN, Projection, nearest_divisor
from ..ir.errors import NothingToConvertError
from ..ir.site import FFNSite, ProjectionSite
from .attention import find_projections
from .find import Found, find, table
from .offload import Offload
from .place import Place, places


@dataclass(frozen=True, slots=True)
class Lifted:
    """A graph whose sites are blocks."""

    gm: GraphModule
    found: Found


def search(gm: GraphModule) -> Found:
    """Find feed-forward networks and attention projections."""
    found = find(gm)
    projections, misses = find_projections(gm, found.sites)
    return replace(found, projections=projections, projection_misses=misses)


def lift(
    gm: GraphModule,
    *,
    expert_size: int = 8,
    router_width: int = 64,
    projections: bool = False,
    offload: Offload | None = None,
) -> Lifted:
    """Replace each site by a module that computes the same; ``gm`` is changed in place.

    Args:
        gm: A graph of aten ops.
        expert_size: Neurons per expert; where it does not divide ``d_ff``, the nearest divisor.
        router_width: Hidden width of the routers.
        projections: Lift the attention projections too.
        offload: Where the blocks lie; by default in memory.

    Raises:
        NothingToConvertError: The graph holds no feed-forward network, or no projection where
            these are asked for; says what came near.
    """
    found = search(gm) if projections else find(gm)
    made = offload or Offload()
    for what, held in (
        ("feed-forward network", found.sites),
        ("attention projection", found.projections or not projections),
    ):
        if not held:
            near = "\n".join(f"  {line}" for line in table(found)) or "  nothing came near"
            raise NothingToConvertError(
                f"no {what} was found in the graph, so there is nothing to convert.\n"
                f"Nearest misses:\n{near}\n`skimp explain` shows the same for any model."
            )
    nodes = {n.name: n for n in gm.graph.nodes}
    blocks: dict[tuple[Any, ...], str] = {}
    place_of = places(gm, [*found.sites, *found.projections])
    for site, place in zip(found.sites, place_of, strict=False):
        key = (site.w_in, site.w_gate, site.w_out)  # layers that share weights share the block
        if key not in blocks:
            blocks[key] = _unused_name(gm, site.name)
            size = nearest_divisor(site.d_ff, expert_size)
            gm.add_submodule(blocks[key], made.move(_block(gm, site, size, router_width)))
        _replace(gm, nodes[site.output_node], nodes[site.input_node], blocks[key], site, place)
    for output, group in groupby(found.projections, lambda s: s.output_node):
        parts = list(group)
        names = []
        for part in parts:
            columns = (part.weight, part.columns)
            if columns not in blocks:
                blocks[columns] = _unused_name(gm, part.name)
                gm.add_submodule(blocks[columns], made.move(_projection(gm, part, expert_size)))
            names.append(blocks[columns])
        first = parts[0]
        place = place_of[len(found.sites) + found.projections.index(first)]
        if len(parts) == 1:
            _replace(gm, nodes[output], nodes[first.input_node], names[0], first, place)
        else:
            _replace_fused(gm, nodes[output], nodes[first.input_node], names, parts, place)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    drop_unused_parameters(gm)
    gm.graph.lint()
    gm.recompile()
    return Lifted(gm, found)


def blocks(gm: nn.Module) -> dict[str, DynkFFN]:
    """The blocks of a converted model by name, in order of execution."""
    return {name: m for name, m in gm.named_modules() if isinstance(m, DynkFFN)}


def lifted_layers(gm: nn.Module) -> dict[str, DynkFFN | Projection]:
    """The blocks of a model, and the linear layers that could become blocks, by name."""
    kinds = (DynkFFN, Projection)
    return {name: m for name, m in gm.named_modules() if isinstance(m, kinds)}


def _projection(gm: GraphModule, site: ProjectionSite, expert_size: int) -> Projection:
    weight: Tensor = operator.attrgetter(site.weight)(gm).detach()
    bias = None if site.bias is None else operator.attrgetter(site.bias)(gm).detach()
    if site.transposed:
        weight = weight.T
    if site.columns is not None:
        rows = _indices([site])
        weight, bias = weight[rows], None if bias is None else bias[rows]
    return Projection(weight.contiguous(), bias, expert_size).train(gm.training)


def _indices(sites: Sequence[ProjectionSite]) -> Tensor:
    """Columns of a fused linear layer in the order in which its parts come."""
    return torch.cat([torch.arange(*run) for site in sites for run in site.columns or ()])


def _replace_fused(
    gm: GraphModule,
    output: Node,
    x: Node,
    names: Sequence[str],
    sites: Sequence[ProjectionSite],
    place: Place,
) -> None:
    """Compute the parts apart, and give their columns the places they had."""
    order = _indices(sites).argsort()
    with gm.graph.inserting_before(output):
        calls = [gm.graph.call_module(name, (x,)) for name in names]
        for call, site in zip(calls, sites, strict=True):
            call.meta = {k: output.meta[k] for k in ("nn_module_stack",) if k in output.meta}
            call.meta |= {"skimp.provenance": ("lift",), "skimp.site": site, "skimp.place": place}
        whole = gm.graph.call_function(torch.ops.aten.cat.default, (calls, -1))
        if not torch.equal(order, torch.arange(len(order))):
            buffer = f"{names[0].rpartition('.')[0]}.columns"
            owner, _, leaf = buffer.rpartition(".")
            gm.get_submodule(owner).register_buffer(leaf, order.to(next(gm.parameters()).device))
            columns = gm.graph.get_attr(buffer)
            whole = gm.graph.call_function(
                torch.ops.aten.index_select.default, (whole, -1, columns)
            )
    whole.meta = {k: output.meta[k] for k in ("val", "nn_module_stack") if k in output.meta}
    output.replace_all_uses_with(whole)
    gm.graph.erase_node(output)


def _block(gm: GraphModule, site: FFNSite, expert_size: int, router_width: int) -> DynkFFN:
    def get(name: str | None) -> Tensor | None:
        return None if name is None else operator.attrgetter(name)(gm).detach()

    w_in, b_in, w_gate, b_gate = map(get, (site.w_in, site.b_in, site.w_gate, site.b_gate))
    w_out = get(site.w_out)
    assert w_in is not None
    assert w_out is not None
    if site.transposed:
        w_in, w_gate = w_in.T, None if w_gate is None else w_gate.T
    else:
        w_out = w_out.T
    if site.fused is not None:
        first, second = (t if t is None else t.chunk(2) for t in (w_in, b_in))
        gate, up = (0, 1) if site.fused == "gate_up" else (1, 0)
        assert first is not None
        w_gate, w_in = first[gate], first[up]
        b_gate, b_in = (None, None) if second is None else (second[gate], second[up])
    block = DynkFFN(
        w_in.contiguous(),
        b_in,
        None if w_gate is None else w_gate.contiguous(),
        b_gate,
        w_out.contiguous(),
        get(site.b_out),
        expert_size=expert_size,
        act=site.act,
        router_width=router_width,
    )
    return block.to(w_in).train(gm.training)


def _replace(
    gm: GraphModule,
    output: Node,
    x: Node,
    name: str,
    site: FFNSite | ProjectionSite,
    place: Place,
) -> None:
    with gm.graph.inserting_before(output):
        call = gm.graph.call_module(name, (x,))
    call.meta = {k: output.meta[k] for k in ("val", "nn_module_stack") if k in output.meta}
    call.meta |= {"skimp.provenance": ("lift",), "skimp.site": site, "skimp.place": place}
    output.replace_all_uses_with(call)
    gm.graph.erase_node(output)


def _unused_name(gm: GraphModule, name: str) -> str:
    base = f"{name}.dynk" if name else "dynk"
    taken = {n for n, _ in gm.named_modules()}
    choice, i = base, 1
    while choice in taken:
        choice, i = f"{base}_{i}", i + 1
    return choice


def drop_unused_parameters(gm: GraphModule) -> None:
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    inside = tuple(f"{name}." for name in lifted_layers(gm))
    for name, _ in [*gm.named_parameters(), *gm.named_buffers()]:
        if name in read or name.startswith(inside):
            continue
        owner, _, leaf = name.rpartition(".")
        delattr(gm.get_submodule(owner), leaf)


__all__ = ["Lifted", "blocks", "lift", "lifted_layers", "search"]
