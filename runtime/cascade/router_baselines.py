"""What a router has to beat: members alone, fixed sequences, nearest neighbours, chance, hindsight.

A world is small enough to be known whole: every way through it has a quality, a cost and a return.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir.errors import CalibrationError
from .embed import Remembered
from .router import Plan, Router
from .router_world import Steps, World

MOST_WAYS = 300
"""More ways through a world than this are not all walked."""
NEIGHBOURS = 40
"""That vote, where there are enough training questions."""
Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Ways:
    """Every way through a world for some questions; ``[n, ways]``.

    Attributes:
        paths: Members of each way.
        quality: Of the answer at its end.
        cost: US dollars.
        value: The return.
    """

    paths: tuple[Steps, ...]
    quality: Numbers
    cost: Numbers
    value: Numbers

    def columns(self, lengths: Sequence[int]) -> list[int]:
        """The ways of some lengths."""
        return [i for i, p in enumerate(self.paths) if len(p) in lengths]


def all_ways(world: World, plan: Plan, rows: Sequence[int]) -> Ways:
    """Walk all ways of 1 to L hops.

    Raises:
        CalibrationError: There are too many.
    """
    lengths = range(1, plan.hops + 1)
    paths = [p for k in lengths for p in product(range(len(world.members)), repeat=k)]
    if len(paths) > MOST_WAYS:
        raise CalibrationError(
            f"{len(world.members)} members and {plan.hops} hops make {len(paths)} ways, and "
            f"{MOST_WAYS} can be compared: take fewer members or hops"
        )
    quality, cost, value = (np.zeros((len(rows), len(paths))) for _ in range(3))
    for i, q in enumerate(rows):
        for j, path in enumerate(paths):
            quality[i, j], cost[i, j], value[i, j] = walk(world, plan, q, path)
    return Ways(tuple(paths), quality, cost, value)


def walk(world: World, plan: Plan, q: int, path: Steps) -> tuple[float, float, float]:
    """Quality, cost in US dollars, and return of one way."""
    cost = value = 0.0
    for k in range(len(path)):
        hop = world.after(q, path[: k + 1])
        cost += hop.cost
        value += plan.gamma**k * plan.reward(hop.cost)
    quality = plan.worth(world.after(q, path).quality, cost)
    return quality, cost, value + plan.gamma ** (len(path) - 1) * quality


def play(world: World, router: Router, rows: Sequence[int]) -> list[Steps]:
    """The way that a router takes for each question, greedily."""
    router.embedder.learn([world.questions[q].text for q in rows])
    return [_one(world, router, q) for q in rows]


def _one(world: World, router: Router, q: int) -> Steps:
    plan = router.plan
    path: Steps = ()
    cost = confidence = 0.0
    while len(path) < plan.hops:
        state = plan.state(
            router.embedder.one(world.questions[q].text),
            router.embedder.one(world.said(q, path)),
            len(path),
            cost,
            confidence,
        )
        action = router.act(state, len(path))
        if action is None or action == len(world.members):
            break
        path = (*path, action)
        hop = world.after(q, path)
        cost, confidence = cost + hop.cost, hop.confidence
    return path


def nearest(
    embedder: Remembered, world: World, train: Sequence[int], test: Sequence[int], value: Numbers
) -> NDArray[np.int64]:
    """For each test question the way that was best on average for the training questions like it.

    Args:
        embedder: Reads texts.
        world: Questions.
        train: Their numbers.
        test: Those to decide.
        value: ``[train, ways]`` returns.
    """
    known = embedder.many([world.questions[q].text for q in train])
    asked = embedder.many([world.questions[q].text for q in test])
    k = max(1, min(NEIGHBOURS, len(train) // 8))
    found = np.zeros(len(test), np.int64)
    for at in range(0, len(test), 256):
        near = np.argpartition(-(asked[at : at + 256] @ known.T), k - 1, axis=1)[:, :k]
        found[at : at + 256] = value[near].mean(1).argmax(1)
    return found


def thresholds(world: World, plan: Plan, rows: Sequence[int]) -> tuple[float, ...] | None:
    """The cascade of best return on some questions; ``None`` where a plan has no room for one.

    Members run in order, and each is believed from some share of agreement on.
    """
    members = len(world.members)
    if not plan.stop or plan.hops < members or not 1 < members < 5:
        return None
    order = tuple(range(members))
    seen = [sorted({world.after(q, order[: j + 1]).confidence for q in rows}) for j in order[:-1]]
    grid = product(*([*levels[-8:], math.inf] for levels in seen))

    def value(taus: tuple[float, ...]) -> float:
        return sum(walk(world, plan, q, climb(world, q, taus))[2] for q in rows)

    return max(grid, key=value)


def climb(world: World, q: int, taus: Sequence[float]) -> Steps:
    """The way of a cascade with these thresholds."""
    order = tuple(range(len(taus) + 1))
    for j, tau in enumerate(taus):
        if world.after(q, order[: j + 1]).confidence >= tau:
            return order[: j + 1]
    return order


def compare(
    world: World,
    router: Router,
    train: Sequence[int],
    test: Sequence[int],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """The router and all baselines on questions that nothing was chosen on.

    Single members, sequences and neighbours are chosen by their return on the training questions.

    Returns:
        By name: mean ``quality``, ``cost``, ``value`` with 95 % bootstrap intervals, and of the
        router the differences of its return to each baseline's, paired by question.
    """
    plan, names = router.plan, [m.name for m in world.members]
    before, after = all_ways(world, plan, train), all_ways(world, plan, test)
    at = {p: i for i, p in enumerate(after.paths)}
    full = after.columns(range(1, plan.hops + 1) if plan.stop else [plan.hops])
    singles, longest = after.columns([1]), after.columns([plan.hops])
    everyone = np.arange(len(test))

    def best_of(columns: list[int]) -> int:
        return columns[int(before.value[:, columns].mean(0).argmax())]

    def column(j: int) -> NDArray[np.int64]:
        return np.full(len(test), j)

    near = nearest(router.embedder, world, train, test, before.value[:, full])
    choices = {
        "router": np.array([at[p] for p in play(world, router, test)]),
        "best-single": column(best_of(singles)),
        "best-sequence": column(best_of(longest)),
        "knn": np.array(full)[near],
        "oracle": np.array(full)[after.value[:, full].argmax(1)],
    }
    taus = thresholds(world, plan, train)
    if taus is not None:
        choices["thresholds"] = np.array([at[climb(world, q, taus)] for q in test])
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(test), (1000, len(test)))

    def told(values: dict[str, Numbers]) -> dict[str, Any]:
        return {k: interval(v, draws) for k, v in values.items()}

    def pick(c: NDArray[np.int64]) -> dict[str, Numbers]:
        fields = {"quality": after.quality, "cost": after.cost, "value": after.value}
        return {k: v[everyone, c] for k, v in fields.items()}

    picked = {name: pick(c) for name, c in choices.items()}
    mean = {"quality": after.quality, "cost": after.cost, "value": after.value}
    picked["random"] = {k: v[:, longest].mean(1) for k, v in mean.items()}
    found: dict[str, Any] = {name: told(v) for name, v in picked.items()}
    for name in ("best-single", "best-sequence"):
        found[name]["members"] = [names[m] for m in after.paths[choices[name][0]]]
    found["singles"] = {names[after.paths[j][0]]: told(pick(column(j))) for j in singles}
    if plan.hops > 1:
        found["sequences"] = {
            ">".join(names[m] for m in after.paths[j]): {
                k: float(v.mean()) for k, v in pick(column(j)).items()
            }
            for j in longest
        }
    found["router"]["over"] = {
        name: interval(picked["router"]["value"] - picked[name]["value"], draws)
        for name in picked
        if name != "router"
    }
    return found


def interval(values: Numbers, draws: NDArray[np.int64]) -> dict[str, float]:
    """A mean with the 95 % interval of its bootstrap."""
    means = values[draws].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def verdict(over: dict[str, float]) -> str:
    """What an interval of a paired difference says."""
    if over["low"] > 0:
        return "better"
    return "worse" if over["high"] < 0 else "no different"
