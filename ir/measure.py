"""Time calls against each other: interleaved, with spread, and never if outputs disagree."""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import VerificationError

AN_EXPERT = 0.1
"""Relative error of a text for which an expert runs in one program and not in the other."""


def machine() -> str:
    """The processor that figures are of: its name, widest vectors, and the threads in use."""
    try:
        names = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    except OSError:
        names = []
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{torch.get_num_threads()} threads of {name} ({vectors})"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds per call: the median and the quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """Summarise at least two measurements."""
        low, median, high = statistics.quantiles(seconds, n=4)
        return cls(median, low, high)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Calls timed in turn.

    Attributes:
        timings: By name.
        speedup: How many times as fast ``subject`` is as each of the others: the median of the
            ratios of neighbouring runs, with its quartiles.
    """

    subject: str
    timings: dict[str, Timing]
    speedup: dict[str, Timing]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def compare(
    calls: Mapping[str, Callable[[], Any]],
    subject: str,
    *,
    seconds: float = 2.0,
    least: int = 7,
    most: int = 200,
    rest: float = 0.0,
    warm: int = 1,
) -> Comparison:
    """Time calls one after the other, round by round.

    Args:
        calls: By name; each is warm after two calls.
        subject: The one that the others are compared with.
        seconds: About how long to measure.
        least: At least this many rounds.
        most: At most this many rounds.
        rest: Seconds of quiet before each turn. Idle threads of ONNX Runtime spin, and for a while
            take a core from whoever comes next, whose calls then last up to twice as long.
        warm: Calls of a turn before the measured one: the caches should be its own, not its
            predecessor's, and its threads awake.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for call in calls.values():
            call(), call()
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < least or (time.perf_counter() < end and rounds < most):
            for name, call in calls.items():
                time.sleep(rest)
                for _ in range(warm):
                    call()
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
            rounds += 1
    speedup = {
        name: Timing.of([a / b for a, b in zip(times[name], times[subject], strict=True)])
        for name in calls
        if name != subject
    }
    return Comparison(subject, {n: Timing.of(t) for n, t in times.items()}, speedup)


def agree(
    got: Tensor, want: Tensor, what: str, tolerance: float, tied: Tensor | None = None
) -> int:
    """Refuse to time calls that compute different things.

    Args:
        got: ``[batch, ..]``, any float dtype.
        want: Likewise.
        what: Name of the call, for the message.
        tolerance: Largest relative error, over everything or, with ``tied``, of a text.
        tied: Bool ``[batch]``: in which texts a score ties with its limit, so that rounding decides
            whether an expert runs. Such a text may differ by :data:`AN_EXPERT`, one in two at most.

    Returns:
        How many texts differ so.

    Raises:
        VerificationError: The relative error is larger than that.
    """
    if tied is None:
        tied = torch.zeros(1, dtype=torch.bool)
    got, want = (y.reshape(len(tied), -1).float() for y in (got, want))
    errors = ((got - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-30)).cpu()
    off = torch.bitwise_not(errors <= tolerance)
    flipped = off & tied & (errors <= AN_EXPERT)
    if bool((off ^ flipped).any()) or int(flipped.sum()) > max(1, len(tied) // 2):
        raise VerificationError(
            f"{what}: outputs differ by {float(errors.max()):.2e}, more than {tolerance:.0e}; a "
            "speedup would mean nothing"
        )
    return int(flipped.sum())
