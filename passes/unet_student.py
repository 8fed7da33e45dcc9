"""Turn a plan into a student, on the module tree, and prove that it is the one that was planned.

    containers[i] removed      the rest are numbered anew, as a smaller model numbers them
    the middle removed         None where a configuration says so, else a module that hands h on

Provenance says which teacher module each student module was; weights, taps and optimiser state
follow it. The proof: the student, captured again, is the teacher's graph as the pass cut it, node
by node and parameter by parameter.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..ir.errors import PlanError, VerificationError
from .unet_graph import UNet
from .unet_plan import Plan
from .unet_scopes import shape

_MIDDLE = ("mid_block", "mid_block_type")  # as diffusers names them in a module and its config


class Bypass(nn.Module):
    """In the place of a removed module that the code calls by name: hands its input on."""

    def forward(self, h: Tensor, *_: Any, **__: Any) -> Tensor:
        """``h``, as it is."""
        return h


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a student's modules come from.

    Attributes:
        gone: Teacher paths without a student.
        moved: Teacher path of every container member that is numbered anew, to the student's.
    """

    gone: tuple[str, ...]
    moved: Mapping[str, str]

    def student(self, path: str) -> str | None:
        """What a teacher's module, or parameter, is called in the student; ``None`` if gone."""
        if any(path == g or path.startswith(f"{g}.") for g in self.gone):
            return None
        parts = path.split(".")
        for i in range(len(parts), 0, -1):
            prefix = ".".join(parts[:i])
            if prefix in self.moved:
                head, _, _ = prefix.rpartition(".")
                new = self.moved[prefix].rpartition(".")[2]
                owner = self.student(head) if head else ""
                return ".".join(filter(None, [owner, new, *parts[i:]]))
        return path

    def teachers(self, names: list[str]) -> dict[str, str]:
        """Student names to teacher names, of all teacher names that have one."""
        return {s: n for n in names if (s := self.student(n)) is not None}


def provenance(model: nn.Module, unet: UNet, plan: Plan) -> Provenance:
    """What a plan does to names."""
    gone = plan.paths(unet)
    moved: dict[str, str] = {}
    for owner in dict.fromkeys(g.rpartition(".")[0] for g in gone if _numbered(g)):
        kept = [n for n in model.get_submodule(owner)._modules if f"{owner}.{n}" not in gone]
        moved |= {f"{owner}.{n}": f"{owner}.{i}" for i, n in enumerate(kept) if n != str(i)}
    return Provenance(tuple(gone), moved)


def _numbered(path: str) -> bool:
    return path.rpartition(".")[2].isdigit()


def prune_in_place(model: nn.Module, unet: UNet, plan: Plan) -> Provenance:
    """Remove modules from a model and keep its configuration true.

    Raises:
        PlanError: No configuration says what is left.
    """
    found = provenance(model, unet, plan)
    containers: dict[nn.Module, None] = {}
    for path in found.gone:
        owner, _, leaf = path.rpartition(".")
        parent = model.get_submodule(owner)
        if _numbered(path):
            del parent._modules[leaf]
            containers[parent] = None
        elif path == _MIDDLE[0] and _MIDDLE[1] in config_of(model):
            setattr(parent, leaf, None)
        else:
            setattr(parent, leaf, Bypass())
    for container in containers:
        kept = list(container._modules.values())
        container._modules.clear()
        for i, module in enumerate(kept):
            container.add_module(str(i), module)
    if config := config_of(model):
        changes = _config(model, config)
        if (defaults := config.get("_use_default_values")) is not None:  # from_config drops these
            changes["_use_default_values"] = [n for n in defaults if n not in changes]
        model.register_to_config(**changes)  # type: ignore[operator]
        for stack in unet.stacks:
            _set_depth(model, found.student(stack.name), len(stack.layers))
        _check_config(model)
    return found


def config_of(model: nn.Module) -> dict[str, Any]:
    """A diffusers configuration that can rebuild a U-Net; empty where there is none."""
    config = getattr(model, "config", None)
    if hasattr(model, "register_to_config") and config is not None and _MIDDLE[1] in config:
        return dict(config)
    return {}


