"""What the gateway passes along: a request as it came, the way it takes, and the answer."""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...ir.errors import SkimpError
from .member import Kind, Member, MemberError, Reply
from .policy import Hop, Policy
from .price import Price
from .rows import Budget


class UnavailableError(SkimpError):
    """Nobody answered; carries the last member's error."""

    def __init__(self, message: str, cause: MemberError | None = None) -> None:
        super().__init__(message)
        self.cause = cause


@dataclass(frozen=True, slots=True)
class Entry:
    """A member with what the gateway knows of it."""

    name: str
    member: Member
    price: Price
    retries: int = 1
    max_tokens: int = 1024
    fallback: tuple[str, ...] = ()
    temperature: float = 0.7  # of votes: samples at temperature 0 agree whether right or not


@dataclass(frozen=True, slots=True)
class Query:
    """A request as it came: the OpenAI body, untouched, and who asks."""

    kind: Kind
    body: Mapping[str, Any]
    caller: str = "anyone"
    budgets: tuple[Budget, ...] = ()

    @property
    def stream(self) -> bool:
        """Whether the caller wants chunks."""
        return bool(self.body.get("stream"))

    @property
    def wants_usage(self) -> bool:
        """Whether the caller wants a chunk with usage."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))


@dataclass(slots=True)
class Trip:
    """One request under way."""

    query: Query
    policy: Policy
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    at: float = field(default_factory=time.time)
    begun: float = field(default_factory=time.perf_counter)
    hops: list[Hop] = field(default_factory=list)
    replies: list[tuple[Reply, int] | None] = field(default_factory=list)
    route: list[dict[str, Any]] = field(default_factory=list)
    cost: float = 0.0
    estimate: float = 0.0
    served: str | None = None
    confidence: float | None = None
    finished: bool = False

    @property
    def path(self) -> str:
        """The route in short: ``small:0.40>large``."""
        return ">".join(
            r["member"]
            + (f":{r['confidence']:.2f}" if r.get("confidence") is not None else "")
            + ("!" if r["status"] != "ok" else "")
            for r in self.route
        )

    def report(self) -> dict[str, Any]:
        """What the response says of the route."""
        return {
            "request": self.id,
            "policy": self.policy.name,
            "route": self.route,
            "cost": self.cost,
            "estimate": self.estimate,
        }

    def headers(self) -> dict[str, str]:
        """What the response's headers say of it, as far as it is known."""
        return {
            "x-skimp-request": self.id,
            "x-skimp-policy": self.policy.name,
            "x-skimp-route": self.path,
            "x-skimp-cost": f"{self.cost:.9f}",
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """Either a body or a stream of the data of server-sent events.

    ``report`` tells the route and its cost; of a stream, once that has ended.
    """

    headers: dict[str, str]
    body: dict[str, Any] | None = None
    stream: AsyncIterator[bytes] | None = None
    report: Callable[[], dict[str, Any]] | None = None
