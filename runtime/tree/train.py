"""Training a head on text that the model writes itself: no labels, no other model.

First the model continues prompts, many rows at a time on the generated step, and its hidden states
are kept. Then the head learns, from each of them and the token that follows, the next hidden state
and the law that the model draws the next token from. Half of the states that it reads are its own
guesses, because it has no others when it drafts the second token and on.
"""

import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional as F

from ...ir.cost import write_atomically
from ...ir.errors import CalibrationError
from ...passes.base import Progress, silent
from .fused import FusedTarget
from .head import Head, HeadSizes

_STATE = "training.safetensors"
_LOG = "training.json"
_SAVED = 60.0
"""Seconds of work that an interruption may cost."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a head is trained; a folder trained by one recipe goes on with no other.

    Attributes:
        minutes: In all.
        writing: Share of them that the model writes for.
        words: Tokens that the head may draft: those that the model uses most.
        d_ff: Neurons; 0 for as many as the model's networks have.
        rows: Texts written at a time.
        longest: Tokens of a prompt that are used: of a longer one, the middle is left out.
        new: Most tokens written after one.
        temperature: Of writing.
        window: Tokens of a training example.
        batch: Examples of a step.
        lr: Highest learning rate.
        own: Share of states that are the head's own guesses.
        steps: Most steps; 0 for as many as the time allows.
        seed: Of everything.
    """

    minutes: float = 40.0
    writing: float = 0.35
    words: int = 8192
    d_ff: int = 0
    rows: int = 24
    longest: int = 256
    new: int = 256
    temperature: float = 0.6
    window: int = 256
    batch: int = 8
    lr: float = 1e-3
    own: float = 0.5
    steps: int = 0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Written:
    """Texts one after another.

    Attributes:
        tokens: ``[n]`` int32.
        features: The model's last hidden states, ``[n, d]`` bfloat16.
        own: ``[n]`` bool: tokens that the model wrote, not its prompts.
        first: ``[n]`` bool: first tokens of texts.
    """

    tokens: Tensor
    features: Tensor
    own: Tensor
    first: Tensor

    @classmethod
    def read(cls, files: Sequence[Path]) -> "Written":
        """Join what :func:`write` wrote."""
        parts = [load_file(f) for f in files]
        return cls(*(torch.cat([p[n] for p in parts]) for n in cls.__slots__))


