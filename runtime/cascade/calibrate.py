"""Choose a cascade's thresholds without labels, under a bound on what a query costs (C3PO).

A query climbs the members in order. Member j draws its samples, answers with their mode, and is
believed if the mode's share reaches tau_j. Regret is disagreement with the last, most powerful
member, so no label is needed. C3PO, arXiv 2511.07396: the threshold of least regret among those
whose cost bound holds on queries that regret has not seen.

Two modes. ``paper``: a policy is feasible if the conformal quantile of its cost lies in the budget,
P(C > B) <= alpha on average over calibrations and queries, for a policy fixed beforehand; the one
that is chosen among many was not, quite. ``strict``: Learn then Test (Angelopoulos et al., 2021):
with probability 1 - delta over calibrations, P(C > B) <= alpha holds for the policy chosen.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import CalibrationError
from ...passes.base import Each
from .bounds import (
    conformal_rank,
    fixed_sequence,
    hoeffding_gap,
    holm,
    p_values,
    pac_bayes_gap,
    proportion,
)
from .traces import Table

SKIP = float("inf")
"""The threshold of a member that is not called at all."""

Mode = Literal["paper", "strict"]


@dataclass(frozen=True, slots=True)
class Goal:
    """What is asked of a policy.

    Attributes:
        budget: US dollars that a query may cost, B.
        alpha: Share of queries that may cost more.
        mode: ``paper`` or ``strict``, see this module.
        delta: Of ``strict``: the share of calibrations that may be wrong about it.
        control: Of ``strict``: ``fixed-sequence``, in the order of the policies' cost on the
            queries that regret is measured on, or ``holm``.
        shares: Of the queries: to measure regret, to bound the cost, to validate.
        seed: Of the split.
        tolerance: How much more regret than the least is worth a lower mean cost. With 0, as in
            the paper, a policy spends whatever the budget allows if that lowers regret at all.
    """

    budget: float
    alpha: float = 0.1
    mode: Mode = "paper"
    delta: float = 0.1
    control: Literal["fixed-sequence", "holm"] = "fixed-sequence"
    shares: tuple[float, float, float] = (0.4, 0.4, 0.2)
    seed: int = 0
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        if not 0 < self.alpha < 1 or not 0 < self.delta < 1:
            raise CalibrationError(f"alpha {self.alpha} and delta {self.delta} lie in (0, 1)")
        if self.mode not in ("paper", "strict"):
            raise CalibrationError(f"mode {self.mode!r} is neither 'paper' nor 'strict'")
        if self.control not in ("fixed-sequence", "holm"):
            raise CalibrationError(f"control {self.control!r}: 'fixed-sequence' or 'holm'")
        if min(self.shares) < 0 or abs(sum(self.shares) - 1) > 1e-9:
            raise CalibrationError(f"shares {self.shares} are not three parts of one")
        if not 0 <= self.tolerance < 1:
            raise CalibrationError(f"a tolerance of {self.tolerance} is not a share of queries")
        if not self.budget >= 0:
            raise CalibrationError(f"a budget of {self.budget}")


@dataclass(frozen=True, slots=True)
class Infeasible:
    """No policy keeps the bound, or the data cannot tell. An outcome, not an error.

    Attributes:
        reason: In words.
        least_budget: The smallest that would have been feasible, US dollars per query.
        least_queries: How many queries the bound needs, if there are too few.
    """

    reason: str
    least_budget: float | None = None
    least_queries: int | None = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """A feasible policy and the evidence for it.

    Attributes:
        thresholds: One per member but the last; ``SKIP`` for one that is not called.
        regret: On the queries it was chosen on.
        quantile: Of the calibration costs at the conformal rank, US dollars.
        violations: Calibration queries over the budget.
        sizes: Queries for regret, for the bound, and held out.
        policies: How many were compared.
        feasible: How many kept the bound.
        held_out: How it does on queries that nothing was chosen on.
        bounds: On the true regret, with probability 0.95; wide, and no more than bounds.
        costs: Its cost of each calibration query, sorted, US dollars.
    """

    thresholds: tuple[float, ...]
    regret: float
    quantile: float
    violations: int
    sizes: tuple[int, int, int]
    policies: int
    feasible: int
    held_out: dict[str, Any]
    bounds: dict[str, float]
    costs: tuple[float, ...]


def grid(samples: Sequence[int]) -> NDArray[np.float64]:
    """All policies that differ: thresholds ``[T, M]``, the last column 0, the last member's.

    A member of K samples has confidences 0, 1/K ... 1, so those thresholds and ``SKIP`` are all
    there is. Behind a threshold of 0 nobody is called; such policies are listed once.
    """
    axes = [[*(k / n for k in range(n + 1)), SKIP] for n in samples[:-1]]
    rows = [
        (*row, 0.0)
        for row in itertools.product(*axes)
        if 0.0 not in row or all(t == SKIP for t in row[row.index(0.0) + 1 :])
    ]
    return np.array(rows)


def outcomes(
    table: Table, thresholds: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Where each query stops, and what it has cost by then.

    Args:
        table: Of n queries and M members.
        thresholds: ``[T, M]``; a member whose threshold is ``SKIP`` is not called and costs
            nothing.

    Returns:
        Exits ``[T, n]``, the number of a member; costs ``[T, n]``, US dollars.
    """
    shape = (len(thresholds), len(table))
    exits = np.full(shape, table.answer.shape[1] - 1)
    cost = np.zeros(shape)
    climbing = np.ones(shape, bool)
    for j in range(table.answer.shape[1]):
        called = climbing & (thresholds[:, j] < SKIP)[:, None]
        cost += np.where(called, table.cost[:, j], 0.0)
        stops = called & (table.confidence[:, j] >= thresholds[:, j, None])
        exits[stops] = j
        climbing &= ~stops
    return exits, cost


