"""What other budgets would have bought: mean cost against agreement with the strongest member."""

import numpy as np

from ..economics import frontier
from .calibrate import Goal, disagreement, grid, outcomes, split
from .traces import Table


def cost_frontier(table: Table, goal: Goal, most: int = 40) -> list[dict[str, float]]:
    """The policies that no other dominates, on the queries that regret is measured on.

    Args:
        table: All traces.
        goal: For its split.
        most: Points at most, evenly spaced by cost.

    Returns:
        Mean cost in US dollars per query, and agreement, in ascending order of cost.
    """
    learn = table.take(split(len(table), goal.shares, goal.seed)[0])
    tau = grid([m.samples for m in learn.members])
    cost, agreement = [], []
    for part in np.array_split(tau, max(1, len(tau) * len(learn) >> 22)):
        exits, spent = outcomes(learn, part)
        cost += spent.mean(1).tolist()
        agreement += (1 - disagreement(learn, exits).mean(1)).tolist()
    kept = frontier(cost, agreement)
    points = sorted({(c, a) for c, a, k in zip(cost, agreement, kept, strict=True) if k})
    if len(points) > most:
        points = [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]
    return [{"cost": c, "agreement": a} for c, a in points]
