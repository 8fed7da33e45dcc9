"""A batch of the ledger's operations in one transaction.

The statements go to the driver as they are: SQLAlchemy takes longer to make one than SQLite to run
it, and every request waits for several.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import sqlalchemy as sa

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


class Books:
    """What a transaction reads and writes, through the cursor of a driver.

    Args:
        cursor: Of a connection in a transaction.
        postgres: Whether rows are locked (SQLite locks the whole), and parameters are ``%s``.
    """

    def __init__(self, cursor: Any, postgres: bool) -> None:
        self._cursor, self._postgres = cursor, postgres
        self._lock = " FOR UPDATE" if postgres else ""

    def _text(self, text: str) -> str:
        return text.replace("?", "%s") if self._postgres else text

    def _rows(self, text: str, values: Sequence[Any]) -> list[dict[str, Any]]:
        self._cursor.execute(self._text(text), values)
        names = [column[0] for column in self._cursor.description]
        return [dict(zip(names, row, strict=True)) for row in self._cursor.fetchall()]

    def _each(self, text: str, rows: Iterable[Sequence[Any]]) -> None:
        if rows := list(rows):
            self._cursor.executemany(self._text(text), rows)

    def insert(self, table: sa.Table, rows: Iterable[Any]) -> None:
        """Put objects with the table's columns as attributes into it."""
        names = table.columns.keys()
        marks = ", ".join("?" * len(names))
        text = f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({marks})"
        self._each(text, map(attrgetter(*names), rows))

    def expired(self, now: float) -> list[dict[str, Any]]:
        """Reservations whose time is over, but those that another process is at."""
        skip = f"{self._lock} SKIP LOCKED" if self._postgres else ""
        return self._rows(f"SELECT * FROM {reservations.name} WHERE expires < ?{skip}", [now])

    def held(self, ids: Sequence[str]) -> set[str]:
        """Those of the reservations that are there."""
        if not ids:
            return set()
        marks = ", ".join("?" * len(ids))
        text = f"SELECT id FROM {reservations.name} WHERE id IN ({marks})"
        return {row["id"] for row in self._rows(text, ids)}

    def give_back(self, ids: Iterable[str]) -> None:
        """Delete reservations."""
        self._each(f"DELETE FROM {reservations.name} WHERE id = ?", ([i] for i in ids))

    def found(self, attempt: str) -> bool:
        """Delete an attempt that was given up as lost; whether it was there."""
        text = f"DELETE FROM {attempts.name} WHERE id = ? AND status = 'lost'"
        self._cursor.execute(self._text(text), [attempt])
        return bool(self._cursor.rowcount)

    def budgets(self, names: Sequence[str], limits: dict[str, float]) -> dict[str, dict[str, Any]]:
        """The budgets by name, locked in the order of names, made where they are new."""
        if not names:
            return {}
        marks = ", ".join("?" * len(names))
        text = f"SELECT * FROM {budgets.name} WHERE name IN ({marks}) ORDER BY name{self._lock}"
        books = {row["name"]: row for row in self._rows(text, names)}
        if missing := [n for n in names if n not in books]:
            new = f"INSERT INTO {budgets.name} (name, usd, spent, reserved) VALUES (?, ?, 0.0, 0.0)"
            self._each(f"{new} ON CONFLICT DO NOTHING", ([n, limits.get(n, 0.0)] for n in missing))
            books = {row["name"]: row for row in self._rows(text, names)}
        for name, usd in limits.items():  # the configuration may have changed
            books[name]["usd"] = usd
        return books

    def keep(self, books: dict[str, dict[str, Any]]) -> None:
        """Write the budgets back."""
        text = f"UPDATE {budgets.name} SET usd = ?, spent = ?, reserved = ? WHERE name = ?"
        self._each(text, ([b["usd"], b["spent"], b["reserved"], n] for n, b in books.items()))


def apply(tables: Books, ops: Sequence[Op]) -> None:
    """All operations in order, in one transaction."""
    for op in ops:
        op.error = None
    now = next((op.row for op in ops if op.kind == "sweep"), None)
    swept = [] if now is None else tables.expired(now)
    used = {n for op in ops for n in _budget_names(op)}
    used |= {n for row in swept for n in row["budgets"].split("\n") if n}
    books = tables.budgets(sorted(used), _limits(ops))
    closing = [_held(op).id for op in ops if op.kind in ("settle", "release")]
    held = tables.held(closing)
    new: dict[str, _Row] = {}
    gone: list[str] = []
    tried: list[Attempt] = []

    def give_back(r: Reservation) -> bool:
        if new.pop(r.id, None) is None:
            if r.id not in held:
                return False
            held.discard(r.id)
            gone.append(r.id)
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
            new[r.id] = _Row(r)
        elif op.kind == "settle":
            r, attempt = op.row
            spent = attempt.cost + attempt.estimate
            if not give_back(r) and tables.found(r.id):
                spent -= r.amount  # it was slower than its reservation, and was counted as lost
            for b in r.budgets:
                books[b.current(r.at)]["spent"] += spent
            tried.append(attempt)
        elif op.kind == "release":
            give_back(op.row)
    for row in swept:
        if row["id"] in closing:
            continue  # settled in this very batch
        gone.append(row["id"])
        for name in row["budgets"].split("\n"):
            if name in books:
                book = books[name]
                book["reserved"] = max(0.0, book["reserved"] - row["amount"])
                book["spent"] += row["amount"]
        tried.append(_lost(row))
    tables.insert(reservations, new.values())
    tables.give_back(gone)
    tables.insert(attempts, tried)
    tables.insert(requests, [op.row for op in ops if op.kind == "finish"])
    tables.keep(books)


class _Row:
    """A reservation as the table has it."""

    def __init__(self, r: Reservation) -> None:
        self.id, self.request_id, self.member = r.id, r.request_id, r.member
        self.budgets = "\n".join(b.current(r.at) for b in r.budgets)
        self.amount, self.at, self.expires = r.amount, r.at, r.expires


def _lost(row: dict[str, Any]) -> Attempt:
    return Attempt(
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


def _limits(ops: Sequence[Op]) -> dict[str, float]:
    """What each budget may spend, US dollars, as the latest reservation has it."""
    reserved = (op.row for op in ops if op.kind == "reserve")
    return {b.current(r.at): b.usd for r in reserved for b in r.budgets}


def _budget_names(op: Op) -> list[str]:
    if op.kind not in ("reserve", "settle", "release"):
        return []
    r = _held(op)
    return [b.current(r.at) for b in r.budgets]


def _held(op: Op) -> Reservation:
    found: Reservation = op.row[0] if op.kind == "settle" else op.row
    return found
