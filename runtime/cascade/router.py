"""A policy that plans several hops: which member runs next, given all that was said (HierRouter).

HierRouter, arXiv 2511.09873, sees a query as a finite-horizon Markov decision process: the state is
the evolving context, the stage and the cost so far, the action the member that runs next, and after
L hops the last answer is served. Here a policy may also stop early, and serve what it has.

What serves is the actor alone, a small network of plain arrays: no pickle, no gymnasium, no torch.
:mod:`skimp.runtime.cascade.router_train` makes it.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ir.cost import write_atomically
from ...ir.errors import ArtefactError
from .embed import Embedder, Remembered, stored_embedder
from .policy import ROUTER, VERSION, Call, Hop, Recorded, Serve, record_hash
from .router_world import HANDOVER, Context, chained, text_of
from .traces import MemberSpec


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision process: horizon and reward.

    The paper says that cost enters the reward, and not how. The reward here is a reconstruction::

        -lam * cost / scale                 for every hop
        + quality of the answer             when it is served, if the whole cost is at most cap

    Attributes:
        hops: L, the most members that run.
        lam: What the dearest hop costs, in units of quality.
        scale: US dollars of the dearest member's mean call; set when a router is trained.
        gamma: Discount per hop; 1 as horizons are short.
        cap: US dollars per query; an answer that cost more is worth nothing.
        stop: Whether a policy may serve before all hops are taken; not in the paper.
        context: Whether later members see what was said before, or the bare question.
    """

    hops: int = 2
    lam: float = 0.1
    scale: float = 1.0
    gamma: float = 1.0
    cap: float = math.inf
    stop: bool = False
    context: Context = "append"

    def reward(self, hop_cost: float) -> float:
        """Of a hop."""
        return -self.lam * hop_cost / self.scale

    def worth(self, quality: float, cost: float) -> float:
        """Of serving an answer that cost so much in all."""
        return quality if cost <= self.cap else 0.0

    def width(self, dim: int) -> int:
        """Numbers that describe a state."""
        return dim * (1 if self.hops == 1 else 2) + self.hops + 2

    def state(
        self,
        question: NDArray[np.float32],
        last: NDArray[np.float32],
        stage: int,
        cost: float,
        confidence: float,
    ) -> NDArray[np.float32]:
        """What a policy sees; the same in training and in service.

        The paper embeds the question and all responses as one text. Encoders read some 256 tokens,
        so behind a long question no response would be seen: question and last response are
        embedded apart. The stage is one of L switches, whose weights in the first layer are its
        learned embedding.

        Args:
            question: ``[dim]``.
            last: ``[dim]`` of the last response, zeros before the first.
            stage: Hops taken.
            cost: US dollars of them.
            confidence: How far the last member's samples agree; 0 before the first.
        """
        text = [question] if self.hops == 1 else [question, last]
        switches = np.zeros(self.hops, np.float32)
        switches[min(stage, self.hops - 1)] = 1
        rest = np.array([cost / self.scale, confidence], np.float32)
        return np.concatenate([*text, switches, rest])


Layer = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True)
class Router(Recorded):
    """A trained actor as a policy.

    Attributes:
        specs: Members and samples; action ``i`` is member ``i``, the one after the last is to stop.
        plan: The decision process.
        layers: Weights ``[out, in]`` and biases ``[out]``; tanh between them.
        embedder: Reads texts.
        record: The rest of the policy file.
        pool: Members that may be called; all if left out.
    """

    specs: tuple[MemberSpec, ...]
    plan: Plan
    layers: tuple[Layer, ...]
    embedder: Remembered
    record: Mapping[str, Any] = field(default_factory=dict)
    name: str = "hierrouter"
    pool: frozenset[str] | None = None

    blocking = True
    """Reading a text takes milliseconds: the gateway asks in a thread."""

    @property
    def members(self) -> tuple[str, ...]:
        """Those in the pool."""
        return tuple(s.name for s in self.specs if self.pool is None or s.name in self.pool)

    def among(self, pool: Sequence[str]) -> "Router":
        """With another pool; members that were not there in training are not called."""
        there = frozenset(pool) & {s.name for s in self.specs}
        if not there:
            raise ArtefactError(
                f"policy {self.name!r} knows {[s.name for s in self.specs]}, none of which is "
                "configured"
            )
        return replace(self, pool=there)

    def permuted(self, order: Sequence[int]) -> "Router":
        """The same policy with its members in another order."""
        rows = [*order, *range(len(order), len(self.layers[-1][1]))]
        weight, bias = self.layers[-1]
        last: Layer = (weight[rows], bias[rows])
        return replace(
            self, specs=tuple(self.specs[i] for i in order), layers=(*self.layers[:-1], last)
        )

    def logits(self, state: NDArray[np.float32]) -> NDArray[np.float32]:
        """``[.., width]`` to ``[.., actions]``."""
        x = state
        for weight, bias in self.layers[:-1]:
            x = np.tanh(x @ weight.T + bias)
        weight, bias = self.layers[-1]
        found: NDArray[np.float32] = x @ weight.T + bias
        return found

    def allowed(self, stage: int, failed: frozenset[str] = frozenset()) -> NDArray[np.bool_]:
        """Which actions make sense, ``[actions]``."""
        names = self.members
        may = [s.name in names and s.name not in failed for s in self.specs]
        return np.array([*may, stage > 0] if self.plan.stop else may)

    def act(
        self, state: NDArray[np.float32], stage: int, failed: frozenset[str] = frozenset()
    ) -> int | None:
        """The best action; ``None`` if there is none. One more than the last member is to stop."""
        may = self.allowed(stage, failed)
        if not may.any():
            return None
        return int(np.where(may, self.logits(state), -np.inf).argmax())

    def next(self, request: Mapping[str, Any], hops: Sequence[Hop]) -> Call | Serve | None:
        """The member that runs next, or the answer of the last that ran.

        A member that failed is not asked again; the one that comes next takes its hop.
        """
        good = [i for i, h in enumerate(hops) if h.ok]
        served = Serve(good[-1]) if good else None
        stage = len(good)
        if stage >= self.plan.hops:
            return served
        said = [text_said(hops[i].text) for i in good]
        state = self.plan.state(
            self.embedder.one(_question(request)),
            self.embedder.one(said[-1] if said else ""),
            stage,
            hops[-1].cost if hops else 0.0,
            hops[good[-1]].confidence if good else 0.0,
        )
        action = self.act(state, stage, frozenset(h.member for h in hops if not h.ok))
        if action is None or action == len(self.specs):
            return served
        spec, final = self.specs[action], stage == self.plan.hops - 1
        change = _change(request, said) if said and self.plan.context == "append" else {}
        return Call(spec.name, spec.samples, final=final, change=change)


