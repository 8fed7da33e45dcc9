"""Train a U-Net, alone or as a student: accelerate's loop without a Trainer.

Each step's data and noise depend on its number alone, so a run that goes on from a checkpoint is
the run that was never interrupted, bit for bit on one device. A checkpoint is one safetensors
file: weights, their moving average, the optimiser's state, and what they belong to.
"""

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ir.artefact import written_whole
from ..ir.cost import write_atomically
from ..ir.errors import MALFORMED, ArtefactError, CalibrationError
from ..passes.base import Progress, silent
from ..passes.unet_distill import Distiller, DistillUNet, unwrap
from .unet import Pictures, on

_STATE = "state.safetensors"


@dataclass(frozen=True, slots=True)
class Training:
    """How long and how.

    Attributes:
        steps: Optimiser steps.
        batch: Samples per device and forward pass.
        accumulate: Forward passes per step.
        lr: Of AdamW, constant after ``warmup`` steps; the paper's is 1e-5.
        warmup: Steps.
        decay: Weight decay.
        clip: Largest norm of the gradient.
        ema: Of the moving average that is saved; 0 saves the weights themselves.
        precision: ``no``, ``bf16`` or ``fp16``.
        checkpointing: Compute activations again in the backward pass.
        every: Steps between checkpoints.
        seed: Of data and noise.
    """

    steps: int = 1000
    batch: int = 8
    accumulate: int = 1
    lr: float = 1e-5
    warmup: int = 0
    decay: float = 1e-2
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "no"
    checkpointing: bool = False
    every: int = 200
    seed: int = 0


@torch.no_grad()
def average(mean: Mapping[str, Tensor], model: nn.Module, step: int, decay: float) -> None:
    """Move an average of weights on; it warms up, so that it forgets how it began."""
    weight = 1 - min(decay, (1 + step) / (10 + step))
    now = dict(model.named_parameters())
    torch._foreach_lerp_(list(mean.values()), [now[n].detach() for n in mean], weight)


