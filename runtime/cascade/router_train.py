"""Train a router with PPO, check what it costs on queries it has not seen, and compare it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ...ir.errors import CalibrationError, SkimpError
from .bounds import conformal_rank, exceedance_ceiling
from .embed import Embedder, Remembered, make_embedder
from .router import Layer, Plan, Router
from .router_baselines import all_ways, compare, play, verdict, walk
from .router_world import World, distinct

LEAK = 0.999
"""Cosine from which a test question counts as one of the training questions."""


@dataclass(frozen=True, slots=True)
class Training:
    """How a router is trained. The paper's settings are not known; these are a reconstruction.

    Attributes:
        steps: Hops played.
        width: Of the two hidden layers.
        rate: Of learning.
        batch: Hops per gradient step.
        rollout: Hops between two updates.
        epochs: Over each rollout.
        entropy: Weight of the entropy bonus.
        absent: See :class:`skimp.runtime.cascade.router_env.RouterEnv`.
        seed: Of everything.
        shares: Of the questions: to train, to bound the cost, to judge.
    """

    steps: int = 20_000
    width: int = 256
    rate: float = 1e-3
    batch: int = 128
    rollout: int = 1024
    epochs: int = 6
    entropy: float = 0.01
    absent: float = 0.0
    seed: int = 0
    shares: tuple[float, float, float] = (0.5, 0.2, 0.3)


@dataclass(frozen=True, slots=True)
class Bound:
    """What is asked of the cost: at most ``budget`` US dollars but for a share ``alpha``."""

    budget: float = math.inf
    alpha: float = 0.1


def split(world: World, shares: tuple[float, float, float], seed: int) -> list[list[int]]:
    """Numbers of the questions to train, to bound and to judge; each text is in one part, once."""
    rows = np.random.default_rng(seed).permutation(distinct(world.questions))
    cuts = np.cumsum([round(s * len(rows)) for s in shares[:2]])
    return [sorted(int(i) for i in part) for part in np.split(rows, cuts)]


def scaled(world: World, plan: Plan, rows: Sequence[int]) -> Plan:
    """The plan with the mean cost of the dearest member's call as the unit of cost."""
    means = [np.mean([world.after(q, (m,)).cost for q in rows]) for m in range(len(world.members))]
    return replace(plan, scale=float(max(means)) or 1.0)