def _config(model: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The options that tell how many of what a model has, counted on its modules."""

    def depths(block: Any, else_: Any) -> Any:
        found = [len(a.transformer_blocks) for a in getattr(block, "attentions", [])]
        return else_ if not found else found[0] if len(set(found)) == 1 else found

    stages = len(model.down_blocks)
    given = config["transformer_layers_per_block"]
    old = [given] * stages if isinstance(given, int) else list(given)
    reverse = config["reverse_transformer_layers_per_block"] or old[::-1]
    resnets = [len(b.resnets) for b in model.down_blocks]
    down = [depths(b, o) for b, o in zip(model.down_blocks, old, strict=True)]
    up = [depths(b, o) for b, o in zip(model.up_blocks, reverse, strict=True)]
    middle = model.mid_block
    if middle is not None and not hasattr(model.down_blocks[-1], "attentions"):
        down[-1] = depths(middle, down[-1])  # the middle reads its depth from the last stage
    if not isinstance(up[0], list) and not hasattr(model.up_blocks[0], "attentions"):
        up[0] = down[-1] if not isinstance(down[-1], list) else up[0]
    mirrored = up == down[::-1] and not any(isinstance(d, list) for d in down)
    return {
        "layers_per_block": resnets[0] if len(set(resnets)) == 1 else resnets,
        "transformer_layers_per_block": down,
        "reverse_transformer_layers_per_block": None if mirrored else up,
        "mid_block_type": None if middle is None else config["mid_block_type"],
    }


def _set_depth(model: nn.Module, container: str | None, before: int) -> None:
    """A transformer of diffusers counts its layers in a configuration of its own."""
    if container is None:
        return
    owner: Any = model.get_submodule(container.rpartition(".")[0])
    layers: Any = model.get_submodule(container)
    config = getattr(owner, "config", None)
    if config is not None and dict(config).get("num_layers") == before:
        owner.register_to_config(num_layers=len(layers))


def rebuilt(model: Any, device: torch.device | str = "meta") -> nn.Module:
    """A new model from a model's configuration."""
    with torch.device(device):
        made: nn.Module = type(model).from_config(dict(model.config))
    return made


def _check_config(model: nn.Module) -> None:
    want = {n: t.shape for n, t in model.state_dict().items()}
    try:
        got = {n: t.shape for n, t in rebuilt(model).state_dict().items()}
    except (ValueError, TypeError, IndexError) as error:
        raise PlanError(
            f"no configuration of {type(model).__name__} says this plan: {error}"
        ) from (error)
    if got != want:
        extra = sorted(got.keys() ^ want.keys()) or [n for n in got if got[n] != want[n]]
        raise PlanError(
            f"no configuration of {type(model).__name__} says this plan: rebuilt from it, the "
            f"model differs in {extra[0]} and {len(extra) - 1} more. Each encoder stage must keep "
            "one step fewer than its decoder stage, and the middle as many layers as the first "
            "transformer of the last encoder stage."
        )


def make_student(model: nn.Module, unet: UNet, plan: Plan) -> tuple[nn.Module, Provenance]:
    """A student with copies of its teacher's weights; the teacher stays as it is.

    Where a configuration says the plan, nothing of what goes is ever copied.

    Raises:
        PlanError: No configuration of the model's class says what is left.
    """
    skeleton = copy_as_meta(model)
    found = prune_in_place(skeleton, unet, plan)
    names = found.teachers(list(model.state_dict()))
    weights = model.state_dict()
    copies = {s: weights[t].detach().clone() for s, t in names.items()}
    missing = skeleton.state_dict().keys() - copies.keys()
    if missing:
        raise VerificationError(f"no teacher tensor is known for {sorted(missing)[:3]}")
    skeleton.load_state_dict(copies, assign=True)
    for name, buffer in model.named_buffers():  # those that no state dict holds
        new = found.student(name)
        if new is not None and new not in copies:
            owner, _, leaf = new.rpartition(".")
            skeleton.get_submodule(owner).register_buffer(leaf, buffer.clone(), persistent=False)
    return skeleton.train(model.training), found


def copy_as_meta(model: nn.Module) -> nn.Module:
    """A copy of a module tree whose tensors take no memory."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty: Tensor = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


def same_graph(got: GraphModule, want: GraphModule, names: Provenance) -> None:
    """Check that a student's graph is the teacher's cut one, node by node.

    Args:
        got: The student, captured again.
        want: The teacher's graph with the plan carried out.
        names: The student's.

    Raises:
        VerificationError: They differ; names the first node that does, and where it is.
    """
    sweep(got)
    a, b = ([n for n in g.graph.nodes if n.op != "get_attr"] for g in (got, want))
    number = {n: i for nodes in (a, b) for i, n in enumerate(nodes)}
    for x, y in zip(a, b, strict=False):
        if _line(got, x, number, None) != _line(want, y, number, names):
            raise VerificationError(_difference(x, y, names))
    if len(a) != len(b):
        raise VerificationError(f"the student runs {len(a)} operations where {len(b)} were planned")
    read = {str(n.target) for n in got.graph.nodes if n.op == "get_attr"}
    if unread := [n for n, _ in got.named_parameters() if n not in read]:
        raise VerificationError(f"{len(unread)} parameters are never read, first {unread[0]}")


def sweep(gm: GraphModule) -> None:
    """Remove what nothing reads; a dropout that does nothing, which torch would keep, too."""
    gm.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output"))


def _line(
    gm: GraphModule, node: Node, number: Mapping[Node, int], names: Provenance | None
) -> tuple[str, ...]:
    """What a node does to what: nodes by number, parameters by their names in the student."""

    def plain(value: Any) -> Any:
        return torch.fx.node.map_arg(
            value, lambda n: _renamed(gm, n, names) if n.op == "get_attr" else ("node", number[n])
        )

    target = "" if node.op in ("placeholder", "output") else str(node.target)
    return node.op, target, str(plain(node.args)), str(plain(dict(node.kwargs)))


def _renamed(gm: GraphModule, node: Node, names: Provenance | None) -> Any:
    """A parameter's name in the student; a constant's value."""
    target = str(node.target)
    if target in dict(gm.named_parameters(remove_duplicate=False)):
        return target if names is None else names.student(target)
    owner, _, leaf = target.rpartition(".")
    value = getattr(gm.get_submodule(owner), leaf)
    return "meta" if value.device.type == "meta" else value.tolist()


def _difference(got: Node, want: Node, names: Provenance) -> str:
    def scope(node: Node) -> str:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return str(stack[-1][0]) if stack else ""

    def reads(node: Node) -> str:
        def channels(n: Node) -> str:
            value = shape(n)
            return f"C({scope(n) or n.name}) = {value[1] if len(value) > 1 else value}"

        found = [channels(n) for n in node.all_input_nodes if n.op != "get_attr"]
        return " + ".join(found) or node.name

    where = scope(want)
    return (
        f"the student does not do what was planned: at {names.student(where) or where}, it runs "
        f"{got.target} on {reads(got)}; the plan runs {want.target} on {reads(want)}. It was "
        "edited by hand, or its code pairs skips in another way; let prune-unet make it."
    )
