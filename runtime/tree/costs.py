"""Measured seconds of a target's steps: profiled where nothing is known, learned from then on."""

import time
from collections.abc import Sequence

import torch

from ...ir.cost import Curves, StepCurve
from .target import Target

GRID = (*range(16), 19, 23, 31, 47, 63)
"""Rows beyond the roots that are profiled."""


class Costs:
    """The curves of one decoder by batch and context.

    Args:
        name: Of what is timed.
        device: Where it runs.
        seconds: About how long profiling may take; kept by measuring fewer times.
    """

    def __init__(self, name: str, device: str = "cpu", seconds: float = 12.0) -> None:
        self.name, self.seconds = name, seconds
        self.stored = Curves.load(device)
        self.spent = 0.0
        self._found: dict[tuple[int, int], StepCurve] = {}

    @staticmethod
    def bucket(context: int) -> int:
        """The longest context that shares a curve with this one: 256, 1024, 4096, .."""
        most = 256
        while most < context:
            most *= 4
        return most

    def at(self, batch: int, context: int) -> StepCurve:
        """The curve of a batch at a context.

        Where it was not measured it starts as that of the nearest batch and context that was: what
        counts most is the number of rows in all. It is empty if there is none.
        """
        key = batch, self.bucket(context)
        curve = self._found.get(key)
        if curve is None:
            curve = StepCurve.load(self.stored, self._name(*key))
            if not curve.points and (other := self._nearest(*key)) is not None:
                rows = [batch + n for n in GRID]
                table = other.table(rows[-1])
                curve.set({n: table[n] * other.factor for n in rows})
            if curve.points:
                self._found[key] = curve
        return curve

    def prepare(self, target: Target, lengths: Sequence[int]) -> None:
        """Profile the target on the rows it holds, unless a batch of about that size was.

        Nothing is committed. Takes about ``seconds``.
        """
        batch, context = len(lengths), max(lengths)
        near = self._nearest(batch, self.bucket(context), factor=2)
        if near is not None:
            return
        room = target.limit - context
        curve = StepCurve.load(self.stored, self._name(batch, self.bucket(context)))

        def step(rows: int) -> None:
            share, more = divmod(rows, batch)
            sizes = [share + (i < more) for i in range(batch)]
            tokens = [torch.arange(n) % target.vocabulary for n in sizes]
            parents = [torch.tensor([-1, 0, *range(n - 2)][:n]) for n in sizes]
            logits, _ = target.verify(tokens, parents)
            float(logits[0, 0])  # waits for the device

        grid = [batch + n for n in GRID if (batch + n) // batch + 1 < room]
        self.spent += curve.profile(step, grid or [batch], self.seconds)
        curve.store()
        self._found[batch, self.bucket(context)] = curve

    def store(self) -> None:
        """Write what was learned."""
        for curve in self._found.values():
            for rows, seconds in curve.points.items():
                self.stored.seconds[f"{curve.name}-rows={rows}"] = seconds * curve.factor
        self.stored.store()

    def _name(self, batch: int, bucket: int) -> str:
        return f"step-{self.name}-batch={batch}-context={bucket}"

    def _nearest(self, batch: int, bucket: int, factor: float = 1e9) -> StepCurve | None:
        """The known curve of the nearest batch, at most ``factor`` away, then context."""
        start = f"step-{self.name}-batch="
        known = set(self._found)
        for key in self.stored.seconds:
            if key.startswith(start):
                size, length, _ = key[len(start) :].split("-")
                known.add((int(size), int(length.partition("=")[2])))
        near = [
            (max(b / batch, batch / b), max(c / bucket, bucket / c), b, c)
            for b, c in known
            if max(b / batch, batch / b) <= factor
        ]
        if not near:
            return None
        _, _, b, c = min(near)
        if (b, c) not in self._found:
            self._found[b, c] = StepCurve.load(self.stored, self._name(b, c))
        return self._found[b, c]


class Stopwatch:
    """Splits a stretch of time into laps."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        now = time.perf_counter()
        taken, self.last = now - self.last, now
        return taken
