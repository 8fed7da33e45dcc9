"""The two tasks of the ablation: data with labels, and a dense model that does the task.

SST-2: sentences of film reviews, positive or negative, from SKIMP_DATA/sst2; the embedded MiniLM
with the mean over tokens and a linear layer on top. Digits: scikit-learn's 8 x 8 images; a vision
transformer of three layers, trained from scratch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from skimp.passes.base import call, first_tensor
from skimp.passes.data import batches, data_file
from skimp.runtime.models import load_pretrained
from torch import nn
from torch.nn import functional as F


def loss(outputs, batch):
    """Of logits, against the labels."""
    return F.cross_entropy(first_tensor(outputs), batch["labels"])


def accuracy(outputs, batch):
    """How many of a batch are right."""
    return int((first_tensor(outputs).argmax(-1) == batch["labels"]).sum())


@dataclass(frozen=True)
class Data:
    """Batches: to train on, to choose thresholds on, and to measure on."""

    train: list[dict[str, Any]]
    held: list[dict[str, Any]]
    test: list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A task and how much training each stage of its conversions gets.

    Attributes:
        data: From a seed to batches; the seed only orders them.
        model: The dense model before it learnt the task.
        epochs, lr: Of the dense model's training.
        distil: Rows per layer of Project and Sparsify.
        steps: Of Finetune and Recover.
        recover_share: Of experts that run in Recover.
        projected_share: The same where projections are experts too.
        shares: Of experts that run, where accuracy is measured.
        alpha, tune_alpha: Weight of the Hoyer term in Sparsify and in Finetune.
    """

    name: str
    title: str
    data: Callable[[int], Data]
    model: Callable[[], nn.Module]
    epochs: int
    lr: float
    expert_size: int
    router_width: int
    distil: int
    finetune: int
    recover: int
    route: int
    recover_share: float
    projected_share: float
    shares: tuple[float, ...] = (0.08, 0.16, 0.25, 0.35, 0.5, 0.7, 1.0)
    alpha: float = 0.05
    tune_alpha: float = 0.1


class Classifier(nn.Module):
    """An encoder, the mean over real tokens, and a linear layer."""

    def __init__(self, encoder, classes=2):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Logits, ``[batch, classes]``."""
        states = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids
        ).last_hidden_state
        mask = attention_mask[..., None].to(states.dtype)
        return self.head((states * mask).sum(1) / mask.sum(1))


def sst2(seed):
    tokenizer = load_pretrained().tokenizer

    def read(name, size, order):
        lines = data_file("sst2", f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        rows = [line.rpartition("\t") for line in lines if "\t" in line]
        text, labels = [r[0] for r in rows], [int(r[2]) for r in rows]
        return batches(tokenizer, text, max_length=64, batch_tokens=size, seed=order, labels=labels)

    return Data(read("train", 1024, seed), read("dev", 4096, 0), read("test", 4096, 0))


def minilm():
    return Classifier(load_pretrained().model)


def digits(seed):
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(found.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    train, held, test = (slice(0, 950), slice(950, 1078), slice(1078, None))

    def cut(x, y, size):
        pairs = zip(x.split(size), y.split(size), strict=True)
        return [dict(pixel_values=a, labels=b) for a, b in pairs]

    # each image also one pixel to every side
    moves = [(0, 0), (0, 1), (0, -1), (1, 0), (-1, 0)]
    padded = F.pad(images[train], (1, 1, 1, 1), value=-1.0)
    moved = torch.cat([padded[:, :, 1 + i : 9 + i, 1 + j : 9 + j] for i, j in moves])
    again = labels[train].repeat(len(moves))
    order = torch.randperm(len(moved), generator=torch.Generator().manual_seed(seed))
    return Data(
        cut(moved[order], again[order], 95),
        cut(images[held], labels[held], 128),
        cut(images[test], labels[test], 256),
    )


def small_vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=2, num_channels=1, num_labels=10, hidden_size=128,
            num_hidden_layers=3, num_attention_heads=4, intermediate_size=512,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def fit(model, data, epochs, lr, say):
    """Train a dense model on the task."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    steps = epochs * len(data)
    model.train()
    for step in range(steps):
        batch = data[step % len(data)]
        rate = min(1.0, (step + 1) / (0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        value = loss(call(model, batch), batch)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        say("dense", step + 1, steps, f"loss {value.item():.3f}")
    return model.eval()


TASKS = {
    "digits": Task(
        "digits", "scikit-learn digits, a vision transformer of three layers", digits, small_vit,
        epochs=16, lr=1e-3, expert_size=4, router_width=16, distil=80_000, finetune=250,
        recover=250, route=800, recover_share=0.3, projected_share=0.3, alpha=0.1, tune_alpha=0.3,
    ),
    "sst2": Task(
        "sst2", "SST-2, MiniLM of six layers", sst2, minilm,
        epochs=2, lr=1e-4, expert_size=8, router_width=64, distil=40_000, finetune=100,
        recover=130, route=400, recover_share=0.3, projected_share=0.4, alpha=0.6, tune_alpha=1.5,
    ),
}  # fmt: skip