def _question(request: Mapping[str, Any]) -> str:
    messages = request.get("messages")
    if isinstance(messages, list):
        return text_of([m for m in messages if isinstance(m, Mapping)])
    prompt = request.get("prompt")
    return prompt if isinstance(prompt, str) else ""


def text_said(message: str | None) -> str:
    """What a hop said, of the JSON it is kept as."""
    found = json.loads(message or "{}")
    content = found.get("content") if isinstance(found, dict) else None
    if content is None and isinstance(found, dict) and found.get("tool_calls"):
        content = json.dumps(found["tool_calls"])
    return content if isinstance(content, str) else text_of([{"content": content}])


def _change(request: Mapping[str, Any], said: Sequence[str]) -> dict[str, Any]:
    messages = request.get("messages")
    if isinstance(messages, list):
        return {"messages": chained(messages, said)}
    prompt = request.get("prompt")
    if isinstance(prompt, str):
        return {"prompt": "\n\n".join([prompt, *(p for s in said for p in (s, HANDOVER)), ""])}
    return {}


# -- on disk --------------------------------------------------------------------------------------


def save_router(router: Router, record: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Write ``path``, and its arrays beside it under a name of their own hash.

    The old file goes on naming the old arrays until the new one is complete.

    Returns:
        The record as it was written.
    """
    from safetensors.numpy import save

    tensors = dict(router.embedder.inner.tensors)
    for i, (weight, bias) in enumerate(router.layers):
        tensors |= {f"actor.{i}.weight": weight, f"actor.{i}.bias": bias}
    data = save({k: np.ascontiguousarray(v) for k, v in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    plan = asdict(router.plan)
    plan["cap"] = None if math.isinf(router.plan.cap) else router.plan.cap
    told: dict[str, Any] = {
        "format": ROUTER,
        "version": VERSION,
        "members": [
            {"name": m.name, "samples": m.samples}
            | ({"price": {"input": m.price.input, "output": m.price.output}} if m.price else {})
            for m in router.specs
        ],
        "plan": plan,
        "embedder": router.embedder.inner.record,
        "weights": {"file": f"{path.stem}-{digest[:12]}.safetensors", "sha256": digest},
        **record,
    }
    told["sha256"] = record_hash(told)
    write_atomically(path.parent / told["weights"]["file"], data)
    write_atomically(path, json.dumps(told, indent=1, sort_keys=True).encode() + b"\n")
    return told


def router_of(record: Mapping[str, Any], path: Path, name: str = "hierrouter") -> Router:
    """The policy of a file that :func:`save_router` wrote.

    Raises:
        ArtefactError: Its arrays are missing, or not those it was written with.
    """
    from safetensors.numpy import load

    file = path.parent / Path(str(record["weights"]["file"])).name
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ArtefactError(f"{file}, which {path} needs, cannot be read: {error}") from error
    if hashlib.sha256(data).hexdigest() != record["weights"]["sha256"]:
        raise ArtefactError(f"{file} is not what {path} was written with: train again")
    tensors = load(data)
    told = dict(record["plan"])
    told["cap"] = math.inf if told["cap"] is None else told["cap"]
    plan = Plan(**told)
    specs = tuple(MemberSpec(str(m["name"]), int(m["samples"])) for m in record["members"])
    count = sum(k.startswith("actor.") for k in tensors) // 2
    layers = tuple((tensors[f"actor.{i}.weight"], tensors[f"actor.{i}.bias"]) for i in range(count))
    embedder: Embedder = stored_embedder(record["embedder"], tensors)
    actions = len(specs) + plan.stop
    if (
        not layers
        or layers[0][0].shape[1] != plan.width(embedder.dim)
        or len(layers[-1][1]) != actions
    ):
        raise ArtefactError(f"{file}: the network does not fit the members and the plan")
    return Router(specs, plan, layers, Remembered(embedder, 10_000), record, name)
