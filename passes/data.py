"""Calibration text that every Python installation carries, and batches made from it."""

import ast
import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import CalibrationError

Batch = dict[str, Tensor]
"""Keyword arguments of one forward call; a mask of real tokens is named ``attention_mask``."""

LABELS = "labels"
"""The entry of a batch that a loss reads and the model is not given."""


@functools.cache
def embedded_text(min_chars: int = 40, max_chars: int = 1000) -> tuple[str, ...]:
    """English passages from the standard library: language reference and docstrings.

    The label-free default: about 14,000 distinct paragraphs in every CPython, no download.

    Args:
        min_chars: Shorter paragraphs are left out.
        max_chars: Longer paragraphs are left out.

    Returns:
        Distinct paragraphs in an order that depends on nothing but their text.
    """
    documents = [str(text) for text in topics.values()]
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # template files of lib2to3 and friends are not meant to parse
        documents += [
            doc
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and (doc := ast.get_docstring(node))
        ]
    paragraphs = {" ".join(p.split()) for text in documents for p in text.split("\n\n")}
    kept = [p for p in paragraphs if min_chars <= len(p) <= max_chars]
    return tuple(sorted(kept, key=lambda p: hashlib.sha256(p.encode()).digest()))


def data_file(*parts: str) -> Path:
    """A file of the data folder: ``$SKIMP_DATA``, by default ``shared/data`` beside the repository.

    Raises:
        CalibrationError: It is not there.
    """
    root = os.environ.get("SKIMP_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    path = Path(root, *parts)
    if not path.is_file():
        name = "/".join(parts)
        raise CalibrationError(f"{path} is missing; set SKIMP_DATA to a folder that holds {name}")
    return path


def hold_out(passages: Sequence[str], count: int) -> tuple[list[str], list[str]]:
    """Split into (training, held-out) passages; ``count`` are held out.

    Raises:
        CalibrationError: Fewer than two passages, or none left to train on.
    """
    if len(passages) < 2 or count >= len(passages):
        raise CalibrationError(
            f"{len(passages)} calibration passages cannot spare {count} to be held out; "
            "give more text, or lower the number held out"
        )
    return list(passages[count:]), list(passages[:count])


def batches(
    tokenizer: Any,
    passages: Sequence[str],
    *,
    max_length: int = 128,
    batch_tokens: int = 2048,
    seed: int | None = 0,
    labels: Sequence[int] | None = None,
) -> list[Batch]:
    """Tokenise and group passages of like length, so that little is padding.

    Args:
        tokenizer: A Hugging Face tokenizer.
        passages: Text.
        max_length: Longer passages are cut, in tokens.
        batch_tokens: Upper bound of rows times columns of a batch.
        seed: Shuffles the order of batches; ``None`` keeps passages in the order given.
        labels: One per passage, for the loss of a classifier: the entry ``labels``.

    Raises:
        CalibrationError: No passage, or not one label for each.
    """
    if not passages:
        raise CalibrationError("the calibration set is empty; give at least a few hundred passages")
    encoded = tokenizer(list(passages), truncation=True, max_length=max_length)
    if labels is not None:
        if len(labels) != len(passages):
            raise CalibrationError(f"{len(labels)} labels do not fit {len(passages)} passages")
        encoded[LABELS] = list(labels)
    lengths = [len(ids) for ids in encoded["input_ids"]]
    order = list(range(len(passages)))
    if seed is not None:
        order.sort(key=lengths.__getitem__)
    groups: list[list[int]] = []
    widest = 0
    for i in order:
        widest = max(widest, lengths[i])
        if groups and widest * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
            widest = lengths[i]
    if seed is not None:
        shuffle = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
        groups = [groups[i] for i in shuffle.tolist()]
    return [
        dict(
            tokenizer.pad(
                {name: [column[i] for i in group] for name, column in encoded.items()},
                return_tensors="pt",
            )
        )
        for group in groups
    ]


def real_tokens(batch: Batch) -> Tensor | None:
    """Bool ``[batch, length]``, true where a token is not padding; ``None`` without a mask."""
    mask = batch.get("attention_mask")
    return None if mask is None else mask.bool()


def on_device(data: Sequence[Batch], device: torch.device) -> list[Batch]:
    """The same batches, their tensors on a device."""
    return [
        {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}
        for batch in data
    ]


def count_tokens(data: Iterable[Batch]) -> int:
    """Number of tokens that are not padding."""
    total = 0
    for batch in data:
        mask = real_tokens(batch)
        some = next(v for n, v in batch.items() if n != LABELS)
        total += int(mask.sum()) if mask is not None else some.numel()
    return total
