"""What a block costs: symbolic FLOPs and bytes, and measured time where it was profiled.

A multiply-add counts as two FLOPs, activations as none, as in ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .block import DynkFFN, Projection
from .errors import CalibrationError, unwritable

if TYPE_CHECKING:
    import sympy


@cache
def symbols() -> dict[str, sympy.Symbol]:
    """The symbols of the expressions."""
    import sympy

    names = "rows d d_ff d_out experts k width itemsize gates linear scored"
    return {name: sympy.Symbol(name, positive=True) for name in names.split()}


@cache
def expressions() -> dict[str, sympy.Expr]:
    """FLOPs and bytes per call, by name.

    ``gates`` is 1 for a gated network, else 0, and ``scored`` where the gate is the router; ``k``
    is the mean number of experts per row. ``dense_flops`` is what the block replaced: a network
    like itself, or, where ``linear`` is 1, one linear layer. ``bytes`` counts weights read once
    per call, if every row needs the same ``k`` experts, which is the least that a call of few rows
    can read.
    """
    s = symbols()
    whole = s["d"] * (1 + s["gates"]) + s["d_out"]
    neuron = whole - s["scored"] * s["d"]  # of what is left to compute once the scores are known
    network = 2 * s["rows"] * s["d_ff"] * whole
    linear = 2 * s["rows"] * s["d"] * s["d_out"]
    weights = s["width"] * (s["d"] + s["experts"]) + s["scored"] * s["d"] * s["d_ff"]
    router = 2 * s["rows"] * weights
    share = s["k"] / s["experts"]
    return {
        "dense_flops": s["linear"] * linear + (1 - s["linear"]) * network,
        "router_flops": router,
        "flops": router + share * 2 * s["rows"] * s["d_ff"] * neuron,
        "bytes": s["itemsize"] * (weights + share * s["d_ff"] * neuron),
    }


def evaluate(name: str, block: DynkFFN, *, rows: float = 1, k: float | None = None) -> float:
    """Put a block's sizes into an expression of :func:`expressions`.

    Args:
        name: ``dense_flops``, ``router_flops``, ``flops`` or ``bytes``.
        block: The block.
        rows: Rows per call.
        k: Mean experts per row; by default all.
    """
    values = dict(
        rows=rows,
        d=block.d,
        d_ff=block.d_ff,
        d_out=block.d_out,
        experts=block.experts,
        k=block.experts if k is None else k,
        width=block.router.width,
        itemsize=block.w_in.element_size(),
        gates=int(block.gated),
        linear=int(block.linear),
        scored=int(block.gate_routed),
    )
    return float(expressions()[name].subs({symbols()[n]: v for n, v in values.items()}))


def dense_flops(place: DynkFFN | Projection) -> float:
    """FLOPs per row of what was there before any conversion."""
    if isinstance(place, Projection):
        return 2.0 * place.d * place.d_out
    return evaluate("dense_flops", place)


def spent_flops(place: DynkFFN | Projection, k: float | None = None) -> float:
    """FLOPs per row of what is there now, the router included, at ``k`` experts per row."""
    if isinstance(place, Projection) or place.dense:
        return dense_flops(place)
    return evaluate("flops", place, k=k)


def ffn_share(chosen: Mapping[str, float], places: Mapping[str, DynkFFN | Projection]) -> float:
    """FLOPs of the blocks, routers included, as a share of what they replace.

    Args:
        chosen: Mean experts per row, k, by block name.
        places: Blocks, and linear layers that could have been, by name. What stays dense counts as
            dense.
    """
    dense = sum(dense_flops(p) for p in places.values())
    return sum(spent_flops(p, chosen.get(name)) for name, p in places.items()) / dense


def cache_dir() -> Path:
    """``$SKIMP_CACHE``, or ``skimp`` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("SKIMP_CACHE") or Path(base) / "skimp")


