"""The main job: a dense model in, one that runs only the experts each token needs out."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..ir.artefact import alone
from ..ir.errors import BadWeightsError, CalibrationError
from .base import (
    Context,
    Each,
    Loss,
    Pass,
    Progress,
    call,
    kl_divergence,
    next_tokens,
    not_finite,
    pooled,
    reads_logits,
    silent,
)
from .budget import Budget, parse_target
from .choose import Choose
from .data import LABELS, Batch, on_device
from .find import Found
from .finetune import Finetune
from .gate_route import GateRoute
from .lift import blocks, lift, search
from .offload import Offload
from .pipeline import run, spec
from .project import Project, too_narrow
from .ranks import joined
from .recover import Recover
from .route import Route, Split
from .sparsify import Relufy, Sparsify
from .trace import trace


@dataclass(frozen=True, slots=True)
class Converted:
    """What a conversion gives.

    Attributes:
        model: The converted model; call it like the original.
        teacher: The original as a graph with blocks that stay dense.
        found: Sites and near misses.
        history: One record per pass.
    """

    model: GraphModule
    teacher: GraphModule
    found: Found
    history: list[dict[str, Any]]


def recipe(
    budget: str = "flops <= 0.55",
    *,
    thorough: bool = False,
    task: bool = False,
    projections: bool = False,
    relufy: bool = True,
    gates: bool = False,
) -> list[Pass]:
    """The passes of a conversion, in order.

    Args:
        budget: A target of :class:`Budget`.
        thorough: Train some six times as long.
        task: The user gives a loss, which the model is fine-tuned on as it becomes sparse.
        projections: Convert attention projections too.
        relufy: Replace GELU and SiLU by ReLU; else they stay, and Sparsify pushes what they are
            applied to below -10 (the paper's variant for GELU, worse than ReLU there).
        gates: Of a model whose networks are all gated, as most decoders': let the gates be the
            routers. Activations stay, two thirds of a network can be skipped, and it needs the
            least training.
    """
    kind, value = parse_target(budget)
    if gates:
        return _by_gates(budget, (1.5 * value - 0.5) if kind == "flops" else 0.6, thorough)
    share = value - 0.04 if kind == "flops" else 0.5
    return [
        *([Project(tokens=450_000 if thorough else 90_000)] if projections else []),
        *([Relufy()] if relufy else []),
        Sparsify(tokens=450_000 if thorough else 90_000, clamp=None if relufy else -10.0),
        *([Finetune(steps=2000 if thorough else 300)] if task else []),
        Split(),
        Route(steps=1500 if thorough else 800),
        # Bounded in time too: on a slow machine it does less, not longer.
        Recover(
            share=max(0.05, share),
            steps=4000 if thorough else 600,
            seconds=1900 if thorough else 390,
        ),
        Budget(target=budget),
        Choose(),
    ]


def _by_gates(budget: str, share: float, thorough: bool) -> list[Pass]:
    return [
        GateRoute(),
        Recover(
            share=max(0.05, share),
            steps=4000 if thorough else 600,
            lr=1e-4,
            seconds=1900 if thorough else 390,
        ),
        Budget(target=budget),
        Choose(rows=(1, 16, 256)),
    ]


def convert(
    model: nn.Module,
    data: Sequence[Batch],
    *,
    budget: str = "flops <= 0.55",
    passes: Sequence[Pass] | None = None,
    held_out: Sequence[Batch] | None = None,
    output: Callable[[Any, Batch], Tensor] | None = None,
    loss: Loss | None = None,
    expert_size: int = 8,
    router_width: int = 64,
    projections: bool = False,
    folder: str | Path | None = None,
    progress: Progress = silent,
    seed: int = 0,
    each: Each = map,
    offload: str | Path | None = None,
) -> Converted:
    """Convert a model: without labels, or as it is fine-tuned on a task.

    Without ``loss`` the model learns to give its own outputs again. A classifier keeps more of
    its accuracy if it learns from its task meanwhile, as in D2DMoE, section 3.1::

        data = [dict(input_ids=ids, attention_mask=mask, labels=labels), ...]
        convert(model, data, loss=lambda out, batch: cross_entropy(out.logits, batch["labels"]))

    In processes that torchrun started, all of which call this with the same, Finetune and Recover
    divide weights and batches among them by FSDP2, and the first does and stores everything else.

    Args:
        model: Any module that :func:`torch.export.export` takes; it stays as it is. Training runs
            where its parameters are, on a GPU in bfloat16.
        data: Batches of keyword arguments, as :func:`skimp.batches` makes them.
        budget: ``flops <= x`` (of what is converted), ``cosine >= x`` or, of a language model,
            ``kl <= x`` (nats per token), held on ``held_out``.
        passes: Instead of the :func:`recipe` of the budget.
        held_out: Batches that thresholds are chosen on; by default every tenth of ``data``.
        output: From a model's output and the batch to what its user reads, ``[rows, m]``, compared
            by cosine. By default, of a model that gives logits per token, the next tokens'
            distributions, compared by their divergence (no labels); of any other, the mean over
            real tokens of the first output.
        loss: From a model's output and the batch to a 0-d tensor to be made small, with a
            gradient. It adds a pass :class:`Finetune` to the recipe, and itself to what
            :class:`Recover` learns from. The entry ``labels`` of a batch is for the loss alone:
            the model is not called with it. Evaluation mode: there is no dropout.
        expert_size: Neurons per expert.
        router_width: Hidden width of the routers; those of projections are sized by them.
        projections: Convert attention projections too, in the recipe by :class:`Project`.
        folder: Where finished stages are stored. Start again with the same arguments after an
            interruption, and it goes on from the last of them; with ``each`` or ``offload``, from
            the last layer that a pass had done. Losses are told apart by name only: after changing
            what one does, choose another folder.
        progress: Told how far a stage has come.
        seed: Of every random choice.
        each: Where the passes that treat blocks apart do so; by default here, one after another.
            :func:`skimp.runtime.cluster.on_ray` gives one for a cluster, of the same result.
        offload: A folder on a disk for what else would be in memory: each copy of the model, of
            the rows that passes learn from, and of what optimisers know. The result has the same
            bits, and lies there too; the files have no names and vanish with the process.

    Raises:
        NothingToConvertError: No feed-forward network was found, or no attention projection
            where these are asked for; says what came near.
        BadWeightsError: The model holds NaN or infinity.
        CalibrationError: Too little data.
        UnwritableError: A folder cannot be written, or its disk is full.
        TraceError: The model cannot be captured as one graph.
        ClusterError: Another of several processes has ended.
    """
    with joined() as ranks:
        check_weights(model)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        place = Offload(offload)
        train, held = (on_device(part, device) for part in _divide(data, held_out))
        teacher, found = prepare(
            model,
            train[0],
            expert_size=expert_size,
            router_width=router_width,
            projections=projections,
            seed=seed,
            offload=place,
        )
        context = Context(
            teacher, train, held, output or pooled, progress if ranks.first else silent, seed,
            loss=loss, each=partial(place.each, each), offload=place, ranks=ranks,
        )  # fmt: skip
        if output is None:
            with torch.no_grad():
                if reads_logits(call(teacher, train[0])):
                    context.output, context.distance = next_tokens, kl_divergence
        usual = recipe(budget, task=loss is not None, projections=projections)
        steps = usual if passes is None else list(passes)
        options = f"{expert_size},{router_width},{seed}" + (f",{_named(loss)}" if loss else "")
        identity = fingerprint(teacher, [*train, *held], options)
        ranks.agree(identity)
        student = place.copy(teacher)
        for block in blocks(teacher).values():
            block.dense = True
        stages = Path(folder) if folder and ranks.first else None
        with nullcontext() if stages is None else alone(stages, "converting into"):
            by_layer = offload is not None or each is not map  # where a layer takes long
            gm, history = run(
                steps, student, context, folder=stages, identity=identity, by_layer=by_layer
            )
        gm.meta["skimp.pipeline"] = spec(steps)
        return Converted(gm, teacher, found, history)


def prepare(
    model: nn.Module,
    example: Mapping[str, Any],
    *,
    expert_size: int = 8,
    router_width: int = 64,
    projections: bool = False,
    seed: int = 0,
    offload: Offload | None = None,
) -> tuple[GraphModule, Found]:
    """Trace a model and lift its networks, its projections if asked to: the same function."""
    was_training = model.training
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # the routers' first weights
        try:
            lifted = lift(
                trace(copy.copy(model).eval(), traceable(example)),
                expert_size=expert_size,
                router_width=router_width,
                projections=projections,
                offload=offload,
            )
        finally:
            model.train(was_training)
    lifted.gm.requires_grad_(False)
    # Parameters are shared with the user's model until here; training must not reach them.
    return (offload or Offload()).copy(lifted.gm), lifted.found


def explain(model: nn.Module, example: Mapping[str, Any]) -> Found:
    """What would be converted, what nearly would, and why not; nothing is changed.

    Args:
        model: Any module, in evaluation mode.
        example: Keyword arguments of one call.
    """
    found = search(trace(model, traceable(example)))
    narrow = tuple(miss for s in found.projections if (miss := too_narrow(s)) is not None)
    wide = tuple(s for s in found.projections if too_narrow(s) is None)
    return replace(found, projections=wide, projection_misses=(*found.projection_misses, *narrow))


def check_weights(model: nn.Module) -> None:
    """Refuse a model with values that are not finite.

    Raises:
        BadWeightsError: Names the first parameters concerned.
    """
    if bad := not_finite(model):
        raise BadWeightsError(
            f"{len(bad)} parameters hold NaN or infinity, first {', '.join(bad[:3])}; "
            "repair the checkpoint before converting it"
        )


def fingerprint(gm: GraphModule, data: Sequence[Batch], options: str) -> str:
    """A digest of a model, the data and options; a stored stage of another is never resumed."""
    digest = hashlib.sha256(options.encode())
    for name, tensor in sorted(gm.state_dict().items()):
        if ".router." not in name:
            digest.update(name.encode())
            digest.update(bytes_of(tensor))
    for batch in data:
        for name, value in batch.items():
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(bytes_of(value))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """What a tensor holds, in the order of its elements, for a digest."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _divide(
    data: Sequence[Batch], held_out: Sequence[Batch] | None
) -> tuple[Sequence[Batch], Sequence[Batch]]:
    if held_out is not None:
        return data, held_out
    if len(data) < 2:
        raise CalibrationError(
            f"{len(data)} batches of calibration data cannot be divided into some to train on and "
            "some to choose thresholds on; give more text, or pass held_out="
        )
    every = min(10, len(data))
    return [b for i, b in enumerate(data) if i % every], list(data[::every])


def _named(loss: Loss) -> str:
    return f"{getattr(loss, '__module__', '')}.{getattr(loss, '__qualname__', type(loss))}"


def traceable(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is traced with, at least two rows: one would be taken for a constant."""
    example = {name: value for name, value in batch.items() if name != LABELS}
    tensors = [v for v in example.values() if isinstance(v, Tensor) and v.dim()]
    if not tensors or any(len(t) != 1 for t in tensors):
        return example
    return {
        k: v.repeat_interleave(2, 0) if isinstance(v, Tensor) and v.dim() else v
        for k, v in example.items()
    }
