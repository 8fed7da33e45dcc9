"""The decision process as a gymnasium environment: one episode is one query."""

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from numpy.typing import NDArray

from .embed import Remembered
from .router import Plan
from .router_world import Steps, World


class RouterEnv(gymnasium.Env[NDArray[np.float32], np.int64]):
    """Hops through a world.

    Args:
        world: Questions and members.
        plan: Horizon and reward.
        embedder: Reads texts.
        rows: Numbers of the questions that episodes draw from.
        absent: Probability that a member is not there in an episode, so that a policy learns what
            to do when the pool is another; one always is.
        blind: What the policy is not shown, ``context`` or ``cost``: for ablations.
        seed: Of the draws.
    """

    def __init__(
        self,
        world: World,
        plan: Plan,
        embedder: Remembered,
        rows: Sequence[int],
        *,
        absent: float = 0.0,
        blind: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.world, self.plan, self.embedder, self.rows = world, plan, embedder, list(rows)
        self.absent, self.blind = absent, frozenset(blind)
        self.members = len(world.members)
        self.action_space = gymnasium.spaces.Discrete(self.members + plan.stop)
        width = plan.width(embedder.inner.dim)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self._random = np.random.default_rng(seed)
        self._texts = {q: world.questions[q].text for q in self.rows}
        embedder.learn(list(self._texts.values()))
        self.path: Steps = ()
        self.question, self.cost = self.rows[0], 0.0
        self._there = np.ones(self.members, bool)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Draw a query; ``options={"question": i}`` asks for one."""
        super().reset(seed=seed)
        if seed is not None:
            self._random = np.random.default_rng(seed)
        drawn = self.rows[int(self._random.integers(len(self.rows)))]
        self.question = int((options or {}).get("question", drawn))
        self.path, self.cost = (), 0.0
        if self.absent:
            self._there = self._random.random(self.members) >= self.absent
            self._there[self._random.integers(self.members)] = True
        return self._state(), {}

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions make sense; sb3-contrib's MaskablePPO asks for it by this name."""
        return np.append(self._there, len(self.path) > 0) if self.plan.stop else self._there.copy()

    def step(
        self, action: np.int64
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Let a member run, or stop."""
        reward, stopped = 0.0, int(action) == self.members
        if stopped and not self.path:
            raise ValueError("nothing was said that could be served: mask this action")
        if not stopped:
            self.path = (*self.path, int(action))
            hop = self.world.after(self.question, self.path)
            self.cost += hop.cost
            reward = self.plan.reward(hop.cost)
        done = stopped or len(self.path) == self.plan.hops
        info: dict[str, Any] = {}
        if done:
            quality = self.world.after(self.question, self.path).quality
            reward += self.plan.worth(quality, self.cost)
            info = {"quality": quality, "cost": self.cost, "path": self.path}
        return self._state(), reward, done, False, info

    def _state(self) -> NDArray[np.float32]:
        question = self._texts[self.question]
        last = self.world.said(self.question, self.path)
        hop = self.world.after(self.question, self.path) if self.path else None
        hidden = "context" in self.blind
        return self.plan.state(
            self.embedder.one("" if hidden else question),
            self.embedder.one("" if hidden else last),
            len(self.path),
            0.0 if "cost" in self.blind else self.cost,
            0.0 if hop is None or hidden else hop.confidence,
        )
