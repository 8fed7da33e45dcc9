"""Prune a diffusion U-Net in depth: KOALA (arXiv 2312.04005), section 3.1.

    step -> (h unchanged, its skip neither pushed nor popped)     layer -> (its input)

The plan is found and carried out on the exported graph, carried out a second time on the module
tree, and the two are compared node by node. Widths stay as they are.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..ir.errors import PlanError
from .base import Context, Pass, PassResult
from .lift import drop_unused_parameters
from .unet_graph import UNet, discover, export_unet
from .unet_plan import Plan, check, legal, preset, resolve, search
from .unet_rank import rank
from .unet_student import (
    Provenance,
    config_of,
    copy_as_meta,
    make_student,
    prune_in_place,
    same_graph,
    sweep,
)


@dataclass(frozen=True)
class PruneUNet(Pass):
    """Remove steps and transformer layers from an exported U-Net.

    Attributes:
        preset: ``bk-sdxl``, ``koala-1b`` or ``koala-700m``.
        remove: Names of steps and layers that go beside it.
        keep_params: Share of the parameters that may stay; what goes is searched for.
        keep_flops: The same for FLOPs.
        by: How a search ranks: ``output``, ``cosine`` or ``attention``.
    """

    name: ClassVar[str] = "prune-unet"
    preset: str = ""
    remove: tuple[str, ...] = ()
    keep_params: float | None = None
    keep_flops: float | None = None
    by: str = "output"

    def plan(
        self, gm: GraphModule, unet: UNet, data: Sequence[Mapping[str, Any]], forbidden: Any = None
    ) -> Plan:
        """What goes, checked.

        Args:
            gm: The exported graph.
            unet: What was found in it.
            data: Batches of various timesteps; a search ranks on them.
            forbidden: Plans to leave out of a search, for reasons of the caller's.

        Raises:
            PlanError: The options leave nothing to do, or ask for what is not legal.
        """
        plan = resolve(unet, self.remove)
        if self.preset:
            plan |= preset(unet, self.preset)
        for keep, costs in ((self.keep_params, parameters(gm)), (self.keep_flops, unet.flops)):
            if keep is None:
                continue
            if not data:
                raise PlanError("a search ranks on data: give batches of several timesteps")
            scores = rank(gm, unet, data, self.by)
            found = search(unet, dict(costs), keep, scores, forbidden=forbidden)
            plan |= found
        if not plan.units and not plan.layers:
            raise PlanError("nothing to remove: give a preset, names, or a share to keep")
        return legal(unet, plan)

    def run(self, gm: GraphModule, context: Context) -> PassResult:
        """Prune ``gm``; a search ranks on the context's training batches."""
        unet = discover(gm)
        plan = self.plan(gm, unet, context.train)
        before = parameters(gm)[""]
        cut(gm, unet, plan)
        left = discover(gm)
        return PassResult(
            gm,
            True,
            {
                "removed": plan.paths(unet),
                "parameters": [before, parameters(gm)[""]],
                "flops": [unet.flops[""], left.flops[""]],
            },
        )


def cut(gm: GraphModule, unet: UNet, plan: Plan) -> None:
    """Carry a legal plan out on a graph, in place."""
    node: dict[str, Node] = {n.name: n for n in gm.graph.nodes}
    h = node[unet.steps[0].input]
    skips: list[Node] = []
    for s in unet.steps:
        out = node[s.output]
        if not plan.keeps(s):
            out.replace_all_uses_with(h)
            continue
        if s.kind == "pop":
            join = node[str(s.join)]
            operands = [h, skips.pop()]
            join.args = (operands if s.first else operands[::-1], *join.args[1:])
        h = out
        if s.kind == "push":
            skips.append(out)
    for stack in unet.stacks:
        for layer, before, after in zip(stack.layers, stack.inputs, stack.outputs, strict=True):
            if layer in plan.layers:
                entry = node[before]
                while entry.name in stack.outputs and _layer(stack, entry) in plan.layers:
                    entry = node[stack.inputs[stack.outputs.index(entry.name)]]
                node[after].replace_all_uses_with(entry)
    sweep(gm)
    gm.delete_all_unused_submodules()
    drop_unused_parameters(gm)
    gm.graph.lint()
    gm.recompile()


def _layer(stack: Any, node: Node) -> str:
    return str(stack.layers[stack.outputs.index(node.name)])


def parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by module path, ``""`` the whole."""
    found: dict[str, int] = {"": 0}
    for name, p in model.named_parameters():
        parts = name.split(".")
        for i in range(len(parts)):
            path = ".".join(parts[:i])
            found[path] = found.get(path, 0) + p.numel()
    return found


@dataclass(frozen=True, slots=True)
class Pruned:
    """A student.

    Attributes:
        student: The module tree, with copies of the teacher's weights.
        graph: The teacher's exported graph.
        unet: What was found in it.
        plan: What went.
        names: Student to teacher.
        report: JSON-serialisable: parameters and FLOPs before and after, and what went.
    """

    student: nn.Module
    graph: GraphModule
    unet: UNet
    plan: Plan
    names: Provenance
    report: dict[str, Any]


def prune(
    model: nn.Module,
    example: Mapping[str, Any],
    how: PruneUNet,
    *,
    data: Sequence[Mapping[str, Any]] = (),
    captured: tuple[GraphModule, UNet] | None = None,
    verified: bool = True,
) -> Pruned:
    """Make a student of a U-Net, and check that it is what was planned.

    Args:
        model: Any U-Net that pops the skips that it pushed; on the meta device too. It stays.
        example: Keyword arguments of one call, see :func:`example_of`.
        how: What goes.
        data: Batches of various timesteps and of the example's shapes, to rank on.
        captured: The model's graph and what was found in it, if that is at hand.
        verified: Capture the student again and compare it, node by node, with the cut graph.

    Raises:
        PlanError: The plan is not legal, or no configuration says it.
        VerificationError: The student is not what was planned.
    """
    gm, unet = captured or _captured(model, example)
    plan = how.plan(gm, unet, data, lambda p: unsayable(model, unet, p))
    student, names = make_student(model, unet, plan)
    if verified:
        verify_student(student, example, (gm, unet), plan, names)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (model, student)]
    gone = sum(unet.flops.get(p, 0) for p in plan.paths(unet))
    report = {
        "pass": str(how),
        "removed": plan.paths(unet),
        "parameters": dict(teacher=sizes[0], student=sizes[1], left=sizes[1] / sizes[0]),
        "flops": dict(
            teacher=unet.flops[""],
            student=unet.flops[""] - gone,
            left=1 - gone / unet.flops[""],
        ),
        "joins": len(unet.joins) - sum(s.name in plan.units for s in unet.joins),
        "attentions": [
            len(unet.taps),
            sum(names.student(t.name) is not None for t in unet.taps),
        ],
    }
    return Pruned(student, gm, unet, plan, names, report)


def _captured(model: nn.Module, example: Mapping[str, Any]) -> tuple[GraphModule, UNet]:
    gm = export_unet(model, example)
    return gm, discover(gm)


def unsayable(model: nn.Module, unet: UNet, plan: Plan) -> str | None:
    """Why no configuration of a model's class says what a plan leaves."""
    if not config_of(model):
        return None
    try:
        prune_in_place(copy_as_meta(model), unet, plan)
    except PlanError as error:
        return str(error)
    return None


def verify_student(
    student: nn.Module,
    example: Mapping[str, Any],
    captured: tuple[GraphModule, UNet],
    plan: Plan,
    names: Provenance,
) -> None:
    """Capture a student and compare it with the teacher's graph, cut.

    Raises:
        PlanError: The plan is not legal.
        VerificationError: The student runs, but as another network.
    """
    gm, unet = captured
    if (miss := check(unet, plan)) is not None:
        raise PlanError(f"this removal is not legal: {miss.reason}")
    want = copy.deepcopy(gm)
    cut(want, unet, plan)
    same_graph(export_unet(student, example), want, names)


def example_of(
    model: Any, *, batch: int = 2, size: int | None = None, length: int = 77
) -> dict[str, Any]:
    """Random arguments for a diffusers U-Net, by its configuration, on its device.

    Args:
        model: A U-Net with a configuration.
        batch: Samples; each gets a timestep of its own.
        size: Height and width of the latent; by default the configuration's.
        length: Text tokens.
    """
    config = dict(model.config)
    p = next(model.parameters())
    side = size or config["sample_size"]
    width = config["cross_attention_dim"]
    width = width if isinstance(width, int) else width[0]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device=p.device, dtype=p.dtype)

    found: dict[str, Any] = {
        "sample": noise(batch, config["in_channels"], side, side),
        "timestep": torch.linspace(1, 999, batch, device=p.device).round(),
        "encoder_hidden_states": noise(batch, length, width),
        "return_dict": False,
    }
    if config.get("addition_embed_type") == "text_time":
        found["added_cond_kwargs"] = {
            "text_embeds": noise(batch, pooled_width(config)),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]] * batch, device=p.device),
        }
    return found


def pooled_width(config: Mapping[str, Any]) -> int:
    """Of the pooled text that a U-Net reads beside six sizes, as SDXL does; 0 if it reads none."""
    both = config.get("projection_class_embeddings_input_dim")
    return 0 if both is None else int(both) - 6 * int(config["addition_time_embed_dim"])


__all__ = [
    "PruneUNet",
    "Pruned",
    "cut",
    "example_of",
    "pooled_width",
    "prune",
    "verify_student",
]