def train(
    target: FusedTarget,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    recipe: Recipe = Recipe(),
    *,
    stop: frozenset[int] = frozenset(),
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train a head into a folder; called again after an interruption, it goes on.

    Args:
        target: The model.
        prompts: Tokens of at least two; what the texts are about is what the head will be good at.
        folder: Of the head, and of what is needed to go on.
        recipe: How.
        stop: Tokens that end a text.
        progress: Told how far it is.

    Returns:
        What was measured; see :func:`measure`.

    Raises:
        CalibrationError: Too little text, or a folder of another recipe.
    """
    if len(prompts) < 2:
        raise CalibrationError("a head needs at least two prompts, and should get some hundred")
    folder.mkdir(parents=True, exist_ok=True)
    log = _open_log(folder, recipe)
    written = Written.read(write(target, prompts, folder, recipe, log, stop, progress))
    windows = len(written.tokens) // recipe.window
    held = max(1, windows // 16)
    if windows - held < recipe.batch:
        raise CalibrationError(
            f"{len(written.tokens)} tokens of text do not fill {recipe.batch} windows of "
            f"{recipe.window} to train on; give it more minutes or prompts"
        )
    head = Head(HeadSizes.of(target, recipe.d_ff), _words(written, target, recipe), recipe.seed)
    trainer = _Trainer(head, target, written, recipe, held)
    trainer.run(folder, log, progress)
    found = {**measure(trainer), "tokens": len(written.tokens), "steps": log["steps"]}
    found["seconds"] = {"writing": log["writing"], "training": log["training"]}
    trainer.fold()
    path = head.save(folder, target, {"recipe": asdict(recipe), "measured": found})
    return {**found, "file": str(path), "bytes": path.stat().st_size}


def _open_log(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What was done so far."""
    path, wanted = folder / _LOG, asdict(recipe)
    if not path.exists():
        return {"recipe": wanted, "writing": 0.0, "training": 0.0, "steps": 0, "losses": []}
    log: dict[str, Any] = json.loads(path.read_text())
    if log["recipe"] != wanted:
        changed = [k for k, v in wanted.items() if log["recipe"].get(k) != v]
        raise CalibrationError(
            f"{folder} was begun with another recipe ({', '.join(changed)}); choose another folder"
        )
    return log


def _write_log(folder: Path, log: dict[str, Any]) -> None:
    write_atomically(folder / _LOG, json.dumps(log).encode())


def write(
    target: FusedTarget,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    recipe: Recipe,
    log: dict[str, Any],
    stop: frozenset[int],
    progress: Progress,
) -> list[Path]:
    """Let the model continue prompts until time or prompts are up; files of tokens and states."""
    files = sorted(folder.glob("text-*.safetensors"))
    budget, batches = 60 * recipe.minutes * recipe.writing, -(-len(prompts) // recipe.rows)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(recipe.seed))
    while len(files) < batches and (not files or log["writing"] < budget):
        start, index = time.monotonic(), len(files)
        chosen = order[index * recipe.rows :][: recipe.rows].tolist()
        texts = [_shortened(prompts[i], recipe.longest) for i in chosen]
        name = folder / f"text-{index:05}.safetensors"
        write_atomically(name, save(_continue(target, texts, recipe, index, stop)))
        files.append(name)
        log["writing"] += time.monotonic() - start
        _write_log(folder, log)
        progress("writing", min(log["writing"], budget), budget, f"{len(files)} batches")
    return files


def _shortened(prompt: Sequence[int], longest: int) -> list[int]:
    """Its begin, which says what is wanted, and its end, after which the answer starts."""
    over = max(0, len(prompt) - longest)
    half = (len(prompt) - over) // 2
    return [*prompt[:half], *prompt[half + over :]]


@torch.no_grad()
def _continue(
    target: FusedTarget,
    texts: list[list[int]],
    recipe: Recipe,
    seed: int,
    stop: frozenset[int],
) -> dict[str, Tensor]:
    """Continue texts, in place; returns what :class:`Written` holds of them."""
    g = torch.Generator().manual_seed(recipe.seed * 1_000_003 + seed)
    lengths = [len(t) for t in texts]
    logits, _ = target.prefill(texts)
    states = [[s] for s in target.prompts]
    live = list(range(len(texts)))
    for step in range(recipe.new):
        law = (logits / max(recipe.temperature, 1e-3)).softmax(-1)
        tokens = torch.multinomial(law, 1, generator=g)
        logits, hidden = target.verify(list(tokens), [torch.tensor([-1])] * len(live))
        target.keep([torch.tensor([0])] * len(live))
        done = []
        for at, (row, token) in enumerate(zip(live, tokens.flatten().tolist(), strict=True)):
            texts[row].append(token)
            states[row].append(hidden[at : at + 1].clone())
            if token in stop or len(texts[row]) + 1 >= target.limit:
                done.append(at)
        if done:
            target.drop(done)
            left = [i for i in range(len(live)) if i not in set(done)]
            live, logits = [live[i] for i in left], logits[left]
        if not live or step + 1 == recipe.new:
            break
    own = [torch.arange(len(t)) >= n for t, n in zip(texts, lengths, strict=True)]
    first = [torch.arange(len(t)) == 0 for t in texts]
    return {
        "tokens": torch.tensor([t for one in texts for t in one], dtype=torch.int32),
        "features": torch.cat([s for one in states for s in one]).bfloat16(),
        "own": torch.cat(own),
        "first": torch.cat(first),
    }


def _words(written: Written, target: FusedTarget, recipe: Recipe) -> Tensor:
    """The tokens that the model uses most, then those of its prompts, then any; ascending."""
    if recipe.words >= target.vocabulary:
        return torch.arange(target.vocabulary)
    counts = Counter(written.tokens[written.own].tolist())
    chosen = [w for w, _ in counts.most_common(recipe.words)]
    for w in (*Counter(written.tokens.tolist()), *range(target.vocabulary)):
        if len(chosen) >= recipe.words:
            break
        if w not in counts:
            counts[w] = 1
            chosen.append(w)
    return torch.tensor(sorted(chosen))


class _Trainer:
    """Steps of training, and what they need of the model.

    Args:
        head: That learns.
        target: Of which embedding and output layer are.
        written: Text; its last ``held`` windows are not trained on.
        recipe: How.
        held: See there.
    """

    def __init__(
        self, head: Head, target: FusedTarget, written: Written, recipe: Recipe, held: int
    ) -> None:
        w = target.weights
        self.head, self.written, self.recipe, self.held = head, written, recipe, held
        self.embedding, self.words = w.embedding.detach(), w.head.detach()[head.words].float()
        self.cosine, self.sine = target.tables(recipe.window - 1)
        self.windows = len(written.tokens) // recipe.window
        # what goes in and what is compared is about 1 everywhere; a few states are ten times others
        size = self.embedding[written.tokens[:4096].long()].float().square().mean().sqrt()
        self.embedded_by = 1 / float(size.clamp_min(1e-6))
        self.states_by = written.features[:4096].float().square().mean(0).sqrt().clamp_min(1e-6)
        self.states_by = 1 / self.states_by
        decayed = [p for p in head.parameters() if p.dim() > 1]
        others = [p for p in head.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))
        with torch.no_grad():
            head.norm.copy_(w.norm.detach().float())

    def fold(self) -> None:
        """Let the head take embeddings and states as they are."""
        d = self.head.sizes.d
        with torch.no_grad():
            self.head.mix[:, :d] *= self.embedded_by
            self.head.mix[:, d:] *= self.states_by

    def batch(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens ``[b, n]``, states ``[b, n, d]`` and whether each next one is of the same text."""
        n = self.recipe.window
        at = windows[:, None] * n + torch.arange(n)
        tokens, features = self.written.tokens[at].long(), self.written.features[at].float()
        return tokens, features, ~self.written.first[at]

    def guess(self, tokens: Tensor, features: Tensor) -> Tensor:
        """States ``[b, n - 1, d]`` at all tokens of windows but the first."""
        embedded = self.embedding[tokens[:, 1:]].float() * self.embedded_by
        found: Tensor = self.head(embedded, features * self.states_by, self.cosine, self.sine)
        return found

    def mixed(self, tokens: Tensor, features: Tensor, share: float, g: torch.Generator) -> Tensor:
        """States to read, ``[b, n - 1, d]``: the model's, a share of them the head's guesses."""
        seen = features[:, :-1]
        if share <= 0:
            return seen
        with torch.no_grad():
            own = self.guess(tokens, seen)
        taken = torch.rand(seen.shape[:2], generator=g) < share
        taken[:, 0] = False
        return torch.where(taken[..., None], F.pad(own[:, :-1], (0, 0, 1, 0)), seen)

    def loss(self, tokens: Tensor, features: Tensor, same: Tensor, seen: Tensor) -> Tensor:
        """Divergence of the laws of next tokens, and distance of states."""
        got = self.guess(tokens, seen)[same[:, 1:]]
        want = features[:, 1:][same[:, 1:]]
        with torch.no_grad():
            law = (want @ self.words.T).log_softmax(-1)
        mine = (got @ self.words.T).log_softmax(-1)
        near = F.smooth_l1_loss(got * self.states_by, want * self.states_by)
        return F.kl_div(mine, law, reduction="batchmean", log_target=True) + near

    def run(self, folder: Path, log: dict[str, Any], progress: Progress) -> None:
        """Train until time is up."""
        recipe, path = self.recipe, folder / _STATE
        budget = 60 * recipe.minutes * (1 - recipe.writing)
        if path.exists():
            self._restore(path)
        start = last = time.monotonic()
        before = log["training"]
        most = self.windows - self.held

        def finished() -> float:
            share = log["steps"] / recipe.steps if recipe.steps else 0.0
            return float(max(log["training"] / budget, share))

        while (done := finished()) < 1:
            g = torch.Generator().manual_seed(recipe.seed * 1_000_003 + log["steps"])
            self._rate(log["steps"], done)
            tokens, features, same = self.batch(torch.randint(most, (recipe.batch,), generator=g))
            seen = self.mixed(tokens, features, recipe.own if done > 0.1 else 0.0, g)
            loss = self.loss(tokens, features, same, seen)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
            self.optimizer.step()
            log["steps"] += 1
            now, value = time.monotonic(), float(loss.detach())
            log["losses"].append(round(value, 4))
            log["training"] = before + now - start
            progress("training", finished() * budget, budget, f"loss {value:.3f}")
            if now - last > _SAVED or finished() >= 1:
                self._save(path)
                _write_log(folder, log)
                last = now

    def _rate(self, step: int, done: float) -> None:
        """A short rise, then half a cosine."""
        rate = min(1.0, (step + 1) / 30) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * rate

    def _save(self, path: Path) -> None:
        tensors = {f"head.{n}": p.detach() for n, p in self.head.named_parameters()}
        for n, p in self.head.named_parameters():
            tensors |= {f"{k}.{n}": v for k, v in self.optimizer.state[p].items()}
        write_atomically(path, save({n: t.contiguous() for n, t in tensors.items()}))

    def _restore(self, path: Path) -> None:
        held = load_file(path)
        with torch.no_grad():
            for n, p in self.head.named_parameters():
                p.copy_(held[f"head.{n}"])
                kept = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[p] = {k: held[f"{k}.{n}"] for k in kept}


@torch.no_grad()
def measure(trainer: _Trainer, most: int = 32) -> dict[str, float]:
    """What a head does on text that it was not trained on.

    Args:
        trainer: With held-out windows.
        most: Windows used.

    Returns:
        ``loss``; ``first``: share of positions where its likeliest token is the model's, given the
        model's states; ``later``: likewise, given its own; ``covered``: share of the model's
        likeliest tokens that it may draft at all.
    """
    windows = torch.arange(trainer.windows - trainer.held, trainer.windows)[:most]
    allowed = torch.zeros(len(trainer.embedding), dtype=torch.bool)
    allowed[trainer.head.words] = True
    sums: dict[str, float] = defaultdict(float)
    count = 0
    for part in windows.split(trainer.recipe.batch):
        tokens, features, same = trainer.batch(part)
        g, kept = torch.Generator().manual_seed(0), same[:, 1:]
        want = features[:, 1:][kept] @ trainer.words.T
        n = len(want)
        count += n
        for name, share in (("first", 0.0), ("later", 1.0)):
            seen = trainer.mixed(tokens, features, share, g)
            if not share:
                sums["loss"] += float(trainer.loss(tokens, features, same, seen)) * n
            got = trainer.guess(tokens, seen)[kept] @ trainer.words.T
            sums[name] += float((got.argmax(-1) == want.argmax(-1)).sum())
        sums["covered"] += float(allowed[tokens[:, 1:]][kept].sum())
    return {name: round(value / count, 4) for name, value in sums.items()}
