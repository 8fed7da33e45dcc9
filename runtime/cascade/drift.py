"""Is traffic still what the policy was calibrated on?

Two tests that may be looked at after every query, and that raise a false alarm with probability at
most ``level`` however long they run (Ville's inequality for a nonnegative martingale).

Exceedance: a bet on every query that more than the promised share costs more than the budget.
Exchangeability: are new costs spread among the calibration costs as they were among each other?
"""

import bisect
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class ExceedanceMonitor:
    """Whether P(C > B) has risen over a ceiling.

    A bet of size b multiplies its wealth by 1 + b (x - ceiling), x = 1 for an exceedance
    (Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, 2024). A
    share 1 / (k (k + 1)) of the money is kept until query k, so that long good service cannot
    have lost it all when traffic changes.

    Attributes:
        budget: US dollars per query.
        ceiling: The share that calibration vouches for.
        level: Probability of a false alarm.
    """

    budget: float
    ceiling: float
    level: float = 0.01
    queries: int = 0
    exceeded: int = 0
    _log: list[float] = field(default_factory=lambda: [-math.inf] * 3)
    alarmed_at: int | None = None

    def add(self, cost: float) -> None:
        """Count a query's cost, US dollars."""
        over = cost > self.budget
        self.queries += 1
        self.exceeded += over
        for i, share in enumerate((0.1, 0.3, 0.6)):
            bet = share / self.ceiling
            fresh = -math.log(self.queries * (self.queries + 1))
            self._log[i] = _log_sum([self._log[i], fresh])
            self._log[i] += math.log1p(bet * (over - self.ceiling))
        if self.alarmed_at is None and self.evidence >= 1 / self.level:
            self.alarmed_at = self.queries

    @property
    def evidence(self) -> float:
        """How many times a bet against the promise has multiplied; 1 is none."""
        kept = 1 / (self.queries + 1)
        return kept + math.exp(min(_log_sum(self._log) - math.log(len(self._log)), 600.0))

    @property
    def rate(self) -> float:
        """Share of queries over the budget."""
        return self.exceeded / self.queries if self.queries else 0.0


@dataclass(slots=True)
class ExchangeabilityMonitor:
    """Whether new costs come from where the calibration costs came from.

    The p-value of a query is its smoothed conformal rank among calibration and earlier queries;
    under exchangeability p-values are independent and uniform. The bet is the simple jumper of
    Vovk et al., Retrain or not retrain: conformal test martingales, 2021.

    Attributes:
        reference: Calibration costs.
        level: Probability of a false alarm.
    """

    reference: Sequence[float]
    level: float = 0.01
    seed: int = 0
    most: int = 20_000
    queries: int = 0
    _sorted: list[float] = field(default_factory=list)
    _log: list[float] = field(default_factory=lambda: [math.log(1 / 3)] * 3)
    _random: random.Random = field(default_factory=random.Random)
    alarmed_at: int | None = None

    def __post_init__(self) -> None:
        """Start from the calibration costs."""
        self._sorted = sorted(self.reference)
        self._random.seed(self.seed)

    def add(self, cost: float) -> None:
        """Count a query's cost, US dollars."""
        self.queries += 1
        low = bisect.bisect_left(self._sorted, cost)
        high = bisect.bisect_right(self._sorted, cost)
        greater, equal = len(self._sorted) - high, high - low + 1
        p = (greater + self._random.random() * equal) / (len(self._sorted) + 1)
        if len(self._sorted) < self.most:
            self._sorted.insert(low, cost)
        self._jump(p)
        if self.alarmed_at is None and self.evidence >= 1 / self.level:
            self.alarmed_at = self.queries

    def _jump(self, p: float, rate: float = 0.01) -> None:
        total = _log_sum(self._log)
        for i, slope in enumerate((-1, 0, 1)):
            mixed = _log_sum([self._log[i] + math.log1p(-rate), total + math.log(rate / 3)])
            self._log[i] = mixed + math.log1p(slope * (p - 0.5))

    @property
    def evidence(self) -> float:
        """How many times a bet against exchangeability has multiplied; 1 is none."""
        return math.exp(min(_log_sum(self._log), 600.0))


@dataclass(slots=True)
class Drift:
    """Both monitors of one policy."""

    exceedance: ExceedanceMonitor
    exchangeability: ExchangeabilityMonitor

    @classmethod
    def of(cls, record: Mapping[str, Any], level: float = 0.01) -> "Drift":
        """The monitors of a policy file's record. Each may use half of ``level``."""
        ceiling = max(float(record["exceedance_ceiling"]), float(record["alpha"]))
        return cls(
            ExceedanceMonitor(float(record["budget"]), ceiling, level / 2),
            ExchangeabilityMonitor(list(record["calibration_costs"]), level / 2),
        )

    def add(self, cost: float) -> list[str]:
        """Count a query's cost; returns what has alarmed for the first time."""
        before = self.alarms
        self.exceedance.add(cost)
        self.exchangeability.add(cost)
        return [a for a in self.alarms if a not in before]

    @property
    def alarms(self) -> list[str]:
        """What has alarmed, in words."""
        found = []
        if self.exceedance.alarmed_at is not None:
            found.append(
                f"cost exceeds ${self.exceedance.budget:g} more often than the "
                f"{self.exceedance.ceiling:.1%} that calibration vouches for"
            )
        if self.exchangeability.alarmed_at is not None:
            found.append("costs are no longer spread as they were in calibration")
        return found


def _log_sum(logs: Sequence[float]) -> float:
    top = max(logs)
    if top == -math.inf:
        return top
    return top + math.log(sum(math.exp(x - top) for x in logs))