DRAFT = ".skimp-draft-"
"""How names of what is not complete yet begin."""
_STALE_SECONDS = 24 * 3600.0


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file under a temporary name and rename it, so that no reader sees half of it.

    Raises:
        UnwritableError: It cannot be written; what was there is unharmed.
    """
    draft = path.with_name(f"{DRAFT}{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with draft.open("xb") as file:  # readable by whom the umask says, unlike tempfile's
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from error
        raise


def sweep(folder: Path) -> None:
    """Remove what processes killed long ago left behind."""
    for draft in folder.glob(f"{DRAFT}*"):
        try:
            if time.time() - draft.stat().st_mtime > _STALE_SECONDS:
                draft.unlink() if draft.is_file() else shutil.rmtree(draft, ignore_errors=True)
        except OSError:
            continue  # another process was faster


@dataclass(slots=True)
class Curves:
    """Seconds per call, measured on this machine: one file per device and number of threads.

    Attributes:
        path: Where they are stored.
        seconds: By key, see :meth:`key`.
    """

    path: Path
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def load(cls, device: str = "cpu") -> Curves:
        """Read the curves of a device at the current number of threads; empty if there are none."""
        name = f"curves-{device}-{_machine()}-{torch.get_num_threads()}t.json"
        path = cache_dir() / name
        try:
            found: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            found = {}
        return cls(path, {str(k): float(v) for k, v in found.items()})

    @staticmethod
    def key(block: DynkFFN, rows: int, share: float | None) -> str:
        """Name of a measurement; ``share`` is the active share, ``None`` the dense network."""
        what = "dense" if share is None else f"share={round(share, 1)}"
        kind = "gated-" if block.gated else ""
        return (
            f"{kind}{block.act}-{block.d}x{block.d_ff}x{block.d_out}-e{block.expert_size}-"
            f"{str(block.w_in.dtype).removeprefix('torch.')}-rows={rows}-{what}"
        )

    def store(self) -> None:
        """Write the curves; a cache that cannot be written is not worth an error."""
        try:
            write_atomically(self.path, json.dumps(self.seconds, indent=1).encode())
        except OSError:
            return


@dataclass(slots=True)
class StepCurve:
    """Seconds of a step by its rows, as measured: steps and inversions stay as they are.

    Between measured numbers of rows it is linear; beyond the last it rises as steeply as it does
    on average. Interference only ever slows a step, so what is kept is a low quantile of its
    times. While it is used it learns on: a factor common to all rows (a machine that slows down
    leaves no number of rows looking cheap for being untried), and each number of rows by itself.

    Attributes:
        curves: Where it is stored.
        name: Of what is timed: model, dtype, kernels, batch, context.
        quantile: That is kept.
        factor: What all stored seconds are multiplied by.
        version: Rises as the curve changes by more than noise.
    """

    curves: Curves
    name: str
    quantile: float = 0.3
    points: dict[int, float] = field(default_factory=dict)
    factor: float = 1.0
    version: int = 0
    _table: list[float] = field(default_factory=list)

    @classmethod
    def load(cls, curves: Curves, name: str) -> StepCurve:
        """Read what is stored under a name; empty if nothing is."""
        start = f"{name}-rows="
        found = {int(k[len(start) :]): v for k, v in curves.seconds.items() if k.startswith(start)}
        return cls(curves, name, points=found)

    def store(self) -> None:
        """Write the curve with the others of its device."""
        for rows, seconds in self.points.items():
            self.curves.seconds[f"{self.name}-rows={rows}"] = seconds * self.factor
        self.curves.store()

    def __call__(self, rows: int) -> float:
        """Predicted seconds of a step of ``rows`` >= 1.

        Raises:
            CalibrationError: Nothing has been measured.
        """
        return self.table(rows)[rows] * self.factor

    def table(self, rows: int) -> list[float]:
        """Seconds by number of rows from 0 to at least ``rows``, before ``factor``."""
        if len(self._table) <= rows:
            if not self.points:
                raise CalibrationError(f"no step of {self.name} has been measured")
            known = sorted(self.points.items())
            slope = 0.0
            if len(known) > 1:
                (a, low), (b, high) = known[0], known[-1]
                slope = max(0.0, (high - low) / (b - a))
            last = max(rows, known[-1][0]) + 64
            table = [known[0][1]] * (known[0][0] + 1)
            for (a, x), (b, y) in itertools.pairwise(known):
                table += [x + (y - x) * (i - a) / (b - a) for i in range(a + 1, b + 1)]
            end = len(table) - 1
            table += [table[end] + slope * (i - end) for i in range(end + 1, last + 1)]
            self._table = table
            self.version += 1
        return self._table

    def set(self, points: Mapping[int, float]) -> None:
        """Take seconds by number of rows for measured."""
        self.points, self.factor, self._table = dict(points), 1.0, []

    def observe(self, rows: int, seconds: float) -> None:
        """Learn from a step that was taken."""
        ratio = seconds / self(rows)
        self.factor *= 1 + 0.05 * self._move(ratio)
        point = self.points.get(rows)
        if point is None:
            point = self.table(rows)[rows]
        self.points[rows] = point * (1 + 0.02 * self._move(ratio))
        if abs(self.points[rows] / self.table(rows)[rows] - 1) > 0.05:
            self._table = []

    def _move(self, ratio: float) -> float:
        """A step towards the quantile of ratios of measured to predicted."""
        near = min(1.0, abs(math.log(ratio)) * 10)  # close to it, in small steps
        return near * (self.quantile if ratio > 1 else self.quantile - 1)

    def profile(
        self, step: Callable[[int], object], grid: Sequence[int], seconds: float, least: int = 3
    ) -> float:
        """Measure it.

        Args:
            step: Takes a step of so many rows.
            grid: Numbers of rows. They are measured in turn, round by round.
            seconds: About how long in all; one round to warm up, and ``least`` more, are taken
                however long they last.
            least: Rounds that count.

        Returns:
            Seconds spent.
        """
        start = time.perf_counter()
        taken: dict[int, list[float]] = {n: [] for n in grid}
        rounds = 0
        while rounds <= least or (rounds < 40 and time.perf_counter() < start + seconds):
            for n in grid:
                begun = time.perf_counter()
                step(n)
                if rounds:
                    taken[n].append(time.perf_counter() - begun)
            rounds += 1
        self.set({n: sorted(t)[int(self.quantile * (len(t) - 1))] for n, t in taken.items()})
        return time.perf_counter() - start


@cache
def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        model = "unknown"
    return "".join(c if c.isalnum() else "-" for c in model)[:40]
