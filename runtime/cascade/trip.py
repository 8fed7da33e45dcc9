"""What the gateway passes along: a request as it came, the way it takes, and the answer."""

import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from ...ir.errors import SkimpError
from .member import Kind, Member, MemberError, Reply
from .policy import Hop, Policy
from .price import Price, answers_wanted
from .rows import Budget

MOST_HEADER = 4000
"""Characters of a header of a response."""


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
    def several(self) -> bool:
        """Whether the caller wants several answers, which are no votes."""
        return answers_wanted(self.body) > 1

    @property
    def wants_usage(self) -> bool:
        """Whether the caller wants a chunk with usage."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))


@dataclass(frozen=True, slots=True)
class Kept:
    """What a hop would serve: a choice of a reply, and who gave it, a fallback perhaps."""

    reply: Reply
    choice: int
    member: str


@dataclass(slots=True)
class Trip:
    """One request under way."""

    query: Query
    policy: Policy
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    at: float = field(default_factory=time.time)
    begun: float = field(default_factory=time.perf_counter)
    hops: list[Hop] = field(default_factory=list)
    replies: list[Kept | None] = field(default_factory=list)
    route: list[dict[str, Any]] = field(default_factory=list)
    cost: float = 0.0
    estimate: float = 0.0
    served: str | None = None
    confidence: float | None = None
    finished: bool = False
    status: str | None = None

    @property
    def path(self) -> str:
        """The route in short: ``small:0.40>large``."""
        return ">".join(
            r["member"]
            + (f":{r['confidence']:.2f}" if r.get("confidence") is not None else "")
            + ("!" if r["status"] != "ok" else "")
            for r in self.route
        )

    def best(self) -> int | None:
        """The hop to serve if no stronger member answers: the one that agrees with itself most."""
        there = [i for i, hop in enumerate(self.hops) if hop.ok and not hop.check]
        return max(there, key=lambda i: self.hops[i].confidence, default=None)

    def report(self) -> dict[str, Any]:
        """What the response says of the route."""
        return {
            "request": self.id,
            "policy": self.policy.name,
            "status": self.status,
            "route": self.route,
            "cost": self.cost,
            "estimate": self.estimate,
        }

    def headers(self) -> dict[str, str]:
        """What the response's headers say of it, as far as it is known."""
        return {
            "x-skimp-request": self.id,
            "x-skimp-policy": header_text(self.policy.name),
            "x-skimp-route": header_text(self.path),
            "x-skimp-cost": f"{self.cost:.9f}",
        }


def header_text(text: str) -> str:
    """As a header can carry it: ASCII, the rest quoted as in a URL, and not too long.

    aiohttp's clients, for example, take no header of more than 8190 bytes.
    """
    quoted = quote(text, safe="".join(map(chr, range(32, 127))).replace("%", ""))
    return quoted if len(quoted) <= MOST_HEADER else quoted[: MOST_HEADER - 3] + "..."


@dataclass(frozen=True, slots=True)
class Answer:
    """Either a body or a stream of the data of server-sent events.

    ``report`` tells the route and its cost; of a stream, once that has ended.
    """

    headers: dict[str, str]
    body: dict[str, Any] | None = None
    stream: AsyncIterator[bytes] | None = None
    report: Callable[[], dict[str, Any]] | None = None
