"""The loop: draft, verify, keep, emit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ...ir.errors import SkimpError, TargetError
from ...ir.measure import machine
from .calibrate import Draft
from .costs import Stopwatch
from .node import Drafter, Measured
from .policy import Base, Policy
from .report import Report, Snapshot
from .target import Target
from .verify import Sampling, descend

Stream = Callable[[int, list[int]], None]
"""Called with a row and its new tokens, as soon as they are certain."""


class Curve(Protocol):
    """Predicted seconds of a pass by its rows."""

    def __call__(self, rows: int) -> float: ...  # noqa: D102

    def observe(self, rows: int, seconds: float) -> None: ...  # noqa: D102


class Prices(Protocol):
    """Curves by batch and context; :class:`~skimp.runtime.tree.costs.Costs`, or given ones."""

    spent: float

    def prepare(self, target: Target, lengths: Sequence[int]) -> None: ...  # noqa: D102

    def at(self, batch: int, context: int) -> Curve: ...  # noqa: D102

    def store(self) -> None: ...  # noqa: D102


@dataclass(slots=True)
class _Row:
    """A row that still runs: where its output goes, and what is left to emit."""

    index: int
    out: list[int]
    left: int
    generator: torch.Generator
    seen: set[int]


@dataclass(slots=True)
class Engine:
    """Decodes with trees.

    Attributes:
        target: What verifies.
        drafters: What proposes; the policy holds the same.
        policy: What decides.
        prices: Measured curves.
        report: Of the last run.
    """

    target: Target
    drafters: Sequence[Drafter]
    policy: Base
    prices: Prices
    report: Report = field(default_factory=Report)
    _rows: list[_Row] = field(default_factory=list)
    _curve: Curve | None = None

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        limits: Sequence[int],
        stop: frozenset[int] = frozenset(),
        sampling: Sampling | None = None,
        stream: Stream | None = None,
    ) -> list[list[int]]:
        """Continue prompts.

        Args:
            prompts: Tokens, at least one each.
            limits: Most new tokens, by row.
            stop: Tokens after which a row ends; they are part of the output.
            sampling: By default greedy.
            stream: Told of new tokens.

        Returns:
            New tokens by row.

        Raises:
            SkimpError: A prompt is empty or too long, or holds what is no token.
        """
        self._check(prompts, limits)
        sampling = sampling or Sampling()
        watch, report = Stopwatch(), Report(machine(), self.target.name, len(prompts))
        self.report = report
        texts: list[list[int]] = [[] for _ in prompts]
        logits, hidden = self.target.prefill(prompts)
        self._rows = []
        roots = []
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            seen = set(prompt) if sampling.penalises else set()
            generator = sampling.generator(i)
            roots.append(sampling.choose(logits[i], seen, generator))
            room = min(limit, self.target.limit - len(prompt))
            self._rows.append(_Row(i, texts[i], room, generator, seen))
        for drafter in self.drafters:
            drafter.begin(prompts, hidden)
        self.policy.begin(len(prompts))
        self.policy.follow(sampling)
        emitted = [[r] for r in roots]
        done = self._emit(emitted, stop, stream)
        report.first = watch.lap()
        report.seconds = report.first
        self._drop(done)
        if self._rows:
            before = self.prices.spent
            self.prices.prepare(self.target, self.target.lengths())
            report.profiling = self.prices.spent - before
            report.profiling += sum(d.prepare() for d in self.drafters if isinstance(d, Measured))
            self._curve = None
        watch.lap()
        while self._rows:
            self._step(watch, stop, sampling, stream)
        report.tokens = sum(map(len, texts))
        self.prices.store()
        return texts

    def _check(self, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
        if not prompts:
            raise SkimpError("there is no prompt")
        for i, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
            if not prompt:
                raise SkimpError(f"prompt {i} is empty; give at least one token, such as BOS")
            if not 0 <= min(prompt) <= max(prompt) < self.target.vocabulary:
                raise SkimpError(
                    f"prompt {i} holds tokens outside the model's {self.target.vocabulary}: it "
                    "was made with another tokenizer"
                )
            if limit < 1:
                raise SkimpError(f"prompt {i}: at most {limit} new tokens leave nothing to do")
            if len(prompt) >= self.target.limit:
                raise TargetError(
                    f"prompt {i} has {len(prompt)} tokens; the model takes {self.target.limit}, "
                    "and at least one is to follow"
                )

    def _step(
        self, watch: Stopwatch, stop: frozenset[int], sampling: Sampling, stream: Stream | None
    ) -> None:
        report, policy, rows = self.report, self.policy, self._rows
        lengths = self.target.lengths()
        curve = self.prices.at(len(rows), max(lengths))
        if curve is not self._curve:
            self._curve = policy.curve = curve
        depths = [
            min(r.left - 1, self.target.limit - n - 1) for r, n in zip(rows, lengths, strict=True)
        ]
        chooser: Policy = policy  # type: ignore[assignment]
        drafts = chooser.draft([r.out[-1] for r in rows], depths)
        chosen = chooser.select(drafts)
        nodes = [[d.tree.tokens[n] for n in c] for d, c in zip(drafts, chosen, strict=True)]
        parents = [_renumber(d, c) for d, c in zip(drafts, chosen, strict=True)]
        inputs = [torch.tensor(n) for n in nodes], [torch.tensor(p) for p in parents]
        drafting = watch.lap()
        total = sum(map(len, nodes))
        predicted = curve(total)
        logits, hidden = self.target.verify(*inputs)
        if logits.is_cuda:
            torch.cuda.synchronize(logits.device)
        verifying = watch.lap()
        paths, texts, first = [], [], 0
        for row, draft, c, n, p in zip(rows, drafts, chosen, nodes, parents, strict=True):
            part = logits[first : first + len(n)]
            laws = {c.index(at): q for at, q in draft.laws.items()}
            path, following = descend(part, n, p, sampling, row.seen, row.generator, laws)
            paths.append(path)
            texts.append([*(n[i] for i in path[1:]), following])
            first += len(n)
        self._record(drafts, chosen, paths, texts)
        done = self._emit(texts, stop, stream)
        self.target.keep([torch.tensor(p) for p in paths])
        kept = [[c[i] for i in p] for c, p in zip(chosen, paths, strict=True)]
        states, first = [], 0
        for n, p in zip(nodes, paths, strict=True):
            states.append(hidden[first : first + len(n)][p])
            first += len(n)
        trees = [d.tree for d in drafts]
        for drafter in self.drafters:
            drafter.commit(trees, kept, states)
        curve.observe(total, verifying)
        other = watch.lap()
        taken = drafting + verifying + other
        policy.learn(drafts, texts, taken)
        report.off.append(predicted / verifying)
        report.draft += drafting
        report.verify += verifying
        report.other += other
        report.seconds += taken
        self._drop(done)

    def _record(
        self,
        drafts: Sequence[Draft],
        chosen: Sequence[Sequence[int]],
        paths: Sequence[Sequence[int]],
        texts: Sequence[Sequence[int]],
    ) -> None:
        report = self.report
        report.steps += 1
        report.row_steps += len(paths)
        for draft, nodes, path, text in zip(drafts, chosen, paths, texts, strict=True):
            report.accepted += len(path) - 1
            report.expected += sum(draft.tree.values[n] for n in nodes) - 1
            report.sizes[len(nodes)] += 1
            best = report.example
            if len(nodes) > 1 and (best is None or len(path) > len(best.accepted)):
                kept = [nodes[i] for i in path]
                report.example = Snapshot.of(draft, nodes, kept, text[-1])

    def _emit(
        self, texts: list[list[int]], stop: frozenset[int], stream: Stream | None
    ) -> list[int]:
        """Add tokens to the output, up to an end; returns the rows that are done."""
        done = []
        for i, (row, text) in enumerate(zip(self._rows, texts, strict=True)):
            del text[row.left :]
            for j, token in enumerate(text):
                if token in stop:
                    del text[j + 1 :]
                    row.left = len(text)
                    break
            row.out.extend(text)
            row.left -= len(text)
            if row.seen:
                row.seen.update(text)
            if stream is not None:
                stream(row.index, text)
            if row.left <= 0:
                done.append(i)
        return done

    def _drop(self, done: Sequence[int]) -> None:
        """Let finished rows cost nothing from here on."""
        if not done:
            return
        lengths, batch = self.target.lengths(), len(self._rows)
        self.target.drop(done)
        for drafter in self.drafters:
            drafter.drop(done)
        left = [r for i, r in enumerate(self._rows) if i not in set(done)]
        before = after = 1.0
        if left and self._curve is not None:
            before = batch / self._curve(batch)
            after = len(left) / self.prices.at(len(left), max(lengths))(len(left))
        self.policy.drop(done, before, after)
        self._rows = left


def _renumber(draft: Draft, nodes: Sequence[int]) -> list[int]:
    """Parents of chosen nodes, as places among them."""
    place = {n: i for i, n in enumerate(nodes)}
    return [place[p] if (p := draft.tree.parents[n]) >= 0 else -1 for n in nodes]
