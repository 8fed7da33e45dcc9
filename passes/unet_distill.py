"""What a pruned U-Net learns from: the task, its teacher's output, and its self-attentions.

    L = w_task |eps_S - eps|^2 + w_output |eps_S - eps_T|^2 + w_features sum_taps |f_S - f_T|^2

Every term is a mean of squares; the taps' are summed, as in BK-SDM's code (KOALA's equation 1
prints the sum inside the norm). Taps follow from the plan, not from names: each self-attention
of the student with the teacher's at the same place of the same stack, counted from the bottom;
and the last features of every stage without attention.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ir.errors import PlanError
from .base import first_tensor
from .unet_graph import UNet
from .unet_plan import Plan
from .unet_student import Provenance

FEATURES = ("attention", "last", "none")
ALIGNED = ("bottom", "up", "kept")


@dataclass(frozen=True)
class DistillUNet:
    """What a student is trained for.

    Attributes:
        task: Weight of the error to the noise.
        output: Weight of the error to the teacher's output.
        features: Weight of the errors of the features.
        taps: ``attention``: self-attentions, and the last features of stages without;
            ``last``: the last features of every stage; ``none``.
        aligned: Which of a stack's teacher layers a student's are compared with: from the
            ``bottom``, from the top (``up``), or those that they were (``kept``).
    """

    name: ClassVar[str] = "distill-unet"
    task: float = 1.0
    output: float = 1.0
    features: float = 1.0
    taps: str = "attention"
    aligned: str = "bottom"

    def __post_init__(self) -> None:
        for value, known in ((self.taps, FEATURES), (self.aligned, ALIGNED)):
            if value not in known:
                raise PlanError(f"{value!r} is none of {', '.join(known)}")

    def pairs(self, unet: UNet, plan: Plan, names: Provenance) -> dict[str, str]:
        """Student module to teacher module, of every tap, in order of execution."""
        found: dict[str, str] = {}
        if self.taps == "attention":
            found |= attention_pairs(unet, plan, names, self.aligned)
        if self.taps != "none":
            found |= last_pairs(unet, plan, names, bare=self.taps == "attention")
        return found


def attention_pairs(unet: UNet, plan: Plan, names: Provenance, aligned: str) -> dict[str, str]:
    """Self-attentions of the student, with the teacher's of the same stack."""
    found: dict[str, str] = {}
    for stack in unet.stacks:
        kept = plan.kept(unet, stack)
        first = {"bottom": 0, "up": len(stack.layers) - len(kept)}.get(aligned)
        for i, layer in enumerate(kept):
            theirs = layer if first is None else stack.layers[first + i]
            for tap in (t.name.removeprefix(layer) for t in unet.taps if t.layer == layer):
                found[f"{names.student(layer)}{tap}"] = f"{theirs}{tap}"
    return found


def last_pairs(unet: UNet, plan: Plan, names: Provenance, *, bare: bool) -> dict[str, str]:
    """The last features of each stage.

    Args:
        unet: What was found.
        plan: What went.
        names: Student to teacher.
        bare: Only of stages without self-attention.
    """
    stages = [*unet.stages("push"), *unet.stages("stay"), *unet.stages("pop")]
    found: dict[str, str] = {}
    for stage in stages:
        kept = [s for s in stage if plan.keeps(s)]
        attends = any(s.holds(t.name) for s in stage for t in unet.taps)
        if kept and not (bare and attends):
            mine = names.student(kept[-1].members[-1])
            found[str(mine)] = stage[-1].members[-1]
    return found


class Taps:
    """Outputs of named modules, caught as they pass.

    Works through what wraps a model: compiled, checkpointed, data parallel. Under checkpointing a
    module runs again in the backward pass; only what passes between :meth:`open` and :meth:`take`
    is caught, and of that the first. For a compiled model, make these before its first call.
    """

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        root = unwrap(model)
        self.caught: dict[str, Tensor] = {}
        self.listening = False
        self.handles = [
            root.get_submodule(n).register_forward_hook(self._hook(n)) for n in dict.fromkeys(names)
        ]

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def catch(_: nn.Module, __: Any, output: Any) -> None:
            if self.listening and name not in self.caught:
                self.caught[name] = first_tensor(output)

        return catch

    def open(self) -> None:
        """Catch from now on."""
        self.caught.clear()
        self.listening = True

    def take(self) -> dict[str, Tensor]:
        """What was caught; nothing of it is kept here."""
        self.listening = False
        found = dict(self.caught)
        self.caught.clear()
        return found

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.caught.clear()

    def __enter__(self) -> "Taps":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of what compiles it or runs it data parallel."""
    for name in ("_orig_mod", "module"):
        if isinstance(inner := getattr(model, name, None), nn.Module):
            return unwrap(inner)
    return model


@dataclass(slots=True)
class Distiller:
    """A student, its teacher, and the taps on both; close it when done.

    Attributes:
        student: What learns.
        teacher: Frozen; ``None`` trains on the task alone.
        how: The weights.
        pairs: Student module to teacher module.
    """

    student: nn.Module
    teacher: nn.Module | None
    how: DistillUNet
    pairs: Mapping[str, str]
    mine: Taps
    theirs: Taps | None

    @classmethod
    def make(
        cls,
        student: nn.Module,
        teacher: nn.Module | None,
        how: DistillUNet,
        pairs: Mapping[str, str],
    ) -> "Distiller":
        """Put the taps on; the teacher is frozen and set to evaluation mode."""
        if teacher is not None:
            teacher.requires_grad_(False).eval()
        used = pairs if teacher is not None and how.features else {}
        theirs = None if teacher is None else Taps(teacher, list(used.values()))
        return cls(student, teacher, how, used, Taps(student, list(used)), theirs)

    def losses(self, call: Mapping[str, Any], noise: Tensor) -> dict[str, Tensor]:
        """The terms, not yet weighted, and their weighted sum, ``total``; each 0-d, float32.

        Args:
            call: Keyword arguments of both models.
            noise: What the task wants predicted, of the output's shape.
        """
        self.mine.open()
        got = first_tensor(self.student(**call)).float()
        features = self.mine.take()
        found = {"task": F.mse_loss(got, noise.float())}
        total = self.how.task * found["task"]
        if self.teacher is not None and self.theirs is not None:
            self.theirs.open()
            with torch.no_grad():
                want = first_tensor(self.teacher(**call)).float()
            others = self.theirs.take()
            found["output"] = F.mse_loss(got, want)
            total = total + self.how.output * found["output"]
            if self.pairs:
                found["features"] = feature_loss(features, others, self.pairs)
                total = total + self.how.features * found["features"]
        return found | {"total": total}

    def close(self) -> None:
        """Take all taps off."""
        self.mine.close()
        if self.theirs is not None:
            self.theirs.close()


def feature_loss(
    mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor], pairs: Mapping[str, str]
) -> Tensor:
    """Sum over taps of the mean squared error, 0-d, float32.

    Raises:
        PlanError: Two features differ in shape; only depth may have been pruned.
    """
    terms = []
    for s, t in pairs.items():
        if mine[s].shape != theirs[t].shape:
            raise PlanError(
                f"{s} gives {tuple(mine[s].shape)}, the teacher's {t} {tuple(theirs[t].shape)}: "
                "features are compared as they are, so teacher and student need the same widths"
            )
        terms.append(F.mse_loss(mine[s].float(), theirs[t].detach().float()))
    return torch.stack(terms).sum()
