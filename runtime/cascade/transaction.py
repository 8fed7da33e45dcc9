"""A batch of the ledger's operations in one transaction."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .rows import (
    Attempt,
    BudgetExceededError,
    Reservation,
    attempts,
    budgets,
    requests,
    reservations,
)


@dataclass(slots=True)
class Op:
    """One operation that waits to be written.

    Attributes:
        kind: ``reserve``, ``settle``, ``release``, ``finish`` or ``sweep``.
        row: A reservation; with its attempt to settle; a request to finish; the time to sweep.
        done: Resolved when it is on disk.
        error: What became of it instead.
    """

    kind: str
    row: Any
    done: "asyncio.Future[None] | None"
    error: Exception | None = None


def apply(connection: Connection, ops: Sequence[Op]) -> None:
    """All operations in order, in one transaction."""
    names = sorted({n for op in ops for n in _budget_names(op)})
    swept: list[Any] = []
    for op in ops:
        op.error = None
        if op.kind == "sweep" and not swept:
            query = sa.select(reservations).where(reservations.c.expires < op.row)
            query = query.with_for_update(skip_locked=True)
            swept = list(connection.execute(query).mappings())
    names = sorted({*names, *(n for row in swept for n in row["budgets"].split("\n") if n)})
    books = _lock(connection, names, ops)
    closing = [_held(op).id for op in ops if op.kind in ("settle", "release")]
    held: set[str] = set()
    if closing:
        query = sa.select(reservations.c.id).where(reservations.c.id.in_(closing))
        held = set(connection.execute(query).scalars())
    new: dict[str, dict[str, Any]] = {}
    gone: list[dict[str, Any]] = []
    tried: list[dict[str, Any]] = []
    finished: list[dict[str, Any]] = []

    def give_back(r: Reservation) -> bool:
        if new.pop(r.id, None) is None:
            if r.id not in held:
                return False
            held.discard(r.id)
            gone.append({"old": r.id})
        for b in r.budgets:
            book = books[b.current(r.at)]
            book["reserved"] = max(0.0, book["reserved"] - r.amount)
        return True

    for op in ops:
        if op.kind == "reserve":
            r: Reservation = op.row
            mine = [books[b.current(r.at)] for b in r.budgets]
            short = next(  # what costs nothing is never refused, though a guess overspent
                (b for b in mine if r.amount and b["spent"] + b["reserved"] + r.amount > b["usd"]),
                None,
            )
            if short is not None:
                left = max(0.0, short["usd"] - short["spent"] - short["reserved"])
                op.error = BudgetExceededError(
                    f"this call may cost ${r.amount:.6f}, and budget {short['name']!r} has "
                    f"${left:.6f} of ${short['usd']:g} left"
                )
                continue
            for book in mine:
                book["reserved"] += r.amount
            new[r.id] = {
                "id": r.id,
                "request_id": r.request_id,
                "member": r.member,
                "budgets": "\n".join(b.current(r.at) for b in r.budgets),
                "amount": r.amount,
                "at": r.at,
                "expires": r.expires,
            }
        elif op.kind == "settle":
            r, attempt = op.row
            spent = attempt.cost + attempt.estimate
            if not give_back(r):  # it was slower than its reservation, and is counted as lost
                lost = (attempts.c.id == r.id) & (attempts.c.status == "lost")
                if connection.execute(sa.delete(attempts).where(lost)).rowcount:
                    spent -= r.amount
            for b in r.budgets:
                books[b.current(r.at)]["spent"] += spent
            tried.append(asdict(attempt))
        elif op.kind == "release":
            give_back(op.row)
        elif op.kind == "finish":
            finished.append(asdict(op.row))
    for row in swept:
        if row["id"] in closing:
            continue  # settled in this very batch
        gone.append({"old": row["id"]})
        for name in row["budgets"].split("\n"):
            if name in books:
                book = books[name]
                book["reserved"] = max(0.0, book["reserved"] - row["amount"])
                book["spent"] += row["amount"]
        tried.append(_lost(row))
    if new:
        connection.execute(sa.insert(reservations), list(new.values()))
    if gone:
        connection.execute(_delete, gone)
    if tried:
        connection.execute(sa.insert(attempts), tried)
    if finished:
        connection.execute(sa.insert(requests), finished)
    changed = [
        {"old": n, "new_spent": b["spent"], "new_reserved": b["reserved"]} for n, b in books.items()
    ]
    if changed:
        connection.execute(_update, changed)


_delete = sa.delete(reservations).where(reservations.c.id == sa.bindparam("old"))
_update = (
    sa.update(budgets)
    .where(budgets.c.name == sa.bindparam("old"))
    .values(spent=sa.bindparam("new_spent"), reserved=sa.bindparam("new_reserved"))
)


def _lost(row: Any) -> dict[str, Any]:
    return asdict(
        Attempt(
            id=row["id"],
            request_id=row["request_id"],
            at=row["at"],
            member=row["member"],
            status="lost",
            prompt_tokens=0,
            completion_tokens=0,
            reported=False,
            input_price=0.0,
            output_price=0.0,
            cost=0.0,
            estimate=row["amount"],
            seconds=0.0,
        )
    )


def _budget_names(op: Op) -> list[str]:
    if op.kind not in ("reserve", "settle", "release"):
        return []
    r = _held(op)
    return [b.current(r.at) for b in r.budgets]


def _held(op: Op) -> Reservation:
    found: Reservation = op.row[0] if op.kind == "settle" else op.row
    return found


def _lock(
    connection: Connection, names: Sequence[str], ops: Sequence[Op]
) -> dict[str, dict[str, Any]]:
    """The budgets by name, locked in the order of names, made where they are new."""
    if not names:
        return {}
    limits = {
        b.current(op.row.at): b.usd for op in ops if op.kind == "reserve" for b in op.row.budgets
    }
    query = (
        sa.select(budgets)
        .where(budgets.c.name.in_(names))
        .order_by(budgets.c.name)
        .with_for_update()
    )
    books = {row["name"]: dict(row) for row in connection.execute(query).mappings()}
    missing = [n for n in names if n not in books]
    if missing:
        insert = _insert_new(connection)
        fresh = [
            {"name": n, "usd": limits.get(n, 0.0), "spent": 0.0, "reserved": 0.0} for n in missing
        ]
        connection.execute(insert, fresh)
        books = {row["name"]: dict(row) for row in connection.execute(query).mappings()}
    for name, usd in limits.items():
        if books[name]["usd"] != usd:  # the configuration was changed
            books[name]["usd"] = usd
            change = sa.update(budgets).where(budgets.c.name == name).values(usd=usd)
            connection.execute(change)
    return books


def _insert_new(connection: Connection) -> Any:
    if connection.dialect.name == "postgresql":
        from sqlalchemy.dialects.postgresql import insert
    else:
        from sqlalchemy.dialects.sqlite import insert  # type: ignore[assignment]
    return insert(budgets).on_conflict_do_nothing()
