"""Which parts of a U-Net may go together, and which plans there are.

The skip stack is run on symbols: every kept step must read as many channels as it would be given,

    push, stay   reads == C(h)                 pop   reads == C(h) + C(skip), at one resolution

and the stack must be empty at the end. Libraries do not check this: of the wrong removals some
raise at the first call and some run silently as another network.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.errors import PlanError
from ..ir.site import Miss
from .unet_graph import Stack, Step, UNet

PRESETS = ("bk-sdxl", "koala-1b", "koala-700m")


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes.

    Attributes:
        units: Names of steps.
        layers: Paths of transformer layers.
    """

    units: frozenset[str] = frozenset()
    layers: frozenset[str] = frozenset()

    def __or__(self, other: "Plan") -> "Plan":
        return Plan(self.units | other.units, self.layers | other.layers)

    def keeps(self, step: Step) -> bool:
        """Whether a step stays."""
        return step.name not in self.units

    def paths(self, unet: UNet) -> list[str]:
        """Every module that goes, in order of execution; none is inside another."""
        gone = [m for s in unet.steps if not self.keeps(s) for m in s.members]
        inside = [la for s in unet.stacks for la in s.layers if la in self.layers]
        return gone + [la for la in inside if not any(la.startswith(f"{m}.") for m in gone)]

    def kept(self, unet: UNet, stack: Stack) -> tuple[str, ...]:
        """The layers of a stack that stay; none where its step goes."""
        if any(s.holds(stack.name) for s in unet.steps if not self.keeps(s)):
            return ()
        return tuple(la for la in stack.layers if la not in self.layers)


def resolve(unet: UNet, names: Sequence[str]) -> Plan:
    """The plan that removes what is named: a module of a step, which goes whole, or a layer.

    Raises:
        PlanError: Nothing of a name can be removed.
    """
    layers = {la for s in unet.stacks for la in s.layers}
    steps = {m: s for s in unet.steps for m in s.members}
    plan = Plan()
    for name in names:
        if name in layers:
            plan |= Plan(layers=frozenset([name]))
        elif name in steps:
            plan |= Plan(frozenset([steps[name].name]))
        else:
            raise PlanError(
                f"{name} is neither a step nor a transformer layer of this U-Net; "
                "`skimp prune-unet MODEL --explain` lists both"
            )
    return plan


def check(unet: UNet, plan: Plan) -> Miss | None:
    """Why a plan is not legal; ``None`` if it is."""
    removed = [s for s in unet.steps if not plan.keeps(s)]
    for s in removed:
        if s.fixed is not None:
            return Miss(f"{s.name} cannot be removed: {s.fixed}", (s.output,))
    for stack in unet.stacks:
        if set(stack.layers) <= plan.layers:
            return Miss(f"{stack.name} would be left without a layer", stack.outputs)
    for owner, members in _containers(unet).items():
        if owner and members and all(any(s.holds(m) for s in removed) for m in members):
            return Miss(f"{owner} would be left empty", tuple(s.output for s in removed))
    return run_stack(unet, plan)[1]


def run_stack(unet: UNet, plan: Plan) -> tuple[dict[str, str], Miss | None]:
    """Run the skip stack on symbols.

    Returns:
        The step whose output each kept pop joins, by names; and what goes wrong first.
    """
    first = unet.steps[0]
    h, channels, size = "the input", first.reads, first.size
    stack: list[Step] = []
    pairs: dict[str, str] = {}
    for s in unet.steps:
        if not plan.keeps(s):
            continue
        if s.kind != "pop":
            if s.reads != channels:
                return pairs, Miss(
                    f"{s.name} reads {s.reads} channels, but C(h) = {channels}, from {h}; "
                    f"{s.reads} != {channels}",
                    (s.output,),
                )
        elif not stack:
            return pairs, Miss(f"{s.name} pops a skip, but the stack is empty", (s.output,))
        else:
            skip = stack.pop()
            pairs[s.name] = skip.name
            if skip.size_out != size:
                return pairs, Miss(
                    f"{s.name} works at {_by(size)}, but the skip it would pop, of {skip.name}, "
                    f"is {_by(skip.size_out)}",
                    (s.output,),
                )
            if s.reads != channels + skip.gives:
                return pairs, Miss(
                    f"{s.name} reads {s.reads} channels, but C(h) + C(skip) = {channels} + "
                    f"{skip.gives} = {channels + skip.gives}, from {h} and {skip.name}",
                    (s.output,),
                )
        h, channels, size = s.name, s.gives, s.size_out
        if s.kind == "push":
            stack.append(s)
    if stack:
        left = ", ".join(f"C({s.name}) = {s.gives}" for s in stack)
        return pairs, Miss(
            f"the skip stack does not end empty: {left} is pushed and never popped",
            tuple(s.output for s in stack),
        )
    return pairs, None


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _containers(unet: UNet) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for m in (m for s in unet.steps for m in s.members):
        owner, _, leaf = m.rpartition(".")
        if leaf.isdigit():
            found.setdefault(owner, []).append(m)
    return found


