"""The main job on the embedded encoder: convert it, compile it, show what that bought."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ..codegen.exported import tied_texts
from ..ir.block import DynkFFN
from ..ir.measure import agree, compare
from ..ir.text import BlockLine
from ..passes.base import Context, Each, Progress, first_tensor, silent, watch
from ..passes.budget import set_tau, taus_at
from ..passes.convert import Converted, convert, recipe
from ..passes.data import Batch, batches, count_tokens, embedded_text, hold_out
from ..passes.lift import blocks
from ..passes.quality import evaluate, whole_model_flops
from ..passes.ranks import is_first
from .breakdown import breakdown
from .models import DEFAULT, Loaded, load_pretrained
from .ort import missing, onnx_session

SHAPES = ((1, 16), (1, 64), (8, 64), (32, 64))


def demo(
    folder: Path,
    *,
    model: str = DEFAULT,
    budget: str = "flops <= 0.55",
    thorough: bool = False,
    progress: Progress = silent,
    passages: int | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
) -> dict[str, Any]:
    """Convert an encoder on the text that Python carries, and measure it on text held out.

    Args:
        folder: Where finished stages and the converted model are stored.
        model: See :func:`load_pretrained`.
        budget: See :func:`convert`.
        thorough: Train some six times as long.
        progress: Told how far a stage has come.
        passages: Use only so many passages.
        shapes: (batch, length) to time.

    Returns:
        Everything that the report shows, JSON-serialisable.
    """
    from .. import __version__

    start = time.monotonic()
    loaded = load_pretrained(model)
    text = embedded_text()[:passages]
    train, test = hold_out(text, min(800, len(text) // 4))
    tests = batches(loaded.tokenizer, test, batch_tokens=8192)
    converted, context = convert_text_model(
        loaded,
        train,
        folder / "model",
        stages=folder / ("thorough" if thorough else "stages"),
        budget=budget,
        thorough=thorough,
        progress=progress,
    )
    quality = evaluate(converted.model, context, tests)
    progress("measure", 1, 4, "quality against cost")
    curve = quality_curve(converted.model, context, tests)
    progress("measure", 2, 4, "latency")
    latency = time_encoder(loaded.model, converted.model, loaded.tokenizer, test, shapes)
    progress("measure", 3, 4, "what is left")
    profile = profile_encoder(converted.model, loaded.tokenizer, test, shapes)
    progress("measure", 4, 4)
    return {
        "skimp": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "model": model,
        "budget": budget,
        "thorough": thorough,
        "text": {
            "train_tokens": count_tokens(context.train),
            "test_passages": len(test),
            "test_tokens": count_tokens(tests),
        },
        "quality": asdict(quality),
        "flops": whole_model_flops(converted.teacher, converted.model, tests[0], quality.experts),
        "curve": curve,
        "layers": layers(converted.model, tests),
        "latency": latency,
        "onnx_missing": missing(),
        "profile": profile,
        "blocks": [str(BlockLine.of(n, b)) for n, b in blocks(converted.model).items()],
        "history": converted.history,
        "seconds": round(time.monotonic() - start, 1),
    }


def convert_text_model(
    loaded: Loaded,
    text: Sequence[str],
    out: Path,
    *,
    stages: Path,
    budget: str,
    thorough: bool = False,
    projections: bool = False,
    progress: Progress = silent,
    each: Each = map,
    offload: Path | None = None,
) -> tuple[Converted, Context]:
    """Convert a model on passages, some of which choose the thresholds, and save it.

    Args:
        loaded: The model and its tokenizer.
        text: Passages.
        out: Folder for the converted model.
        stages: Folder for finished stages.
        budget: See :func:`convert`.
        thorough: Train some six times as long.
        projections: See :func:`convert`.
        progress: Told how far a stage has come.
        each: See :func:`convert`.
        offload: See :func:`convert`.

    Returns:
        The conversion, and what it worked with.
    """
    from .store import save

    train, chosen = hold_out(text, min(400, max(1, len(text) // 8)))
    data = batches(loaded.tokenizer, train)
    held = batches(loaded.tokenizer, chosen, batch_tokens=8192)
    converted = convert(
        loaded.model,
        data,
        held_out=held,
        budget=budget,
        passes=recipe(budget, thorough=thorough, projections=projections),
        projections=projections,
        folder=stages,
        progress=progress,
        each=each,
        offload=offload,
    )
    if is_first():
        save(converted.model, out, data[0])
    return converted, Context(converted.teacher, data, held)


def quality_curve(
    gm: GraphModule,
    context: Context,
    data: Sequence[Batch],
    shares: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0),
) -> list[dict[str, float]]:
    """Quality at several shares of active experts; tau is put back afterwards."""
    before = {n: float(b.tau) for n, b in blocks(gm).items()}
    points = []
    for share, taus in zip(shares, taus_at(gm, context, shares), strict=True):
        set_tau(gm, taus)
        q = evaluate(gm, context, data)
        points.append(dict(share=share, flops=q.flops, cosine=q.cosine, overlap=q.overlap))
    set_tau(gm, before)
    return points


def layers(gm: GraphModule, data: Sequence[Batch]) -> list[dict[str, Any]]:
    """Sparsity of each block, and the distribution of k over tokens."""
    seen: dict[str, list[tuple[Tensor, float]]] = {n: [] for n in blocks(gm)}

    def look(name: str, block: DynkFFN, x: Tensor) -> None:
        k = block.selected(x).sum(-1)
        seen[name].append((k, float((block.hidden(x) == 0).float().mean())))

    for _ in watch(gm, data[:4], look):
        pass
    result = []
    for name, block in blocks(gm).items():
        k = torch.cat([k for k, _ in seen[name]]).float()
        counts = torch.histc(k, bins=24, min=0, max=block.experts)
        result.append(
            {
                "name": name,
                "zeros": sum(z for _, z in seen[name]) / len(seen[name]),
                "tau": float(block.tau),
                "dense": block.dense,
                "experts": block.experts,
                "k_mean": float(k.mean()),
                "k_std": float(k.std()),
                "k_histogram": (counts / counts.sum()).tolist(),
            }
        )
    return result


def time_encoder(
    dense: nn.Module,
    converted: GraphModule,
    tokenizer: Any,
    text: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    *,
    seconds: float = 3.0,
) -> list[dict[str, Any]]:
    """Time the converted model against the dense one, at each shape.

    The rivals are eager, ``torch.compile``, and ONNX Runtime if it is installed. It has a
    comparison of its own: its threads spin after a call, which needs rests (see ``compare``).
    """
    torch._dynamo.reset()
    baseline = torch.compile(dense, dynamic=True)
    fast = torch.compile(converted, backend="skimp", dynamic=True)
    session = None if missing() else onnx_session(dense, exactly(tokenizer, text, 2, 16))
    rows = []
    for batch, length in shapes:
        inputs = exactly(tokenizer, text, batch, length)
        calls = {
            "eager": lambda inputs=inputs: dense(**inputs),
            "torch.compile": lambda inputs=inputs: baseline(**inputs),
            "skimp": lambda inputs=inputs: fast(**inputs),
        }
        with torch.no_grad():
            want, tied = first_tensor(converted(**inputs)), tied_texts(converted, inputs)
            agree(first_tensor(fast(**inputs)), want, "compiled", 1e-3, tied)
        row: dict[str, Any] = {"batch": batch, "length": length}
        row |= compare(calls, "skimp", seconds=seconds).as_dict()
        if session is not None:
            with torch.no_grad():
                want = first_tensor(dense(**inputs))
                agree(torch.from_numpy(session(inputs)[0]), want, "ONNX Runtime", 1e-3)
            name = "ONNX Runtime"
            pair = {name: lambda inputs=inputs: session(inputs), "skimp": calls["skimp"]}
            found = compare(pair, "skimp", seconds=seconds / 2, least=3, rest=0.2, warm=3).as_dict()
            row["timings"][name] = found["timings"][name]
            row["speedup"][name] = found["speedup"][name]
        rows.append(row)
    return rows


def profile_encoder(
    converted: GraphModule,
    tokenizer: Any,
    text: Sequence[str],
    shapes: Sequence[tuple[int, int]],
) -> list[dict[str, Any]]:
    """Where the compiled model's time goes, at the smallest and the largest shape."""
    torch._dynamo.reset()
    options: dict[str, Any] = {"cpp.enable_kernel_profile": True}
    fast = torch.compile(converted, backend="skimp", dynamic=True, options=options)
    rows = []
    for batch, length in dict.fromkeys((shapes[0], shapes[-1])):
        inputs = exactly(tokenizer, text, batch, length)
        with torch.no_grad():
            fast(**inputs)
        kinds = breakdown(partial(fast, **inputs))
        rows.append({"batch": batch, "length": length, "seconds": kinds})
    return rows


def exactly(tokenizer: Any, text: Sequence[str], batch: int, length: int) -> Batch:
    """A batch of real text with exactly this shape and no padding."""
    ids = [i for passage in text for i in tokenizer(passage, add_special_tokens=False)["input_ids"]]
    tokens = torch.tensor((ids * (1 + batch * length // len(ids)))[: batch * length])
    tokens = tokens.view(batch, length)
    filled = {"input_ids": tokens, "token_type_ids": torch.zeros_like(tokens)}
    return {n: filled.get(n, torch.ones_like(tokens)) for n in tokenizer.model_input_names}
