"""Divide a model among processes while it is trained, layer by layer, by FSDP2.

A graph has no modules for its layers, on which FSDP puts its hooks, so it runs in parts: each is a
module that calls some nodes, and the weights that only these read are whole while it does.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import distributed as dist
from torch import nn
from torch.fx import GraphModule

from ..ir.errors import CalibrationError
from .lift import blocks
from .offload import Offload
from .parts import Parts
from .ranks import Ranks


@contextmanager
def sharded(
    ranks: Ranks, gm: GraphModule, parameters: Sequence[nn.Parameter], offload: Offload
) -> Iterator[tuple[list[nn.Parameter], Parts | None]]:
    """Divide parameters among the processes for a while; afterwards all have them whole.

    If what is done meanwhile fails, they stay divided.

    Args:
        ranks: The processes.
        gm: A graph with blocks, of which each network ends a part.
        parameters: Of the graph. What reads them should not keep them, or they stay in memory.
        offload: Where they lie afterwards.

    Yields:
        What has taken their places, and what runs the graph; of one process, they themselves
        and ``None``.

    Raises:
        CalibrationError: One of them is a single number, which cannot be divided.
    """
    if ranks.size == 1:
        yield list(parameters), None
        return
    from torch.distributed.fsdp import FSDPModule

    places = _places(gm, parameters)
    del parameters
    networks = {n for n, b in blocks(gm).items() if not b.linear} or set(blocks(gm))
    parts = Parts(gm, networks)
    # FSDP marks what it divides, for torch.compile and for state_dict, and has no way back
    marked = [
        (m, {n: copy.copy(v) for n, v in vars(m).items() if "hooks" in n}) for m in gm.modules()
    ]
    _shard(gm, parts, places)
    yield [getattr(*owners[0]) for owners in places], parts
    for part in (parts, *parts.parts):
        assert isinstance(part, FSDPModule)
        part.reshard()
    for owners in places:
        whole = nn.Parameter(offload.move(getattr(*owners[0]).full_tensor()), False)
        for owner, name in owners:
            setattr(owner, name, whole)
    for module, hooks in marked:
        vars(module).update(hooks)
        for flag in ("_is_fsdp_managed_module", "_fsdp_use_orig_params"):
            vars(module).pop(flag, None)


_Places = list[list[tuple[nn.Module, str]]]


def _places(gm: GraphModule, parameters: Sequence[nn.Parameter]) -> _Places:
    """The modules that hold each parameter, and its name there."""
    found: dict[int, list[tuple[nn.Module, str]]] = {id(p): [] for p in parameters}
    for module in gm.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) not in found:
                continue
            if not p.dim():
                raise CalibrationError(
                    f"parameter {name} is a single number, which processes cannot divide among "
                    "them; convert in one process, with --offload if memory is short"
                )
            found[id(p)].append((module, name))
    return [found[id(p)] for p in parameters]


def _shard(gm: GraphModule, parts: Parts, places: _Places) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    wanted = {id(getattr(*owners[0])): owners for owners in places}
    readers: dict[int, set[int]] = {key: set() for key in wanted}
    for at, part in enumerate(parts.parts):
        for key in (id(p) for n in part.nodes for p in _read(gm, n)):
            if key in readers:
                readers[key].add(at)
    mesh = init_device_mesh(next(gm.parameters()).device.type, (dist.get_world_size(),))
    modules: list[tuple[int, nn.Module]] = [*enumerate(parts.parts), (-1, parts)]
    for at, module in modules:
        # the whole holds what no part has alone
        own = [k for k, r in readers.items() if (r == {at} if at >= 0 else len(r) != 1)]
        held = {id(owner): owner for key in own for owner, _ in wanted[key]}
        module.owners = nn.ModuleList(held.values())
        learning = {getattr(*wanted[key][0]) for key in own}
        fully_shard(module, mesh=mesh, ignored_params=set(gm.parameters()) - learning)


def _read(gm: GraphModule, node: Any) -> list[nn.Parameter]:
    if node.op == "call_module":
        return list(gm.get_submodule(node.target).parameters())
    if node.op != "get_attr":
        return []
    owner, _, name = node.target.rpartition(".")
    value = getattr(gm.get_submodule(owner), name)
    return [value] if isinstance(value, nn.Parameter) else []