def train(
    world: World,
    plan: Plan,
    rows: Sequence[int],
    embedder: Embedder | Remembered,
    how: Training = Training(),
    *,
    blind: Sequence[str] = (),
    progress: Callable[[str, float, float], None] | None = None,
) -> Router:
    """Train a policy on some questions of a world.

    Where an action can be missing (to stop before anything was said, a member that is not there)
    sb3-contrib's MaskablePPO is used, else stable-baselines3's PPO.

    Args:
        world: Questions and members.
        plan: Horizon and reward; ``scale`` as it is.
        rows: Numbers of the training questions.
        embedder: Reads texts.
        how: Steps, rates, seed.
        blind: What the policy is not shown, for ablations.
        progress: Told how far it has come.

    Raises:
        SkimpError: The packages of the extra ``router`` are missing.
    """
    try:
        import torch
        from sb3_contrib import MaskablePPO
        from stable_baselines3 import PPO
        from stable_baselines3.common.callbacks import BaseCallback
        from stable_baselines3.common.logger import Logger
        from stable_baselines3.common.vec_env import DummyVecEnv

        from .router_env import RouterEnv
    except ImportError as error:
        raise SkimpError(f"training needs `pip install 'skimp[router]'` ({error.name})") from error
    if not rows:
        raise CalibrationError("there is no question to train on")
    memory = embedder if isinstance(embedder, Remembered) else Remembered(embedder)
    envs = 8

    def make(i: int) -> Callable[[], RouterEnv]:
        seed = how.seed * 1000 + i
        return lambda: RouterEnv(
            world, plan, memory, rows, absent=how.absent, blind=blind, seed=seed
        )

    class Told(BaseCallback):  # type: ignore[misc]
        def _on_step(self) -> bool:
            if progress is not None and self.num_timesteps % 512 < envs:
                progress("train", min(self.num_timesteps, how.steps), how.steps)
            return True

    kind = MaskablePPO if plan.stop or how.absent else PPO
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small to share out
    try:
        model = kind(
            "MlpPolicy",
            DummyVecEnv([make(i) for i in range(envs)]),
            learning_rate=how.rate,
            n_steps=max(how.rollout // envs, 1),
            batch_size=how.batch,
            n_epochs=how.epochs,
            gamma=plan.gamma,
            ent_coef=how.entropy,
            seed=how.seed,
            device="cpu",
            policy_kwargs={"net_arch": [how.width, how.width]},
        )
        model.set_logger(Logger(None, []))  # its own makes a folder of logs under /tmp
        model.learn(how.steps, callback=Told())
    finally:
        torch.set_num_threads(threads)
    actor = model.policy
    linear = [m for m in actor.mlp_extractor.policy_net if isinstance(m, torch.nn.Linear)]
    layers: list[Layer] = [
        (m.weight.detach().numpy().copy(), m.bias.detach().numpy().copy())
        for m in (*linear, actor.action_net)
    ]
    return Router(world.members, plan, tuple(layers), memory)


def leaks(world: World, memory: Remembered, train: Sequence[int], test: Sequence[int]) -> int:
    """How many test questions are, by their vectors, training questions too."""
    known = memory.many([world.questions[q].text for q in train])
    asked = memory.many([world.questions[q].text for q in test])
    parts = np.array_split(asked, max(1, len(asked) // 256))
    return int(sum(((part @ known.T).max(1) >= LEAK).sum() for part in parts if len(part)))


def build(
    world: World,
    plan: Plan,
    bound: Bound = Bound(),
    how: Training = Training(),
    *,
    embed: str = "auto",
    parts: Sequence[Sequence[int]] | None = None,
    progress: Callable[[str, float, float], None] | None = None,
) -> tuple[Router, dict[str, Any]]:
    """Split, train, bound, compare.

    The policy is fixed before the queries that bound it are looked at, so the conformal bound
    P(cost > budget) <= alpha holds for it as it stands, on average over those queries.

    Returns:
        The policy, and its record; ``feasible`` says whether the bound holds, ``least_budget``
        which one would.

    Raises:
        CalibrationError: There are too few questions.
    """
    found = list(parts) if parts is not None else split(world, how.shares, how.seed)
    fit, hold, test = (list(p) for p in found)
    if min(len(fit), len(test)) < 2:
        raise CalibrationError(f"{len(distinct(world.questions))} questions are too few to split")
    memory = Remembered(make_embedder(embed, [world.questions[q].text for q in fit]))
    plan = scaled(world, plan, fit)
    router = train(world, plan, fit, memory, how, progress=progress)
    all_ways(world, plan, hold)  # so that another reward finds all it may choose in the cache
    costs = sorted(_costs(world, router, hold))
    rank = conformal_rank(len(hold), bound.alpha)
    least = None if rank is None else costs[rank - 1]
    against = compare(world, router, fit, test, seed=how.seed)
    spent = np.array(_costs(world, router, test))
    regret = 1 - against["router"]["quality"]["mean"]
    names = [m.name for m in world.members]
    taken: dict[str, int] = {}
    for path in play(world, router, test):
        key = ">".join(names[m] for m in path)
        taken[key] = taken.get(key, 0) + 1
    record: dict[str, Any] = {
        "extractor": world.extract,
        "quality": world.quality if isinstance(world.quality, str) else "scored",
        "reward": "reconstruction: -lam * cost / scale per hop, + quality when served",
        "training": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(how).items()},
        "split": {
            "seed": how.seed,
            "sizes": [len(fit), len(hold), len(test)],
            "repeated": len(world.questions) - len(distinct(world.questions)),
            "leaks": leaks(world, memory, fit, test),
        },
        "held_out": {
            "queries": len(test),
            "regret": regret,
            "mean_cost": float(spent.mean()),
            "mean_cost_of_strongest": against["singles"][names[-1]]["cost"]["mean"],
        },
        "against": against,
        "verdicts": {k: verdict(v) for k, v in against["router"]["over"].items()},
        "routes": dict(sorted(taken.items(), key=lambda kv: -kv[1])),
        "least_budget": least,
        "feasible": math.isinf(bound.budget) or (least is not None and least <= bound.budget),
    }
    if math.isfinite(bound.budget):
        record |= {
            "mode": "paper",
            "budget": bound.budget,
            "alpha": bound.alpha,
            "delta": 0.1,
            "exceedance_ceiling": exceedance_ceiling(len(hold), bound.alpha, 0.1),
            "calibration_costs": costs,
        }
        record["held_out"]["exceedance"] = float((spent > bound.budget).mean())
    return router, record


def _costs(world: World, router: Router, rows: Sequence[int]) -> list[float]:
    """What the router spends on each question, US dollars."""
    ways = play(world, router, rows)
    return [walk(world, router.plan, q, p)[1] for q, p in zip(rows, ways, strict=True)]
