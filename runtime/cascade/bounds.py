"""The probability that calibration rests on: ranks, binomial tails and what follows from them."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def conformal_rank(n: int, alpha: float) -> int | None:
    """Which of n sorted costs bounds a new one with probability 1 - alpha; ``None`` if n is small.

    k = ceil((n + 1)(1 - alpha)); Vovk et al., Algorithmic Learning in a Random World, 2005.
    """
    k = math.ceil((n + 1) * (1 - alpha) - 1e-9)  # (9 + 1) * 0.9 is 9.000000000000002
    return k if k <= n else None


def binomial_cdf(n: int, p: float) -> NDArray[np.float64]:
    """P(X <= k) for k = 0 ... n, where X is binomial. Shape ``[n + 1]``."""
    if p <= 0 or p >= 1:
        return np.ones(n + 1) if p <= 0 else np.append(np.zeros(n), 1.0)
    k = np.arange(1, n + 1)
    log = n * math.log1p(-p) + np.cumsum(np.log((n - k + 1) / k) + math.log(p / (1 - p)))
    pmf = np.exp(np.append(n * math.log1p(-p), log))
    found: NDArray[np.float64] = np.minimum(np.cumsum(pmf), 1.0)
    return found


def p_values(violations: NDArray[np.int64], n: int, alpha: float) -> NDArray[np.float64]:
    """Of the hypothesis that the risk exceeds alpha, given so many violations in n trials.

    The binomial tail of Learn then Test (Angelopoulos et al., 2021, section 2.1, for a 0-1 loss).
    """
    found: NDArray[np.float64] = binomial_cdf(n, alpha)[violations]
    return found


def holm(p: NDArray[np.float64], delta: float) -> NDArray[np.bool_]:
    """Which hypotheses Holm's step-down rejects, family-wise error at most delta. ``[T]``."""
    order = np.argsort(p, kind="stable")
    ok = p[order] <= delta / np.arange(len(p), 0, -1)
    rejected = np.zeros(len(p), bool)
    rejected[order[: len(p) if ok.all() else int(np.argmin(ok))]] = True
    return rejected


def fixed_sequence(p: NDArray[np.float64], delta: float) -> NDArray[np.bool_]:
    """Which hypotheses are rejected before the first that is not, in the given order. ``[T]``.

    The order must not depend on the data behind ``p``; then every test may use all of delta.
    """
    ok = p <= delta
    return np.logical_and.accumulate(ok) if len(p) else ok


def proportion(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a probability."""
    if n == 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = 0.0
    if successes:
        low = _solve(lambda p: 1 - float(binomial_cdf(n, p)[successes - 1]), tail)
    high = 1.0
    if successes < n:
        high = _solve(lambda p: 1 - float(binomial_cdf(n, p)[successes]), 1 - tail)
    return low, high


def exceedance_ceiling(n: int, alpha: float, delta: float) -> float:
    """What the exceedance stays under in all but a share delta of calibrations of n queries.

    The conformal bound holds on average over calibrations. Given one of them, the exceedance of a
    fixed policy is at most 1 - Beta(k, n + 1 - k); this is that variable's 1 - delta quantile.
    """
    k = conformal_rank(n, alpha)
    if k is None:
        return 1.0
    return _solve(lambda x: float(binomial_cdf(n, 1 - x)[k - 1]), 1 - delta)


def _solve(increasing: Callable[[float], float], target: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if increasing(middle) < target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def pac_bayes_gap(n: int, policies: int, delta: float = 0.05) -> float:
    """How far true regret may lie above the regret measured on n queries, for any chosen policy.

    McAllester's bound with a uniform prior over the policies and all posterior mass on one,
    sqrt((ln T + ln(2 sqrt(n) / delta)) / 2n), holding with probability 1 - delta.
    """
    return math.sqrt((math.log(policies) + math.log(2 * math.sqrt(n) / delta)) / (2 * n))


def hoeffding_gap(n: int, policies: int, delta: float = 0.05) -> float:
    """The same from Hoeffding and a union bound: sqrt(ln(T / delta) / 2n)."""
    return math.sqrt(math.log(policies / delta) / (2 * n))
