"""The tables of the ledger, and a row of each as an object."""

from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from ...ir.errors import SkimpError

meta = sa.MetaData()
_F: sa.Double[float] = sa.Double()
_I = sa.Integer()

requests = sa.Table(
    "requests",
    meta,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("at", _F, nullable=False, index=True),
    sa.Column("caller", sa.String(200), nullable=False),
    sa.Column("policy", sa.String(200), nullable=False),
    sa.Column("digest", sa.String(80), nullable=False),
    sa.Column("route", sa.Text, nullable=False),
    sa.Column("served", sa.String(200)),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("confidence", _F),
    sa.Column("cost", _F, nullable=False),
    sa.Column("estimate", _F, nullable=False),
    sa.Column("bound", _F),
    sa.Column("seconds", _F, nullable=False),
)
attempts = sa.Table(
    "attempts",
    meta,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("request_id", sa.String(40), nullable=False, index=True),
    sa.Column("at", _F, nullable=False, index=True),
    sa.Column("member", sa.String(200), nullable=False),
    sa.Column("status", sa.String(20), nullable=False),
    sa.Column("prompt_tokens", _I, nullable=False),
    sa.Column("completion_tokens", _I, nullable=False),
    sa.Column("reported", sa.Boolean, nullable=False),
    sa.Column("input_price", _F, nullable=False),
    sa.Column("output_price", _F, nullable=False),
    sa.Column("cost", _F, nullable=False),
    sa.Column("estimate", _F, nullable=False),
    sa.Column("seconds", _F, nullable=False),
)
reservations = sa.Table(
    "reservations",
    meta,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("request_id", sa.String(40), nullable=False),
    sa.Column("member", sa.String(200), nullable=False),
    sa.Column("budgets", sa.Text, nullable=False),
    sa.Column("amount", _F, nullable=False),
    sa.Column("at", _F, nullable=False),
    sa.Column("expires", _F, nullable=False, index=True),
)
budgets = sa.Table(
    "budgets",
    meta,
    sa.Column("name", sa.String(240), primary_key=True),
    sa.Column("usd", _F, nullable=False),
    sa.Column("spent", _F, nullable=False),
    sa.Column("reserved", _F, nullable=False),
)


class LedgerError(SkimpError):
    """The ledger cannot be opened or written; nothing is served that it did not record."""


class BudgetExceededError(SkimpError):
    """A call that could cost more than what is left."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit in US dollars, ``per`` day or month (UTC), or ever."""

    name: str
    usd: float
    per: str = "ever"

    def current(self, now: float) -> str:
        """The name of the row that counts now."""
        if self.per == "ever":
            return self.name
        day = datetime.fromtimestamp(now, UTC)
        return f"{self.name}@{day:%Y-%m-%d}" if self.per == "day" else f"{self.name}@{day:%Y-%m}"


@dataclass(frozen=True, slots=True)
class Reservation:
    """Money set aside for one attempt, US dollars."""

    id: str
    request_id: str
    member: str
    budgets: tuple[Budget, ...]
    amount: float
    at: float
    expires: float


@dataclass(frozen=True, slots=True)
class Attempt:
    """One call of a member.

    Attributes:
        status: ``ok``, ``cancelled``, ``lost``, or the kind of its error.
        reported: Whether the tokens are the provider's. Then ``cost`` is theirs times the price,
            and ``estimate`` 0; else ``cost`` is 0, and ``estimate`` what it may have cost.
        input_price: US dollars per million prompt tokens, as it was then; ``output_price`` alike.
    """

    id: str
    request_id: str
    at: float
    member: str
    status: str
    prompt_tokens: int
    completion_tokens: int
    reported: bool
    input_price: float
    output_price: float
    cost: float
    estimate: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a caller: where it went and what that cost, US dollars."""

    id: str
    at: float
    caller: str
    policy: str
    digest: str
    route: str
    served: str | None
    status: str
    confidence: float | None
    cost: float
    estimate: float
    bound: float | None
    seconds: float