def pairs_of_stages(unet: UNet) -> list[list[Plan]]:
    """By resolution, every way to remove one step of the encoder and one of the decoder."""
    ups = {s[0].size: s for s in unet.stages("pop")}
    found = []
    for down in unet.stages("push"):
        up = ups.get(down[0].size, [])
        found.append([Plan(frozenset([d.name, u.name])) for d in down for u in up])
    return [f for f in found if f]


def one_per_stage(unet: UNet) -> Iterator[Plan]:
    """Every legal plan that removes one pair of every stage."""
    for combination in itertools.product(*pairs_of_stages(unet)):
        plan = Plan(frozenset().union(*(p.units for p in combination)))
        if check(unet, plan) is None:
            yield plan


def preset(unet: UNet, name: str) -> Plan:
    """A fixed plan of the paper, stated in terms of the structure.

    ``bk-sdxl`` keeps the first step of each encoder stage, and the first and the last of each
    decoder stage. ``koala-1b`` also keeps the first six tenths of the layers of each transformer
    at the lowest resolution, and ``koala-700m`` the first half and no middle (KOALA, 3.1.1).

    Raises:
        PlanError: There is no such preset, or it is not legal here.
    """
    if name not in PRESETS:
        raise PlanError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    gone = [s.name for stage in unet.stages("push") for s in stage[1:]]
    gone += [s.name for stage in unet.stages("pop") for s in stage[1:-1]]
    plan = Plan(frozenset(gone))
    if name != "bk-sdxl":
        share = 0.6 if name == "koala-1b" else 0.5
        lowest = [s for s in unet.stacks if s.size == min(x.size for x in unet.stacks)]
        cut = [la for s in lowest for la in s.layers[max(1, round(share * len(s.layers))) :]]
        plan |= Plan(layers=frozenset(cut))
    if name == "koala-700m":
        middle = [s.name for s in unet.steps if s.kind == "stay" and s.fixed is None]
        plan |= Plan(frozenset(middle))
    return legal(unet, plan)


def legal(unet: UNet, plan: Plan) -> Plan:
    """The plan itself.

    Raises:
        PlanError: It is not legal; says which equation does not hold.
    """
    if (miss := check(unet, plan)) is not None:
        raise PlanError(f"this removal is not legal: {miss.reason}")
    return plan


def choices(unet: UNet) -> list[Plan]:
    """The smallest removals: a pair of one stage, the middle, a transformer layer.

    And one layer of every transformer of a resolution: where a configuration ties the depths of
    some to each other, no single layer may go.
    """
    found = [Plan(layers=frozenset([la])) for s in unet.stacks for la in s.layers]
    for size in {s.size for s in unet.stacks}:
        alike = [s.layers for s in unet.stacks if s.size == size]
        found += [Plan(layers=frozenset(row)) for row in zip(*alike, strict=False)]
    found += [p for stage in pairs_of_stages(unet) for p in stage]
    found += [Plan(frozenset([s.name])) for s in unet.steps if s.kind == "stay" and s.fixed is None]
    return [p for p in found if len(p.layers) or check(unet, p) is None]


def search(
    unet: UNet,
    cost: dict[str, float],
    keep: float,
    scores: dict[str, float],
    *,
    forbidden: Any = None,
) -> Plan:
    """Remove what matters least for what it costs, until no more than a share of the cost is left.

    Args:
        unet: What was found.
        cost: Of every module by path, ``""`` the whole: parameters, FLOPs, or seconds.
        keep: Share of the cost that may stay.
        scores: What is lost with each step or layer, by name; what has none costs nothing.
        forbidden: Asked of each plan on the way; it may refuse it, as what a file cannot say.

    Raises:
        PlanError: Even with all that may go removed, more would be left.
    """

    def spent(plan: Plan) -> float:
        return sum(cost.get(p, 0.0) for p in plan.paths(unet))

    plan, rest = Plan(), choices(unet)
    while cost[""] - spent(plan) > keep * cost[""]:
        ranked = []
        for choice in rest:
            more = plan | choice
            if (gain := spent(more) - spent(plan)) > 0:
                new = (choice.units - plan.units) | (choice.layers - plan.layers)
                lost = sum(max(0.0, scores.get(n, 0.0)) for n in new)
                ranked.append((lost / gain, sorted(new), more))
        allowed = (
            more
            for _, _, more in sorted(ranked, key=lambda r: r[:2])
            if check(unet, more) is None and not (forbidden and forbidden(more))
        )
        if (best := next(allowed, None)) is None:
            left = 1 - spent(plan) / cost[""]
            raise PlanError(f"no more can go: {left:.1%} is left, {keep:.1%} was asked for")
        plan = best
    return plan