def disagreement(table: Table, exits: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the answer where a query stops differs from the last member's. ``[T, n]``."""
    given = table.answer[np.arange(len(table)), exits]
    found: NDArray[np.bool_] = given != table.answer[:, -1]
    return found


def split(n: int, shares: tuple[float, float, float], seed: int) -> list[NDArray[np.int64]]:
    """Rows for regret, for the bound, and held out: disjoint, sorted, by seed."""
    order = np.random.default_rng(seed).permutation(n)
    first = round(n * shares[0])
    second = n if shares[2] == 0 else first + round(n * shares[1])
    return [np.sort(part) for part in np.split(order, [first, second])]


def search(
    learn: Table,
    bound: Table,
    goal: Goal,
    thresholds: NDArray[np.float64] | None = None,
    each: Each = map,
) -> tuple[NDArray[np.float64], dict[str, Any]] | Infeasible:
    """The policy of least regret on ``learn`` among those whose cost bound holds on ``bound``.

    Of equals, and of those within the tolerance, the cheapest one on ``learn``.

    Returns:
        Its thresholds ``[M]`` and what speaks for it, or why there is none.
    """
    tau = grid([m.samples for m in learn.members]) if thresholds is None else thresholds
    n = len(bound)
    rank = conformal_rank(n, goal.alpha)
    if not len(learn):
        return Infeasible("no queries to measure regret on", least_queries=1)
    if goal.mode == "paper" and rank is None:
        least = int(np.ceil(1 / goal.alpha - 1 - 1e-9))
        why = f"{n} calibration queries cannot bound a share of {goal.alpha:g}"
        return Infeasible(f"{why}: it takes {least}", least_queries=least)
    if goal.mode == "strict" and (1 - goal.alpha) ** n > goal.delta:
        least = int(np.ceil(np.log(goal.delta) / np.log1p(-goal.alpha)))
        why = f"{n} calibration queries cannot show a share of {goal.alpha:g} at {goal.delta:g}"
        return Infeasible(f"{why}, whatever they cost: it takes {least}", least_queries=least)
    regret, mean, tail = _on_learn(learn, tau, goal.alpha, each)
    order = np.lexsort((mean, tail))  # cheapest first, known before `bound` is looked at
    tau, regret, mean = tau[order], regret[order], mean[order]
    quantile, violations, least_costs = _on_bound(bound, tau, goal, rank, each)
    if goal.mode == "paper":
        feasible = quantile <= goal.budget
        least_budget = float(quantile.min())
    else:
        p = p_values(violations, n, goal.alpha)
        test = fixed_sequence if goal.control == "fixed-sequence" else holm
        feasible = test(p, goal.delta)
        least_budget = float(least_costs[0] if test is fixed_sequence else least_costs.min())
    if not feasible.any():
        what = f"no policy stays within ${goal.budget:g} for all but {goal.alpha:.0%} of queries"
        return Infeasible(f"{what} ({goal.mode} mode)", least_budget=least_budget)
    allowed = np.flatnonzero(feasible)
    near = allowed[regret[allowed] <= regret[allowed].min() + goal.tolerance + 1e-12]
    best = near[np.lexsort((regret[near], mean[near]))[0]]
    return tau[best], {
        "regret": float(regret[best]),
        "quantile": float(quantile[best]),
        "violations": int(violations[best]),
        "policies": len(tau),
        "feasible": int(feasible.sum()),
    }


def calibrate(table: Table, goal: Goal, each: Each = map) -> Chosen | Infeasible:
    """Split the queries, search, and validate on those that nothing was chosen on.

    Args:
        table: Of the queries.
        goal: What is asked of the policy.
        each: Where policies are tried, many at a time; by default here.
            :func:`skimp.runtime.cluster.on_ray` gives one for a cluster, of the same result.
    """
    learn, bound, rest = (table.take(rows) for rows in split(len(table), goal.shares, goal.seed))
    found = search(learn, bound, goal, each=each)
    if isinstance(found, Infeasible):
        return found
    tau, evidence = found
    _, costs = outcomes(bound, tau[None])
    n = len(learn)
    return Chosen(
        thresholds=tuple(float(t) for t in tau[:-1]),
        sizes=(n, len(bound), len(rest)),
        held_out=validate(rest, tau, goal.budget),
        bounds={
            "regret_pac_bayes": evidence["regret"] + pac_bayes_gap(n, evidence["policies"]),
            "regret_hoeffding": evidence["regret"] + hoeffding_gap(n, evidence["policies"]),
        },
        costs=tuple(float(c) for c in np.sort(costs[0])),
        **evidence,
    )


def validate(table: Table, tau: NDArray[np.float64], budget: float) -> dict[str, Any]:
    """Exceedance and regret with exact 95 % intervals, mean cost, and where queries stop."""
    n = len(table)
    if n == 0:
        return {"queries": 0}
    exits, cost = outcomes(table, tau[None])
    over = int((cost[0] > budget).sum())
    wrong = int(disagreement(table, exits)[0].sum())
    strongest = float(table.cost[:, -1].mean())
    return {
        "queries": n,
        "exceedance": over / n,
        "exceedance_interval": proportion(over, n),
        "regret": wrong / n,
        "regret_interval": proportion(wrong, n),
        "mean_cost": float(cost[0].mean()),
        "mean_cost_of_strongest": strongest,
        "exits": [float((exits[0] == j).mean()) for j in range(table.answer.shape[1])],
    }


def _on_learn(table: Table, tau: NDArray[np.float64], alpha: float, each: Each) -> Any:
    """Regret, mean cost and the 1 - alpha quantile of the cost, each ``[T]``."""
    at = min(len(table) - 1, int((1 - alpha) * len(table)))
    return _joined(each(partial(_learnt, table, at), _parts(tau, len(table))))


def _learnt(table: Table, at: int, part: NDArray[np.float64]) -> tuple[Any, Any, Any]:
    exits, cost = outcomes(table, part)
    return (
        disagreement(table, exits).mean(1),
        cost.mean(1),
        np.partition(cost, at, axis=1)[:, at],
    )


def _on_bound(
    table: Table, tau: NDArray[np.float64], goal: Goal, rank: int | None, each: Each
) -> Any:
    """The conformal quantile, the violations, and the least budget that passes, each ``[T]``."""
    n = len(table)
    at = n - 1 if rank is None else rank - 1
    level = goal.delta / (1 if goal.control == "fixed-sequence" else len(tau))
    allowed = int((p_values(np.arange(n + 1), n, goal.alpha) <= level).sum()) - 1
    columns = at, n - 1 - max(allowed, 0)
    return _joined(each(partial(_bounded, table, goal.budget, columns), _parts(tau, n)))


def _bounded(
    table: Table, budget: float, columns: tuple[int, int], part: NDArray[np.float64]
) -> tuple[Any, Any, Any]:
    cost = np.sort(outcomes(table, part)[1], axis=1)
    return cost[:, columns[0]], (cost > budget).sum(1), cost[:, columns[1]]


def _joined(parts: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(np.concatenate(column) for column in zip(*parts, strict=True))


def _parts(tau: NDArray[np.float64], n: int) -> list[NDArray[np.float64]]:
    """The policies in parts, so that no array of one holds more than some 4 million numbers."""
    return np.array_split(tau, max(1, len(tau) * n >> 22))