def train(
    student: Any,
    teacher: nn.Module | None,
    data: Pictures,
    training: Training,
    out: Path,
    *,
    how: DistillUNet | None = None,
    pairs: Mapping[str, str] | None = None,
    compiled: str | None = None,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train, and save the result in diffusers' own form.

    Args:
        student: A U-Net of diffusers; trained in place.
        teacher: What it learns from; ``None`` trains on the task alone.
        data: To learn from.
        training: How long and how.
        out: Folder of the result; ``out/checkpoint`` while it runs. Called again with the same
            arguments, it goes on from there.
        how: The weights of the terms.
        pairs: Student module to teacher module, see :meth:`DistillUNet.pairs`.
        compiled: Backend of ``torch.compile`` for the student.
        progress: Told how far it is.

    Returns:
        Steps, seconds, and the mean of each loss over every tenth part of the run.

    Raises:
        CalibrationError: A loss is not finite, or there is no data.
        ArtefactError: The checkpoint is of another run.
    """
    from accelerate import Accelerator

    if not len(data.latents):
        raise CalibrationError("there are no pictures to train on")
    how = how or DistillUNet(output=0.0, features=0.0, taps="none")
    identity = _identity(student, data, training, how, pairs or {})
    accelerator = Accelerator(
        mixed_precision=training.precision, gradient_accumulation_steps=training.accumulate
    )
    if training.checkpointing:
        student.enable_gradient_checkpointing()
    student.train()
    mean = {n: p.detach().clone() for n, p in student.named_parameters()} if training.ema else {}
    optimizer = torch.optim.AdamW(student.parameters(), training.lr, weight_decay=training.decay)
    start, history = _resume(out, identity, student, mean, optimizer)
    if teacher is not None:
        teacher.to(accelerator.device)
    distiller = Distiller.make(student, teacher, how, pairs or {})
    model, optimizer = accelerator.prepare(student, optimizer)
    mean = {n: t.to(accelerator.device) for n, t in mean.items()}
    distiller.student = model
    if compiled:
        distiller.student = cast(nn.Module, torch.compile(model, backend=compiled))
    begun = time.monotonic()
    try:
        for step in range(start, training.steps):
            for group in optimizer.param_groups:
                group["lr"] = training.lr * min(1.0, (step + 1) / max(1, training.warmup))
            sums: dict[str, float] = {}
            for part in range(training.accumulate):
                number = (step * training.accumulate + part) * accelerator.num_processes
                number += accelerator.process_index
                call, noise = data.batch(number, training.batch, training.seed)
                with accelerator.accumulate(model), accelerator.autocast():
                    found = distiller.losses(
                        on(call, accelerator.device), noise.to(accelerator.device)
                    )
                    accelerator.backward(found["total"])
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), training.clip)
                    optimizer.step()
                    optimizer.zero_grad()
                for name, value in found.items():
                    sums[name] = sums.get(name, 0.0) + float(value.detach()) / training.accumulate
            if not sums["total"] < float("inf"):
                raise CalibrationError(
                    f"the loss of step {step} is {sums['total']}; lower the learning rate"
                )
            average(mean, unwrap(model), step, training.ema)
            history.append(sums)
            progress("train", step + 1, training.steps, f"loss {sums['total']:.4f}")
            last = step + 1 == training.steps
            if accelerator.is_main_process and (last or (step + 1) % training.every == 0):
                _checkpoint(out, identity, step + 1, unwrap(model), mean, optimizer, history)
    finally:
        distiller.close()
    final: Any = unwrap(model)
    if mean:
        final.load_state_dict(mean, strict=False)
    if accelerator.is_main_process:
        with written_whole(out / "unet") as new:
            final.eval().save_pretrained(new)
    accelerator.free_memory()
    return {
        "steps": training.steps,
        "seconds": round(time.monotonic() - begun, 1),
        "losses": _tenths(history),
        "training": asdict(training),
        "loss": str(how),
    }


def _tenths(history: list[dict[str, float]]) -> dict[str, list[float]]:
    size = max(1, -(-len(history) // 10))
    parts = [history[i : i + size] for i in range(0, len(history), size)]
    names = history[0] if history else {}
    return {n: [round(sum(h[n] for h in p) / len(p), 6) for p in parts] for n in names}


def _identity(
    model: nn.Module, data: Pictures, training: Training, how: DistillUNet, pairs: Mapping[str, str]
) -> str:
    options = {k: v for k, v in asdict(training).items() if k not in ("steps", "every")}
    shapes = {n: list(p.shape) for n, p in model.named_parameters()}
    told = [options, str(how), dict(pairs), shapes, data.captions]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _checkpoint(
    out: Path,
    identity: str,
    step: int,
    model: nn.Module,
    mean: Mapping[str, Tensor],
    optimizer: Any,
    history: list[dict[str, float]],
) -> None:
    from safetensors.torch import save

    tensors = {f"weight/{n}": p.detach() for n, p in model.named_parameters()}
    tensors |= {f"mean/{n}": t for n, t in mean.items()}
    inner = getattr(optimizer, "optimizer", optimizer)
    for n, p in model.named_parameters():
        for key, value in inner.state[p].items():
            tensors[f"adam/{key}/{n}"] = value
    tensors = {n: t.cpu().contiguous() for n, t in tensors.items()}
    about = {"identity": identity, "step": str(step), "history": json.dumps(history)}
    write_atomically(out / "checkpoint" / _STATE, save(tensors, about))


def _resume(
    out: Path, identity: str, model: nn.Module, mean: Mapping[str, Tensor], optimizer: Any
) -> tuple[int, list[dict[str, float]]]:
    """Go on from a checkpoint, if there is one."""
    from safetensors import SafetensorError, safe_open

    path = out / "checkpoint" / _STATE
    if not path.exists():
        return 0, []
    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            about = file.metadata()
            if about["identity"] != identity:
                raise ArtefactError(
                    f"{path} is of another run: model, data, options or losses differ. Give "
                    "another --out, or remove it."
                )
            names = set(file.keys())
            for n, p in model.named_parameters():
                p.copy_(file.get_tensor(f"weight/{n}"))
                keys = [k for k in ("step", "exp_avg", "exp_avg_sq") if f"adam/{k}/{n}" in names]
                optimizer.state[p] = {
                    k: file.get_tensor(f"adam/{k}/{n}").to("cpu" if k == "step" else p.device)
                    for k in keys
                }
            for n, t in mean.items():
                t.copy_(file.get_tensor(f"mean/{n}"))
            return int(about["step"]), json.loads(about["history"])
    except (SafetensorError, *MALFORMED) as error:
        raise ArtefactError(f"{path} is damaged ({error}); remove it to begin again") from error
