"""Turn the sites of a graph into blocks.

linear(x, w_in, b_in) -> act -> linear(., w_out, b_out)
-->
DynkFFN(x) with tau = 0, the same function
"""

import operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..ir.block import DynkFFN, nearest_divisor
from ..ir.errors import NothingToConvertError
from ..ir.site import FFNSite
from .find import Found, find, table
from .place import Place, places


@dataclass(frozen=True, slots=True)
class Lifted:
    """A graph whose sites are blocks."""

    gm: GraphModule
    found: Found


def lift(gm: GraphModule, *, expert_size: int = 8, router_width: int = 64) -> Lifted:
    """Replace each site by a block that computes the same; ``gm`` is changed in place.

    Args:
        gm: A graph of aten ops.
        expert_size: Neurons per expert; where it does not divide ``d_ff``, the nearest divisor.
        router_width: Hidden width of the routers.

    Raises:
        NothingToConvertError: The graph holds no feed-forward network; says what came near.
    """
    found = find(gm)
    if not found.sites:
        near = "\n".join(f"  {line}" for line in table(found)) or "  nothing came near"
        raise NothingToConvertError(
            "no feed-forward network was found in the graph, so there is nothing to convert.\n"
            f"Nearest misses:\n{near}\n`skimp explain` shows the same for any model."
        )
    nodes = {n.name: n for n in gm.graph.nodes}
    blocks: dict[tuple[Any, ...], str] = {}
    for site, place in zip(found.sites, places(gm, found.sites), strict=True):
        key = (site.w_in, site.w_gate, site.w_out)  # layers that share weights share the block
        if key not in blocks:
            blocks[key] = _unused_name(gm, site.name)
            size = nearest_divisor(site.d_ff, expert_size)
            gm.add_submodule(blocks[key], _block(gm, site, size, router_width))
        _replace(gm, nodes[site.output_node], nodes[site.input_node], blocks[key], site, place)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()
    _drop_unused_parameters(gm)
    gm.graph.lint()
    gm.recompile()
    return Lifted(gm, found)


def blocks(gm: nn.Module) -> dict[str, DynkFFN]:
    """The blocks of a converted model by name, in order of execution."""
    return {name: m for name, m in gm.named_modules() if isinstance(m, DynkFFN)}


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
    return block.to(w_in.dtype).train(gm.training)


def _replace(
    gm: GraphModule, output: Node, x: Node, name: str, site: FFNSite, place: Place
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


def _drop_unused_parameters(gm: GraphModule) -> None:
    read = {str(n.target) for n in gm.graph.nodes if n.op == "get_attr"}
    inside = tuple(f"{name}." for name in blocks(gm))
    for name, _ in [*gm.named_parameters(), *gm.named_buffers()]:
        if name in read or name.startswith(inside):
            continue
        owner, _, leaf = name.rpartition(".")
        delattr(gm.get_submodule(owner), leaf)


__all__ = ["Lifted", "blocks", "lift"]
